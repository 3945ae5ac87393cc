"""Direct solvers: one application of a factorisation, refined where that is not enough."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import PyTree

from .. import tree
from ..linearise.sparsity import Pattern, find_pattern
from ..precondition.banded import Banded, bandwidth_along_line
from ..precondition.base import AbstractPreconditioner
from ..precondition.block_tridiagonal import BlockTridiagonal
from ..precondition.dense import Dense
from ..precondition.layout import check_space
from ..precondition.sparse_lu import SparseLU
from ..typing import Args, ScalarLike, Y
from .richardson import AbstractRichardson
from .short_recurrence import Context, Progress


class AbstractDirect(AbstractRichardson):
    """Iterative refinement with a factorisation M = A as preconditioner.

    The first iteration is the direct solve, its matvec the measure of it. Another follows only
    where the residual is above the tolerance and the last one at least halved it; one that brought
    nothing is taken back.
    """

    def advance(self, context: Context, progress: Progress, memory: Any) -> tuple[Progress, PyTree]:
        tried, memory = super().advance(context, progress, memory)
        better = tried.residual < progress.residual
        halved = tried.residual <= 0.5 * progress.residual
        return tried._replace(
            x=tree.where(better, tried.x, progress.x),
            r=tree.where(better, tried.r, progress.r),
            residual=jnp.where(better, tried.residual, progress.residual),
            broken=~jnp.isfinite(tried.residual),
            final=~halved,
        ), memory


class SparseDirect(AbstractDirect):
    """Solves A x = b by a sparse LU factorisation of A (KLU, on the CPU) with refinement.

    A is assembled through its sparsity pattern from `num_colours` matvecs; see `nks.SparseLU`,
    whose conditions hold. One factorisation usually reaches round-off, so a forcing term, or any
    tolerance above round-off, changes nothing: Newton's method is exact with it.

    **Arguments:**

    - `rtol`, `atol`: ‖b − A x‖ ≤ atol + rtol ‖b‖, in `lx.linear_solve`.
    - `pattern`: a `Pattern`; found by asdex if not given.
    - `max_steps`: most applications of the factorisation in a solve.

    Reports `stagnation` where refinement ends above the tolerance, which is also what a singular A
    comes to; `breakdown` where A or b is not finite.

    Storage: 6 vectors and those of `nks.SparseLU`. Work: usually one application and one matvec,
    besides the matvecs that assemble A; two reductions.

    Source: as `nks.SparseLU`; Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., SIAM
    2002, §12 (refinement in fixed precision, and ending it where it does not halve the residual).
    """

    rtol: ScalarLike
    atol: ScalarLike
    max_steps: int | None = eqx.field(static=True)
    preconditioner: AbstractPreconditioner

    def __init__(
        self,
        rtol: ScalarLike = 1e-6,
        atol: ScalarLike = 0.0,
        pattern: Pattern | None = None,
        *,
        max_steps: int | None = 10,
    ):
        self.rtol = rtol
        self.atol = atol
        self.max_steps = max_steps
        self.preconditioner = SparseLU(pattern)


class BandedDirect(AbstractDirect):
    """Solves A x = b by elimination of a banded or block tridiagonal A, with refinement.

    The unknowns are ordered node after node, along the first axis of all leaves; see `nks.Banded`
    and `nks.BlockTridiagonal`, whose conditions hold: no pivoting across blocks, which refinement
    makes up for as long as each iteration halves the residual. Runs on any device, in the precision
    of the unknowns.

    **Arguments:**

    - `rtol`, `atol`: ‖b − A x‖ ≤ atol + rtol ‖b‖, in `lx.linear_solve`.
    - `lower`, `upper`: the half-bandwidths, both or neither (`nks.Banded(lower, upper)`). Or
    - `block`: the block size (`nks.BlockTridiagonal(block)`). Without any of the three the
      half-bandwidths are those of the pattern.
    - `pattern`: a `Pattern` to take them from; found by asdex if not given.
    - `max_steps`: most applications of the factorisation in a solve.

    Reports as `nks.SparseDirect`. Entries outside the band that was given make it end in
    `stagnation`.

    Storage: 6 vectors and those of the preconditioner, 3 b. Work: usually one application and one
    matvec, besides the lower + upper + 1 (3 b) matvecs that assemble A.

    Source: Golub & Van Loan, Matrix Computations, 4th ed., §4.5; Higham, as `nks.SparseDirect`.
    """

    rtol: ScalarLike
    atol: ScalarLike
    max_steps: int | None = eqx.field(static=True)
    preconditioner: AbstractPreconditioner

    def __init__(
        self,
        rtol: ScalarLike = 1e-6,
        atol: ScalarLike = 0.0,
        *,
        lower: int | None = None,
        upper: int | None = None,
        block: int | None = None,
        pattern: Pattern | None = None,
        max_steps: int | None = 10,
    ):
        given = [lower is not None, block is not None, pattern is not None]
        if (lower is None) != (upper is None) or sum(given) > 1:
            raise ValueError(
                "`BandedDirect` takes `lower` and `upper`, or `block`, or `pattern`, or none of "
                f"them; got lower={lower}, upper={upper}, block={block}, pattern={pattern}."
            )
        self.rtol = rtol
        self.atol = atol
        self.max_steps = max_steps
        if block is not None:
            self.preconditioner = BlockTridiagonal(block)
        elif lower is not None and upper is not None:
            self.preconditioner = Banded(lower, upper)
        else:
            self.preconditioner = DetectedBand(pattern)


class DenseDirect(AbstractDirect):
    """Solves A x = b by the inverse of A as a dense matrix, with refinement: for a few unknowns.

    Up to some 16 unknowns it is faster than any iteration, and as robust as partial pivoting; the
    unknowns may be any PyTree. See `nks.Dense`, whose conditions hold.

    **Arguments:**

    - `rtol`, `atol`: ‖b − A x‖ ≤ atol + rtol ‖b‖, in `lx.linear_solve`.
    - `max_steps`: most applications of the inverse in a solve.

    Reports as `nks.SparseDirect`.

    Storage: 6 vectors and the n of the inverse. Work: usually one application and one matvec,
    besides the n matvecs that assemble A.

    Source: Golub & Van Loan, Matrix Computations, 4th ed., §3.4; Higham, as `nks.SparseDirect`.
    """

    rtol: ScalarLike
    atol: ScalarLike
    max_steps: int | None = eqx.field(static=True)
    preconditioner: AbstractPreconditioner

    def __init__(
        self, rtol: ScalarLike = 1e-6, atol: ScalarLike = 0.0, *, max_steps: int | None = 10
    ):
        self.rtol = rtol
        self.atol = atol
        self.max_steps = max_steps
        self.preconditioner = Dense()


class DetectedBand(AbstractPreconditioner):
    """`nks.Banded` with the half-bandwidths of a pattern, that of J if none is given.

    Storage and work are those of `nks.Banded`.
    """

    pattern: Pattern | None = eqx.field(static=True, default=None)

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        return self.resolved(operator).init(operator, y, args)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        return self.resolved(operator).num_probes(operator, y, args)

    def resolved(self, operator: lx.AbstractLinearOperator) -> Banded:
        """The preconditioner with its half-bandwidths."""
        structure = check_space(operator, "BandedDirect")
        if tree.size(structure) == 0:
            return Banded(0, 0)
        pattern = find_pattern(operator) if self.pattern is None else self.pattern
        pattern.check_size(operator)
        lower, upper = bandwidth_along_line(pattern, structure)
        if 4 * max(lower, upper) > pattern.n > 64:
            raise ValueError(
                f"A band of {lower} diagonals below and {upper} above the main one is no band for "
                f"{pattern.n} unknowns. Order them so that neighbours stand together, use "
                "`nks.SparseDirect()`, or insist by `BandedDirect(lower=..., upper=...)`."
            )
        return Banded(lower, upper)

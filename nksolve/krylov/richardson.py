"""Richardson iteration; with a factorisation as preconditioner, iterative refinement."""

from typing import NamedTuple

import equinox as eqx
from jaxtyping import PyTree

from .. import tree
from ..precondition.base import AbstractPreconditioner, Identity
from ..typing import ScalarLike, Vector
from .short_recurrence import AbstractShortRecurrence, Context, Progress


class _Start(NamedTuple):
    """Where a round began, and how far x has moved since."""

    x: Vector
    r: Vector  # b − A x there
    moved: Vector


class AbstractRichardson(AbstractShortRecurrence):
    """x ← x + M⁻¹(b − A x).

    The residual is b − A x itself, taken as r₀ − A (x − x₀), and not one by recurrence: what is
    tested is what is there, to the rounding of A x.
    """

    def begin(self, context: Context, progress: Progress) -> tuple[Progress, PyTree]:
        del context
        return progress, _Start(progress.x, progress.r, tree.zeros_like(progress.x))

    def advance(
        self, context: Context, progress: Progress, memory: _Start
    ) -> tuple[Progress, PyTree]:
        moved = tree.add(memory.moved, context.solve(progress.r))
        r = tree.sub(memory.r, context.mv(moved))
        progress = progress._replace(
            x=tree.add(memory.x, moved), r=r, residual=context.norm(r)
        ).worked(steps=1, matvecs=1, applications=1)
        return progress, memory._replace(moved=moved)


class Richardson(AbstractRichardson):
    """Richardson iteration: x_{k+1} = x_k + M⁻¹(b − A x_k).

    Converges where the spectral radius of I − M⁻¹A is below 1, by that factor an iteration. With a
    good enough preconditioner (a multigrid cycle, a factorisation that is a little old or of lower
    precision) it does what GMRES does, without inner products but for one norm. Where it diverges
    it reports a breakdown at overflow, and returns zero (or the guess).

    **Arguments:**

    - `rtol`, `atol`: ‖b − A x‖ ≤ atol + rtol ‖b‖ ends it, in `lx.linear_solve`.
    - `max_steps`: most iterations; 10 n by default.
    - `preconditioner`: M⁻¹.

    Reports `stagnation` where the residual did not fall over 1,000 iterations, `breakdown` where
    it is no longer finite.

    Storage: 6 vectors. Work: one matvec, one M⁻¹ application, one reduction an iteration.

    Source: Saad, Iterative Methods for Sparse Linear Systems, 2nd ed., SIAM 2003, §4.1 and §13.2.1.
    """

    rtol: ScalarLike = 1e-6
    atol: ScalarLike = 0.0
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: AbstractPreconditioner = Identity()

"""The adjoint that takes over the inverse that the forward solve built."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx

from .. import tree
from ..krylov.basis import combined, gram
from ..krylov.gmres import GMRES
from ..krylov.recycling import RecycledSpace
from ..krylov.system import KrylovState
from ..linearise.operator import AbstractLinearMap
from ..newton.reuse import AbstractReuse
from ..precondition.base import AbstractPreconditioner
from ..typing import Args, ScalarLike, Vector, Y
from .base import AbstractImplicitAdjoint, AbstractImplicitSolve, stop_gradient
from .failure import nan_where
from .report import Receiver, tell_approximation
from .splitting import (
    NegativeIdentity,
    as_inverse,
    check_count,
    check_preconditioner,
    resolved_preconditioner,
    split_state,
)

_RESTART = 30


class Shared(AbstractImplicitAdjoint):
    """The forward solve's approximation B ≈ J⁻¹ serves the derivatives, refined by a few steps.

    B is, whichever the forward solve left:

    - `stats["inverse"]`, the low-rank inverse of a quasi-Newton method (`nks.Broyden`);
    - `stats["recycled"]`, the space of `nks.NewtonKrylov(linear_solver=nks.GCRODR(recycle=k))`:
      J U = C with CᴴC = I at the last linear solve makes B = M⁻¹(I − C Cᴴ) + U Cᴴ, which is exact
      on span C and M⁻¹ on the rest.

    J⁻¹b ≈ B b without refinement; with it, `refine` iterations of GMRES on J x = b preconditioned
    by B, stopped early at ‖r‖ ≤ rtol ‖b‖. Reverse mode has Bᵀ, which is as good as B for nearly
    symmetric J and worse the less normal J is: what holds of B by construction, J B c = c, is not
    promised of Bᵀ.

    **Arguments:**

    - `refine`: most iterations; 0 for B itself, which is linear in b and transposes exactly.
    - `preconditioner`: M⁻¹ outside a recycled space; as for `nks.OneStep`.
    - `rtol`: ends the refinement; the nonlinear solver's by default.
    - `reuse`, `report`, `estimate_steps`: as for `nks.OneStep`.

    Raises `ValueError` where a derivative is taken of a solve that left no inverse.

    Storage: that of the inverse, and `refine` + 4 vectors. Work: one product with B and no matvec,
    or a matvec and a product with B for each step of refinement.

    Source: Ramzi, Mannel, Bai, Starck, Ciuciu & Moreau, *SHINE: sharing the inverse estimate from
    the forward pass for bi-level optimization and implicit models*, ICLR 2022.
    """

    refine: int = eqx.field(static=True, default=5)
    preconditioner: AbstractPreconditioner = NegativeIdentity()
    rtol: ScalarLike | None = None
    reuse: AbstractReuse | None = None
    report: Receiver = eqx.field(static=True, default=None)
    estimate_steps: int = eqx.field(static=True, default=20)

    def __check_init__(self):
        check_count(self.refine, 0, "Shared(refine)")
        check_preconditioner(self.preconditioner, "Shared")
        check_count(self.estimate_steps, 1, "Shared(estimate_steps)")

    def resolved(
        self, solver: Any, args: Args, tags: frozenset[object], *, throw: bool
    ) -> "SharedSolve":
        del throw
        preconditioner = resolved_preconditioner(self.preconditioner, solver, "Shared")
        rtol = solver.rtol if self.rtol is None else self.rtol
        solve = SharedSolve(
            preconditioner=preconditioner,
            rtol=rtol,
            args=args,
            inverse=None,
            recycled=None,
            refine=self.refine,
            tags=tags,
            report=self.report,
            estimate_steps=self.estimate_steps,
            forward=type(solver).__name__,
        )
        return stop_gradient(solve)

    def tolerating(self, rtol: ScalarLike) -> "Shared":
        if self.rtol is not None:
            return self
        return eqx.tree_at(lambda a: a.rtol, self, rtol, is_leaf=lambda x: x is None)


class SharedSolve(AbstractImplicitSolve):
    """J x ≈ b with what the forward solve left."""

    preconditioner: AbstractPreconditioner
    rtol: ScalarLike
    args: Args
    inverse: Any
    recycled: RecycledSpace | None
    refine: int = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True)
    report: Receiver = eqx.field(static=True)
    estimate_steps: int = eqx.field(static=True)
    forward: str = eqx.field(static=True)

    def continuing(self, stats: dict[str, Any]) -> "SharedSolve":
        """The same, with the inverse or the space that the forward solve left."""
        found = stop_gradient((stats.get("inverse"), stats.get("recycled")))
        if all(x is None for x in found):
            raise ValueError(
                f"`Shared` takes over an inverse that the forward solve left, but {self.forward} "
                'left none: neither `stats["inverse"]`, as `nks.Broyden` does, nor '
                '`stats["recycled"]`, as `nks.NewtonKrylov(linear_solver=nks.GCRODR(recycle=...))` '
                "does. Use one of these, or another adjoint: `nks.KrylovAdjoint()` is exact, "
                "`nks.Neumann(...)` needs nothing of the forward solve."
            )
        return eqx.tree_at(
            lambda s: (s.inverse, s.recycled), self, found, is_leaf=lambda x: x is None
        )

    def prepare(self, operator: lx.AbstractLinearOperator, y: Y, *, real: bool) -> KrylovState:
        if self.inverse is not None:
            inverse = _Given(self.inverse)
            return KrylovState(operator, as_inverse(inverse, operator))
        if self.recycled is None:
            raise ValueError("`Shared` was given nothing by a forward solve: use `nks.root_find`.")
        base = split_state(self.preconditioner, operator, y, self.args).preconditioner
        like = operator.in_structure()
        cast = lambda rows: jtu.tree_map(lambda x, s: x.astype(s.dtype), rows, like)
        space = self.recycled
        inverse = SecantInverse(base, cast(space.search), cast(space.image), real)
        return KrylovState(operator, as_inverse(inverse, operator))

    def run(self, prepared: KrylovState, b: Vector, *, real: bool, transposed: bool) -> Vector:
        if self.refine == 0:
            x, matvecs = prepared.preconditioner.mv(b), 0
        else:
            solver = GMRES(restart=min(self.refine, _RESTART), max_steps=self.refine)
            norm = tree.norm2(b)
            out = solver.solve(
                prepared.system(real),
                b,
                tolerance=jnp.asarray(self.rtol).astype(norm.dtype) * norm,
                workspace=solver.workspace(tree.zeros_like(b), real=real),
                norm=norm,
            )
            # What is not finite has no approximation, and zero is not one.
            x = nan_where(out.result == lx.RESULTS.breakdown, out.value)
            matvecs = out.num_matvecs
        tell_approximation(
            self.report,
            prepared,
            b,
            x,
            estimate_steps=self.estimate_steps,
            num_matvecs=matvecs,
            real=real,
            transposed=transposed,
        )
        return x


class _Given(AbstractLinearMap):
    """An inverse with `mv` and `transpose_mv`, in the precision of the vectors."""

    inverse: Any

    def mv(self, vector: Vector) -> Vector:
        return tree.cast_like(self.inverse.mv(vector), vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        return tree.cast_like(self.inverse.transpose_mv(vector), vector)


class SecantInverse(AbstractLinearMap):
    """B = M⁻¹(I − C Cᴴ) + U Cᴴ, U and C stacked by rows; inner products are real where `real`."""

    base: lx.AbstractLinearOperator
    search: Vector
    image: Vector
    real: bool = eqx.field(static=True)

    def mv(self, vector: Vector) -> Vector:
        c = _products(self.image, vector, self.real)
        outside = tree.sub(vector, _combination(self.image, c))
        return tree.add(self.base.mv(outside), _combination(self.search, c))

    def transpose_mv(self, vector: Vector) -> Vector:
        w, rows = self.base.transpose().mv(vector), tree.conj(self.image)
        u = _products(tree.conj(self.search), vector, self.real)
        return tree.add(w, _combination(rows, u - _products(rows, w, self.real)))


def _products(rows: Vector, vector: Vector, real: bool) -> Any:
    """⟨rowᵢ, vector⟩."""
    single = jtu.tree_map(lambda x: x[None], vector)
    return gram(rows, single, real=real)[:, 0]


def _combination(rows: Vector, coefficients: Any) -> Vector:
    """Σᵢ cᵢ rowᵢ."""
    out = combined(rows, coefficients[:, None])
    return jtu.tree_map(lambda x: x[0], out)

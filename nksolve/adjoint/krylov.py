"""The exact adjoint: a Krylov solve with J or Jᵀ."""

from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx

from .. import tree
from ..krylov.base import AbstractKrylovSolver
from ..krylov.gcrodr import GCRODR
from ..krylov.lsmr import LSMR
from ..krylov.recycling import RecycledSpace
from ..krylov.system import KrylovState
from ..linearise.lower import working
from ..loops import any_lane
from ..newton.base import AbstractRootFinder
from ..newton.reuse import AbstractReuse
from ..typing import Args, LinearFn, Scalar, ScalarLike, Vector, Y
from .base import AbstractImplicitAdjoint, AbstractImplicitSolve, stop_gradient
from .failure import AbstractFailure, NaNOnFailure, RaiseOnFailure
from .report import Receiver, code_of, tell

ADVICE = (
    "The linear solve for a derivative of the root did not converge. Loosen "
    "`KrylovAdjoint(rtol=...)`, precondition the Krylov method, or use a longer `restart`; with "
    "`throw=False` or `failure=nks.NaNOnFailure()` the derivative is NaN instead, with "
    "`failure=nks.BestEffort()` it is what there is."
)


class KrylovAdjoint(AbstractImplicitAdjoint):
    """Implicit differentiation of F(y, θ) = 0 with a Krylov method, never n × n.

    Forward mode solves J ẏ = −(∂F/∂θ) θ̇; reverse mode solves Jᵀλ = ȳ with the transposed
    preconditioner M⁻ᵀ and returns −(∂F/∂θ)ᵀλ; both from one linearisation at the root. Works in
    `nks.root_find`, and in `optx.root_find` where it costs one evaluation of `fn`.

    **Arguments:**

    - `linear_solver`: the Krylov method, with its preconditioner; that of the forward solver by
      default.
    - `rtol`, `atol`: tolerances of that solve, ‖r‖ ≤ atol + rtol ‖rhs‖; by default the `rtol` of
      the nonlinear solver and 0. An `rtol` below the unit of round-off counts as that, and 0 as
      50 of them.
    - `reuse`: `nks.KeepLinearisation()` or `nks.Relinearise()`; the nonlinear solver's own by
      default.
    - `failure`: what a failed solve gives: `nks.RaiseOnFailure()`, `nks.NaNOnFailure()` or
      `nks.BestEffort()`. By default it raises where the verb has `throw=True`, and gives NaN
      otherwise.
    - `report`: `True` prints a line for each solve, a function gets its `nks.AdjointReport`; both
      are absent from the compiled program unless asked for.

    **The floor.** A solve that stagnates above its tolerance has not failed if its residual,
    computed anew, is at the rounding level of J x itself: at most

        50 ε ‖b‖ + 10 ‖J x − 3 J(x/3)‖,   and never above √ε ‖b‖

    where the second term measures how J x is rounded. It is then used and reported as `at_floor`.

    Work: one Krylov solve for a JVP or a VJP; two matvecs more after one that missed its tolerance,
    and with a `report`. Storage: a Krylov workspace of its own.
    """

    linear_solver: AbstractKrylovSolver | None = None
    rtol: ScalarLike | None = None
    atol: ScalarLike = 0.0
    reuse: AbstractReuse | None = None
    failure: AbstractFailure | None = None
    report: Receiver = eqx.field(static=True, default=None)

    def __check_init__(self):
        if isinstance(self.linear_solver, LSMR) and self.linear_solver.is_damped:
            raise ValueError(
                "`KrylovAdjoint(linear_solver=...)` solves equations, which a damped `LSMR` does "
                "not: take `nks.LSMR()` without `damp`."
            )

    def resolved(
        self, solver: Any, args: Args, tags: frozenset[object], *, throw: bool
    ) -> "KrylovSolve":
        linear_solver = self.linear_solver
        if linear_solver is None:
            if not isinstance(solver, AbstractRootFinder):
                raise ValueError(
                    "`KrylovAdjoint()` takes its Krylov method from the nonlinear solver, but "
                    f"{type(solver).__name__} has none: pass `linear_solver=nks.GMRES()`."
                )
            linear_solver = solver.linear_solver.for_derivatives()
        rtol = solver.rtol if self.rtol is None else self.rtol
        failure = self.failure
        if failure is None:
            failure = RaiseOnFailure() if throw else NaNOnFailure()
        solve = KrylovSolve(
            linear_solver=linear_solver,
            rtol=rtol,
            atol=self.atol,
            args=args,
            failure=failure,
            tags=tags,
            report=self.report,
        )
        return stop_gradient(solve)

    def tolerating(self, rtol: ScalarLike) -> "KrylovAdjoint":
        if self.rtol is not None:
            return self
        return eqx.tree_at(lambda a: a.rtol, self, rtol, is_leaf=lambda x: x is None)


class _Prepared(eqx.Module):
    """The Krylov method with its state at the root, and the space that it may start from."""

    linear_solver: AbstractKrylovSolver
    state: KrylovState
    space: RecycledSpace | None

    def transpose(self) -> "_Prepared":
        mirrored = None if self.space is None else self.space.transpose()
        return _Prepared(self.linear_solver, self.state.transpose(), mirrored)


class KrylovSolve(AbstractImplicitSolve):
    """J x = b by a Krylov method, to a tolerance or to the floor."""

    linear_solver: AbstractKrylovSolver
    rtol: ScalarLike
    atol: ScalarLike
    args: Args
    failure: AbstractFailure
    tags: frozenset[object] = eqx.field(static=True)
    report: Receiver = eqx.field(static=True, default=None)
    recycled: RecycledSpace | None = None

    def continuing(self, stats: dict[str, Any]) -> "KrylovSolve":
        """The same, starting from the space that a solve with `GCRODR` ended with."""
        space = stop_gradient(stats.get("recycled"))
        return eqx.tree_at(lambda s: s.recycled, self, space, is_leaf=lambda x: x is None)

    def prepare(self, operator: lx.AbstractLinearOperator, y: Y, *, real: bool) -> _Prepared:
        solved = working(operator)
        linear_solver = self.linear_solver.chosen(lambda: solved, y, self.args)
        linear_solver.check_operator(solved)
        state = linear_solver.prepare(operator, y, self.args)
        return _Prepared(linear_solver, state, self.recycled)

    def run(self, prepared: _Prepared, b: Vector, *, real: bool, transposed: bool) -> Vector:
        state, norm, results = prepared.state, tree.norm2(b), lx.RESULTS
        wanted = jnp.asarray(self.rtol).astype(norm.dtype)
        rtol = jnp.where(wanted > 0, jnp.maximum(wanted, tree.eps(b)), 50 * tree.eps(b))
        target = jnp.asarray(self.atol).astype(norm.dtype) + rtol * norm
        linear_solver = _starting(prepared.linear_solver, prepared.space, b, real)
        out = linear_solver.run(state, b, tolerance=target, real=real, verify=True)
        missed = out.result != results.successful
        mv = state.operator.mv if state.wide is None else state.wide.mv
        measure = lambda: measured(mv, b, out.value, norm)
        if self.report:
            residual, floor = measure()
        else:
            unknown = (jnp.full_like(norm, jnp.inf), jnp.zeros_like(norm))
            residual, floor = lax.cond(any_lane(missed), measure, lambda: unknown)
        at_floor = missed & (residual <= floor)
        failed = missed & ~(residual <= jnp.maximum(floor, target))
        result = results.where(missed & (residual <= target), results.successful, out.result)
        tell(
            self.report,
            transposed=transposed,
            residual_norm=residual,
            rhs_norm=norm,
            solution_norm=tree.norm2(out.value),
            num_matvecs=out.num_matvecs + out.num_transposed_matvecs + 2,
            code=code_of(result, at_floor),
        )
        return self.failure(out.value, failed, jnp.where(missed, residual, 0), ADVICE)


def measured(mv: LinearFn, b: Vector, x: Vector, norm: Scalar) -> tuple[Scalar, Scalar]:
    """(‖b − J x‖, the level at which rounding leaves it), by two matvecs at one site."""
    third = jnp.asarray(1 / 3).astype(norm.dtype)
    points = jtu.tree_map(lambda a, b: jnp.stack([a, b]), x, tree.scale(third, x))
    images = lax.map(mv, points)
    first, second = (jtu.tree_map(lambda a, i=i: a[i], images) for i in range(2))
    residual = tree.norm2(tree.sub(b, first))
    rounding = tree.norm2(tree.axpy(-3.0, second, first))
    eps = tree.eps(b)
    return residual, jnp.minimum(50 * eps * norm + 10 * rounding, eps**0.5 * norm)


def _starting(
    linear_solver: AbstractKrylovSolver, space: RecycledSpace | None, b: Vector, real: bool
) -> AbstractKrylovSolver:
    """The Krylov method with a space to start from, where it takes one and has none."""
    if not isinstance(linear_solver, GCRODR) or linear_solver.recycled is not None:
        return linear_solver
    fits = linear_solver.fits(space, b, real=real)
    return linear_solver.starting_from(space) if fits else linear_solver

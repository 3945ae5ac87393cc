"""Newton–Krylov for further roots: the step of a deflated residual from that of the plain one."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
from jaxtyping import PyTree

from .. import tree
from ..krylov.base import AbstractKrylovSolver
from ..linearise.linearisation import AbstractLinearisable, Linearisation, linearise
from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..linearise.policies import AbstractPolicy
from ..newton.base import AbstractWrapper
from ..newton.globalisation.base import AbstractGlobalisation, Judgement, Model, Trial
from ..newton.newton_krylov import NewtonKrylov
from ..newton.scaling.units import refusal
from ..newton.state import Direction, NewtonState
from ..results import REASONS
from ..typing import Args, Aux, Count, Flag, Fn, Scalar, Vector, Y
from .deflation import Deflation


class Deflated(AbstractWrapper):
    """Newton–Krylov for roots other than known ones, by linear solves with J alone.

    Newton's method for G = m F of `nks.deflate`. The step of G is a multiple of that of F: with
    J s_F = −F, s_G = τ s_F, τ = 1/(1 − (∇m/m)ᵀs_F) (Sherman and Morrison for m J + F ∇mᵀ), so that
    a step costs what one of F does, and the preconditioner is one for J. Line searches, forcing
    terms and the residual test are those of G: success is ‖G‖ ≤ atol + rtol ‖G(y₀)‖, and
    `residual_norm` is ‖G‖; with `shift` ≥ 1 ‖F‖ is no larger.

    **Arguments:**

    - `solver`: an `nks.NewtonKrylov` with a line search: `FullStep()`, or
      `Backtracking(growth=math.inf)`, which jumps over the poles at known roots where its default
      creeps up to them. With a trust region, whose step is no multiple of s_F, use
      `nks.deflate(fn, roots)`.
    - `roots`, `power`, `shift`, `scale`: as for `nks.deflate`.

    Derivatives are those of a root of F, whatever the known roots.

    Storage: that of the solver, the roots and 1 vector. Work of a step: that of the solver, and one
    distance for each root.

    Source: Farrell, Birkisson & Funke, SIAM J. Sci. Comput. 37(4), 2015, §3; Sherman & Morrison,
    Ann. Math. Statist. 21, 1950.
    """

    solver: NewtonKrylov
    deflation: Deflation

    def __init__(
        self,
        solver: NewtonKrylov,
        roots: Any,
        *,
        power: float = 2.0,
        shift: float = 1.0,
        scale: Any = 1.0,
    ):
        if not isinstance(solver, NewtonKrylov):
            raise TypeError(
                f"`Deflated` wraps an `nks.NewtonKrylov`, but got {solver!r}. Any other solver "
                "takes `nks.deflate(fn, roots)` as its residual."
            )
        if not solver.globalisation.is_line_search:
            raise ValueError(
                "`Deflated` scales the Newton direction, which needs a line search such as "
                f"`nks.Backtracking()`, but the solver has {solver.globalisation!r}. Solve "
                "`nks.deflate(fn, roots)` with that solver instead."
            )
        self.solver = solver
        self.deflation = Deflation(roots, power, shift, scale)

    @property
    def newton(self) -> NewtonKrylov:
        """Newton's method for G, given m J in place of its Jacobian."""
        turned = _Turned(self.solver.globalisation)
        return eqx.tree_at(lambda s: s.globalisation, self.solver, turned)

    def init(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: frozenset[object],
    ) -> NewtonState:
        fn = self._deflated(fn, args)
        return self.newton.init(fn, y, args, options, f_struct, aux_struct, tags)

    def step(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: NewtonState,
        tags: frozenset[object],
    ) -> tuple[Y, NewtonState, Aux]:
        return self.newton.step(self._deflated(fn, args), y, args, options, state, tags)

    def terminate(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: NewtonState,
        tags: frozenset[object],
    ) -> tuple[Flag, optx.RESULTS]:
        return self.newton.terminate(fn, y, args, options, state, tags)

    def postprocess(
        self,
        fn: Fn,
        y: Y,
        aux: Aux,
        args: Args,
        options: dict[str, Any],
        state: NewtonState,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        fn = self._deflated(fn, args)
        return self.newton.postprocess(fn, y, aux, args, options, state, tags, result)

    def _deflated(self, fn: Fn, args: Args) -> Fn:
        if not isinstance(fn, AbstractLinearisable):
            fn = _Bound(fn, args, self.policy)
        return _Deflating(fn, self.deflation)


class _Bound(AbstractLinearisable):
    """A plain residual with its args and the policy that linearises it."""

    fn: Fn
    args: Args
    policy: AbstractPolicy

    def linearise(self, y: Y, tags: frozenset[object]) -> Linearisation:
        target = lambda y, _: self.fn(y, self.args)
        return linearise(target, y, has_aux=True, policy=self.policy, tags=tags)


class _Deflating(AbstractLinearisable):
    """m F, whose operator is m J on F's one linearisation, with ∇m/m beside it."""

    fn: AbstractLinearisable
    deflation: Deflation

    def linearise(self, y: Y, tags: frozenset[object]) -> Linearisation:
        lin = self.fn.linearise(y, tags)
        at = self.deflation(eqx.filter(y, eqx.is_inexact_array))
        operator = lin.operator
        multiple = JacobianOperator(
            _Multiple(operator.linear_map, at.value, at.log_gradient),
            operator.in_structure(),
            operator.out_structure(),
            operator.tags - {lx.unit_diagonal_tag},
        )
        return Linearisation(at.times(lin.value), lin.aux, multiple, lin.joint)


class _Multiple(AbstractLinearMap):
    """v → m A v, m > 0."""

    linear_map: AbstractLinearMap
    factor: Scalar
    log_gradient: Vector

    @property
    def low(self) -> np.dtype | None:
        return self.linear_map.low

    def mv(self, vector: Vector) -> Vector:
        return tree.scale(self.factor, self.linear_map.mv(vector))

    def transpose_mv(self, vector: Vector) -> Vector:
        return tree.scale(self.factor, self.linear_map.transpose_mv(vector))


class _TurnedState(NamedTuple):
    """The state of the line search, and τ."""

    search: Any
    tau: Scalar


class _Turned(AbstractGlobalisation[_TurnedState]):
    """A line search along τ d, for the direction d of F."""

    search: AbstractGlobalisation

    def init(self, variables: Vector, norm: Scalar, workspace: PyTree) -> _TurnedState:
        return _TurnedState(self.search.init(variables, norm, workspace), jnp.ones_like(norm))

    def start(self, model: Model, state: _TurnedState) -> _TurnedState:
        direction = model.direction
        slope = direction.slope
        operator: Any = model.operator
        along = tree.vdot(operator.linear_map.log_gradient, direction.vector).real
        rest = 1 - along.astype(slope.dtype)
        # Where G has a singular Jacobian τ is held at a large number, and the search shortens it.
        least = jnp.finfo(slope.dtype).eps ** 0.5
        sign = jnp.where(rest < 0, -jnp.ones_like(rest), jnp.ones_like(rest))
        tau = 1 / jnp.where(jnp.abs(rest) < least, sign * least, rest)
        # GᵀJ_G(τ d)/‖G‖², −1 for an exact d.
        descent = -jnp.abs(tau * (slope + along.astype(slope.dtype)))
        turned = self._turned(tau, direction)
        turned = turned._replace(slope=jnp.where(descent < 0, descent, -jnp.ones_like(descent)))
        return _TurnedState(self.search.start(model._replace(direction=turned), state.search), tau)

    def displacement(self, state: _TurnedState, direction: Vector) -> Vector:
        return self.search.displacement(state.search, tree.scale(state.tau, direction))

    def step_length(self, state: _TurnedState) -> Scalar:
        return self.search.step_length(state.search)

    def held_length(self, state: _TurnedState) -> Scalar:
        return self.search.held_length(state.search)

    def linear_norm(self, state: _TurnedState, direction: Direction) -> Scalar:
        return self.search.linear_norm(state.search, self._turned(state.tau, direction))

    def judge(self, state: _TurnedState, trial: Trial) -> Judgement:
        turned = trial._replace(direction=tree.scale(state.tau, trial.direction))
        judged = self.search.judge(state.search, turned)
        return judged._replace(state=_TurnedState(judged.state, state.tau))

    def check(self, linear_solver: AbstractKrylovSolver) -> None:
        self.search.check(linear_solver)

    def failure(self, state: _TurnedState) -> REASONS:
        return self.search.failure(state.search)

    def products(self, state: _TurnedState) -> tuple[Count | int, Count | int]:
        return self.search.products(state.search)

    def _turned(self, tau: Scalar, direction: Direction) -> Direction:
        # G + J_G(τ d) = τ m (F + J d).
        residual = jnp.abs(tau) * direction.residual
        return direction._replace(vector=tree.scale(tau, direction.vector), residual=residual)


@refusal.register
def _(part: Deflated, congruent: bool) -> str:
    return (
        "distances to the known roots are in the units of the problem. Solve "
        "`nks.deflate(fn, roots, scale=...)` with the scaled solver."
    )

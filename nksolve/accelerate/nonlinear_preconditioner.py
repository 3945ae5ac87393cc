"""What a nonlinear preconditioner is: a few steps of another root finder."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import optimistix as optx

from .. import tree
from ..history import PerLeaf
from ..linearise.linearisation import AbstractLinearisable, Linearisation
from ..linearise.policies import AbstractPolicy
from ..newton.base import AbstractRootFinder
from ..newton.globalisation.feasible import Feasible
from ..newton.newton_krylov import NewtonKrylov
from ..newton.scaling.units import refusal
from ..newton.state import Counters, NewtonState
from ..results import REASONS
from ..typing import Args, Count, Fn, Vector, Y
from .base import AbstractIteration


class InnerWork(NamedTuple):
    """What the inner solver has done so far."""

    num_fn_evals: Count
    counters: Counters


class NonlinearPreconditioner(eqx.Module):
    """N(x): the point that `steps` steps of another root finder lead to from x.

    **Arguments:**

    - `inner`: `nks.Picard`, `nks.Anderson`, `nks.NGMRES`, `nks.Broyden`, `nks.FAS` or
      `nks.NewtonKrylov`. It begins anew at every x; its tolerances say when it stops before all its
      steps are made, so that 0 is a good choice. Where it fails it is left at its last point.
    - `steps`: how many.
    - `fn`: a residual of its own for the inner solver, `fn(y, args) -> f` like y: a cheaper model,
      the equations of one block with those of the others left out, or `g(y, args) − y` for a sweep
      g, of which `nks.Picard(0, 0)` makes y ← g(y). By default that of the outer solve.

    The point after the last step is not evaluated: `steps` evaluations, the one at x included (two
    a step for `nks.NGMRES`).

    Storage: that of the inner solver.
    """

    inner: AbstractRootFinder
    steps: int = eqx.field(static=True, default=1)
    fn: Callable[[Y, Args], Any] | None = None

    def __check_init__(self):
        if not isinstance(self.inner, NewtonKrylov | AbstractIteration):
            raise TypeError(
                "`NonlinearPreconditioner(inner)` makes steps of one of nksolve's own iterations: "
                "`Picard`, `Anderson`, `NGMRES`, `Broyden`, `BadBroyden`, `FAS` or `NewtonKrylov`; "
                f"got {self.inner!r}. A sweep of your own is `fn=lambda y, args: g(y, args) - y` "
                "with `inner=nks.Picard(0, 0)`."
            )
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, but it is {self.steps}.")

    def apply(
        self, fn: Fn, y: Y, args: Args, tags: frozenset[object], policy: AbstractPolicy
    ) -> tuple[Vector, InnerWork]:
        """N(y), and the work that it took; `policy` is that of the outer solve."""
        variables, static = eqx.partition(y, eqx.is_inexact_array)
        inner: Any = self.inner
        if self.fn is None:
            fn = _without_aux(fn)
            inner = eqx.tree_at(lambda s: s.policy, inner, policy)
        else:
            own, tags = self.fn, frozenset()
            fn = lambda y, args: (own(y, args), None)
        state = inner.init(fn, y, args, {}, tree.structure(variables), None, tags)
        carry, rest = eqx.partition((variables, state), eqx.is_array)

        def body(_, carry):
            variables, state = eqx.combine(carry, rest)
            y, state, _ = inner.step(fn, eqx.combine(variables, static), args, {}, state, tags)
            point = eqx.filter(y, eqx.is_inexact_array)
            return eqx.filter((point, state), eqx.is_array)

        # A number of trips that is known can be linearised once.
        carry = lax.fori_loop(0, self.steps, body, carry) if self.steps > 1 else body(0, carry)
        variables, state = eqx.combine(carry, rest)
        last = eqx.combine(variables, static)
        _, _, stats = inner.postprocess(
            fn, last, None, args, {}, state, tags, optx.RESULTS.successful
        )
        counters = Counters(*(jnp.asarray(stats[k], jnp.int32) for k in Counters._fields))
        work = InnerWork(jnp.asarray(stats["num_fn_evals"], jnp.int32), counters)
        return _next_point(inner, variables, state), work


def _next_point(solver: Any, variables: Vector, state: Any) -> Vector:
    """Where the next step of a solver would be tried."""
    if isinstance(state, NewtonState):
        return tree.add(variables, displacement(solver, state))
    return tree.where(state.reason == REASONS.iterating, state.proposed, variables)


def displacement(solver: NewtonKrylov, state: NewtonState) -> Vector:
    """The step that Newton's method tries next."""
    step = solver.globalisation.displacement(state.search, state.direction.vector)
    return tree.where(state.reason == REASONS.iterating, step, tree.zeros_like(step))


def check_around(name: str, solver: Any, preconditioner: Any) -> None:
    """Raises where a nonlinear preconditioner cannot stand inside of a solver."""
    if not isinstance(solver, NewtonKrylov):
        raise TypeError(f"`{name}` wraps an `nks.NewtonKrylov`, but got {solver!r}.")
    if not isinstance(preconditioner, NonlinearPreconditioner):
        raise TypeError(
            f"`{name}` takes an `nks.NonlinearPreconditioner(inner)`, but got {preconditioner!r}."
        )
    if isinstance(solver.history_length, PerLeaf):
        raise ValueError(
            f"`{name}` records ‖F‖ alone: give its solver an integer `history_length`, not "
            "`nks.PerLeaf`."
        )
    inner = getattr(preconditioner.inner, "globalisation", None)
    if isinstance(solver.globalisation, Feasible) and not isinstance(inner, Feasible):
        raise ValueError(
            f"`{name}` with `Feasible`: the points of the inner solver know no bounds. Give it "
            "some too, `nks.NewtonKrylov(globalisation=nks.Feasible(...))`, or solve without a "
            "nonlinear preconditioner."
        )


class _WithoutAux(AbstractLinearisable):
    """A residual without its aux."""

    fn: AbstractLinearisable

    def linearise(self, y: Y, tags: frozenset[object]) -> Linearisation:
        lin = self.fn.linearise(y, tags)
        return eqx.tree_at(lambda x: x.aux, lin, None, is_leaf=lambda x: x is None)


def _without_aux(fn: Fn) -> Fn:
    if isinstance(fn, AbstractLinearisable):
        return _WithoutAux(fn)
    return lambda y, args: (fn(y, args)[0], None)


@refusal.register
def _(part: NonlinearPreconditioner, congruent: bool) -> str | None:
    if part.fn is None:
        return None
    return "its own residual is in the units of the problem. Scale the problem itself."

"""For someone who does not know: one attempt after the other, in one program."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Int, PyTree

from .. import tree
from ..history import PerLeaf
from ..krylov.base import AbstractKrylovSolver, check_tolerances
from ..krylov.gmres import GMRES
from ..linearise.policies import AbstractPolicy, Linearise
from ..loops import AbstractProgressMeter, NoProgressMeter
from ..results import REASONS, code, is_success
from ..typing import Args, Aux, Count, Flag, Fn, Norm, ScalarLike, Vector, Y
from .base import AbstractRootFinder
from .convergence import AbstractConvergenceTest, ResidualTest
from .forcing import AbstractForcing, ConstantForcing
from .globalisation.base import AbstractGlobalisation
from .globalisation.line_search import Backtracking, FullStep
from .globalisation.non_monotone import NonMonotone
from .globalisation.pseudo_transient import PseudoTransient
from .globalisation.relay import Relay, RelayForcing, RelayState, chosen
from .globalisation.trust_region import Dogleg
from .newton_krylov import NewtonKrylov
from .report import StepReport
from .state import Direction, NewtonState
from .tightened import Tightened


class Past(NamedTuple):
    """What a start may be taken from.

    **Attributes:**

    - `initial`: y₀.
    - `best`: the point of least ‖F‖₂ so far.
    - `last`: where the attempt before ended.
    - `direction`: its last direction.
    """

    initial: Vector
    best: Vector
    last: Vector
    direction: Vector


class AbstractStart(eqx.Module):
    """Where an attempt begins."""

    @abc.abstractmethod
    def point(self, past: Past) -> Vector:
        """Its first point."""


class FromInitial(AbstractStart):
    """y₀ again."""

    def point(self, past: Past) -> Vector:
        return past.initial


class FromBest(AbstractStart):
    """The point of least ‖F‖₂ that was seen."""

    def point(self, past: Past) -> Vector:
        return past.best


class Along(AbstractStart):
    """y + length · d: along the direction in which the attempt before failed.

    **Arguments:**

    - `length`: 1 is the full Newton step, which a line search refused.
    """

    length: float = 1.0

    def point(self, past: Past) -> Vector:
        return tree.axpy(self.length, past.direction, past.last)


class Attempt(eqx.Module):
    """A globalisation and a forcing term, from a start, for at most so many trials."""

    globalisation: AbstractGlobalisation
    forcing: AbstractForcing = Tightened()
    start: AbstractStart = FromBest()
    max_trials: int = eqx.field(static=True, default=50)

    def __check_init__(self):
        if self.max_trials < 1:
            raise ValueError(f"`max_trials` must be at least 1, but it is {self.max_trials}.")


_EXACT = ConstantForcing(1e-8)

ATTEMPTS = (
    Attempt(Backtracking(), Tightened(), FromInitial(), 40),
    Attempt(NonMonotone(), _EXACT, FromInitial(), 110),
    Attempt(Dogleg(), _EXACT, FromBest(), 30),
    Attempt(PseudoTransient(0.1), _EXACT, FromInitial(), 40),
    Attempt(FullStep(), _EXACT, FromInitial(), 40),
    Attempt(Backtracking(), _EXACT, Along(1.0), 40),
    Attempt(FullStep(), _EXACT, Along(-1.0), 40),
)


class RobustState(NamedTuple):
    """The Newton iteration, and which attempt it is making."""

    inner: NewtonState
    initial: Vector
    attempt: Count
    trials: Count  # of this attempt
    reasons: Int[Array, " attempts"]  # why each ended


class Robust(AbstractRootFinder):
    """Attempts at a root by different globalisations, until one succeeds: the choice of someone who
    does not know.

    By default: Newton's method with a line search; with tight linear solves and a line search that
    lets ‖F‖ grow; a dogleg trust region from the best point; pseudo-transient continuation; full
    Newton steps; and both kinds of steps from points along the direction that failed. The attempts
    are stages of one iteration, so that the program holds one linearisation and one Krylov method
    whatever their number; a hand-over costs one evaluation of `fn`. Success is that of the residual
    test at the returned point, as for `nks.NewtonKrylov`; on failure the point of least ‖F‖₂ among
    all that were evaluated is returned.

    **Arguments:**

    - `rtol`, `atol`, `norm`, `linear_solver`, `policy`, `step_tol`, `history_length`,
      `progress_meter`, `verbose`: as for `nks.NewtonKrylov`.
    - `convergence`: the same; full steps may go far before they come back, so that an attempt has
      diverged only at 1e12 times the first ‖F‖.
    - `attempts`: `nks.Attempt`s in their order. Each ends by success, by a failure, or after its
      `max_trials`; the last one is limited by `max_steps` of the solve alone.

    `stats` has, beyond those of `nks.NewtonKrylov`, `num_attempts` and `attempt_reasons`, an
    integer for each attempt that says why it ended (`nks.reason_name`; `iterating` for those that
    were not made). The history shows the same, trial by trial.

    Storage: that of `nks.NewtonKrylov`, of all globalisations, and one vector. Work of a trial:
    that of the globalisation at work.
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Norm = tree.norm2
    linear_solver: AbstractKrylovSolver = GMRES()
    attempts: tuple[Attempt, ...] = ATTEMPTS
    convergence: AbstractConvergenceTest = ResidualTest(divergence=1e12)
    policy: AbstractPolicy = Linearise()
    step_tol: float | None = None
    history_length: int | PerLeaf = eqx.field(static=True, default=0)
    progress_meter: AbstractProgressMeter = NoProgressMeter()
    verbose: bool | Callable[[StepReport], None] = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        if not self.attempts or not all(isinstance(a, Attempt) for a in self.attempts):
            raise TypeError("`attempts` must be a tuple of one or more `nks.Attempt`s.")
        assert self.newton is not None  # whose parts are checked as it is made

    @property
    def newton(self) -> NewtonKrylov:
        """The iteration of which the attempts are stages."""
        return NewtonKrylov(
            self.rtol,
            self.atol,
            norm=self.norm,
            linear_solver=self.linear_solver,
            forcing=RelayForcing(tuple(a.forcing for a in self.attempts)),
            globalisation=Relay(tuple(a.globalisation for a in self.attempts)),
            convergence=self.convergence,
            policy=self.policy,
            step_tol=self.step_tol,
            history_length=self.history_length,
            progress_meter=self.progress_meter,
            verbose=self.verbose,
        )

    def init(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: frozenset[object],
    ) -> RobustState:
        inner = self.newton.init(fn, y, args, options, f_struct, aux_struct, tags)
        none = jnp.zeros((), jnp.int32)
        reasons = jnp.full((len(self.attempts),), code(REASONS.iterating), jnp.int32)
        return RobustState(inner, eqx.filter(y, eqx.is_inexact_array), none, none, reasons)

    def step(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: RobustState,
        tags: frozenset[object],
    ) -> tuple[Y, RobustState, Aux]:
        """A trial of the attempt; where that has failed, the next one is to begin."""
        running = state.inner.reason == REASONS.iterating
        y, inner, aux = self.newton.step(fn, y, args, options, state.inner, tags)
        trials = state.trials + tree.count(running)
        limits = jnp.asarray([a.max_trials for a in self.attempts], jnp.int32)
        stopped = inner.reason != REASONS.iterating
        is_last = state.attempt == len(self.attempts) - 1
        # The first of an attempt's points is no trial.
        spent = running & ~stopped & (trials > limits[state.attempt]) & ~is_last
        ended = running & (stopped | spent)
        handing = ended & ~is_last & ~is_success(inner.reason)
        why = jnp.where(spent, code(REASONS.max_steps), code(inner.reason)).astype(jnp.int32)
        reasons = jnp.where(ended, state.reasons.at[state.attempt].set(why), state.reasons)
        if inner.history is not None:
            history = inner.history.ended(state.inner.trial, spent, REASONS.max_steps)
            inner = inner._replace(history=history)
        following = jnp.where(handing, state.attempt + 1, state.attempt)

        variables, static = eqx.partition(y, eqx.is_inexact_array)
        past = Past(state.initial, inner.best.point, variables, inner.direction.vector)
        point = chosen(following, [a.start.point(past) for a in self.attempts])
        variables = tree.where(handing, point, variables)
        y = eqx.combine(variables, static)
        # A search from there: bounds take the point inside.
        fresh = self.newton.begun_search(fn, y, args, inner.workspace, tags)
        inner = tree.where(handing, self._begun(inner, fresh, following), inner)
        trials = jnp.where(handing, jnp.zeros_like(trials), trials)
        new = RobustState(inner, state.initial, following, trials, reasons)
        return y, new, aux

    def terminate(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: RobustState,
        tags: frozenset[object],
    ) -> tuple[Flag, optx.RESULTS]:
        return self.newton.terminate(fn, y, args, options, state.inner, tags)

    def postprocess(
        self,
        fn: Fn,
        y: Y,
        aux: Aux,
        args: Args,
        options: dict[str, Any],
        state: RobustState,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        y, aux, stats = self.newton.postprocess(
            fn, y, aux, args, options, state.inner, tags, result
        )
        made = {"num_attempts": state.attempt + 1, "attempt_reasons": state.reasons}
        return y, aux, stats | made

    def _begun(self, inner: NewtonState, fresh: RelayState, attempt: Count) -> NewtonState:
        """The iteration before the first point of an attempt: what it knows of directions and
        norms is forgotten, what it has counted and the best point are not."""
        vector, one = tree.zeros_like(inner.direction.vector), jnp.ones_like(inner.norm)
        search: RelayState = inner.search
        terms: RelayState = inner.forcing
        return inner._replace(
            direction=Direction(vector, -one, one, 0 * one),
            search=search.handed(fresh, attempt),
            norm=jnp.full_like(inner.norm, jnp.inf),
            steps_since_best=jnp.zeros_like(inner.steps_since_best),
            forcing=terms.handed(self.newton.forcing.init(one.dtype), attempt),
            reason=REASONS.iterating,
        )

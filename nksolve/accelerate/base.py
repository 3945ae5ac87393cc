"""What iterations that propose a point, try it and go on from it have in common."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from equinox import AbstractVar
from jaxtyping import PyTree

from .. import tree
from ..history import History, PerLeaf
from ..linearise.linearisation import AbstractLinearisable, Linearisation, linearise
from ..loops import AbstractProgressMeter
from ..newton.base import AbstractRootFinder, check_square
from ..newton.convergence import AbstractConvergenceTest, Standing, is_finite
from ..newton.report import StepReport, told
from ..newton.reuse import KeepLinearisation
from ..newton.state import Best, Counters
from ..results import REASONS, first_of, is_success, to_optimistix
from ..typing import Args, Aux, Count, Flag, Fn, Scalar, Vector, Y

#: Most halvings of a step that led to a residual with NaN or infinities.
MAX_HALVINGS = 10


class Trial(NamedTuple):
    """The point at hand. What is not used of its linearisation is never computed."""

    point: Vector
    linearisation: Linearisation
    accepted: Flag  # its residual is finite, and the lane goes on from it
    linearise: Callable[[Vector], Linearisation]  # at another point
    args: Args
    static: PyTree  # the leaves of y that are no unknowns


class Work(NamedTuple):
    """Work of a proposal beyond the evaluation at the trial point."""

    num_fn_evals: Count | int = 0
    num_linearisations: Count | int = 0
    num_matvecs: Count | int = 0
    num_probes: Count | int = 0


class Beside(NamedTuple):
    """A point that was evaluated to make a proposal."""

    point: Vector
    value: Vector
    aux: Aux


class Proposal(NamedTuple):
    """The point to try next."""

    point: Vector
    memory: PyTree
    work: Work = Work()
    refused: Flag | bool = False  # the trial is not gone on from, though it is finite
    beside: Beside | None = None


class IterationState(NamedTuple):
    """The state of a solve."""

    trial: Count  # points so far, the initial one included
    proposed: Vector
    best: Best
    initial_norm: Scalar
    steps_since_best: Count
    halvings: Count  # in a row
    memory: PyTree
    reason: REASONS
    num_fn_evals: Count
    counters: Counters
    history: History | None
    meter: PyTree


class AbstractIteration(AbstractRootFinder):
    """y₀, y₁, …: each point is proposed from the residuals at those before it.

    Every proposed point with a finite residual is accepted, unless the method refuses it. After a
    residual with NaN or infinities the step is halved, at most ten times in a row. Success is
    ‖F‖ ≤ atol + rtol ‖F₀‖ at the returned point; on failure the point of least ‖F‖₂ among those
    proposed, and those that a method evaluates beside them, is returned, with the reason.

    Laws for subclasses: `propose` takes nothing from a trial that is not accepted, and for a lane
    that has stopped it may return anything.
    """

    convergence: AbstractVar[AbstractConvergenceTest]
    history_length: AbstractVar[int | PerLeaf]
    progress_meter: AbstractVar[AbstractProgressMeter]
    verbose: AbstractVar[bool | Callable[[StepReport], None]]

    @abc.abstractmethod
    def memory(self, variables: Vector) -> PyTree:
        """What is remembered of the points before the first."""

    @abc.abstractmethod
    def propose(self, memory: PyTree, trial: Trial, wanted: Flag) -> Proposal:
        """The next point; not `wanted` where the trial stops the lane."""

    @abc.abstractmethod
    def report(self, memory: PyTree) -> dict[str, Any]:
        """Entries for `stats`."""

    def init(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: frozenset[object],
    ) -> IterationState:
        name = type(self).__name__
        if options:
            raise ValueError(f"`{name}` takes no options, but got {sorted(options)}.")
        variables = eqx.filter(y, eqx.is_inexact_array)
        check_square(tree.structure(variables), f_struct)
        infinite = jnp.full((), jnp.inf, tree.real_dtype(variables))
        none = jnp.zeros((), jnp.int32)
        return IterationState(
            trial=none,
            proposed=variables,
            best=Best(variables, infinite, jnp.nan * infinite, tree.zeros_like(aux_struct)),
            initial_norm=infinite,
            steps_since_best=none,
            halvings=none,
            memory=self.memory(variables),
            reason=REASONS.iterating,
            num_fn_evals=none,
            counters=Counters(*(none for _ in Counters._fields)),
            history=(
                History.empty(self.history_length, infinite.dtype, f_struct)
                if self.history_length
                else None
            ),
            meter=self.progress_meter.init(),
        )

    def step(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: IterationState,
        tags: frozenset[object],
    ) -> tuple[Y, IterationState, Aux]:
        """Judges the point that was proposed; if it is no root, proposes the next."""
        running = state.reason == REASONS.iterating
        variables, static = eqx.partition(y, eqx.is_inexact_array)
        trial = tree.where(running, state.proposed, variables)

        def at(point):
            return self._linearise(fn, eqx.combine(point, static), args, tags)

        lin = at(trial)
        norm, test_norm = tree.norm2(lin.value), self.norm(lin.value)
        is_first = state.trial == 0
        finite = is_finite(trial, norm, test_norm)
        accepted, refused = running & finite, running & ~finite
        halvings = jnp.where(finite, 0, state.halvings + 1)
        least = accepted & (norm < state.best.norm)
        since_best = jnp.where(least, 0, state.steps_since_best + tree.count(accepted))
        initial_norm = jnp.where(is_first, test_norm, state.initial_norm)
        atol = jnp.asarray(self.atol).astype(norm.dtype)
        target = self.target(initial_norm)
        stop, reason = self.convergence(Standing(test_norm, initial_norm, atol, target, since_best))
        reason = first_of(
            (~running, state.reason),
            (refused & (is_first | (halvings > MAX_HALVINGS)), REASONS.nonfinite),
            (accepted & stop, reason),
            otherwise=REASONS.iterating,
        )
        wanted = accepted & ~stop
        next_point = self.propose(
            state.memory, Trial(trial, lin, accepted, at, args, static), wanted
        )
        kept = accepted & ~jnp.asarray(next_point.refused)
        improved = least | (accepted & stop & is_success(reason))
        best = tree.where(improved, Best(trial, norm, test_norm, lin.aux), state.best)
        best = self._or_beside(best, next_point.beside, wanted)
        halfway = tree.axpy(0.5, tree.sub(trial, variables), variables)
        new = IterationState(
            trial=state.trial + 1,
            proposed=tree.where(wanted, next_point.point, tree.where(refused, halfway, trial)),
            best=best,
            initial_norm=initial_norm,
            steps_since_best=since_best,
            halvings=halvings,
            memory=next_point.memory,
            reason=reason,
            num_fn_evals=(
                state.num_fn_evals
                + tree.count(running)
                + next_point.work.num_fn_evals * tree.count(wanted)
            ),
            counters=self._counted(state, running, kept, wanted, next_point.work),
            history=state.history,
            meter=state.meter,
        )
        row = {
            "norm": test_norm,
            "eta": jnp.full_like(norm, jnp.nan),
            "num_matvecs": jnp.zeros((), jnp.int32),
            "step_length": jnp.where(is_first, 0, jnp.exp2(-state.halvings.astype(norm.dtype))),
            "accepted": kept,
        }
        new = told(self, state, new, running, row, lin.value)
        return eqx.combine(tree.where(kept, trial, variables), static), new, new.best.aux

    def terminate(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: IterationState,
        tags: frozenset[object],
    ) -> tuple[Flag, optx.RESULTS]:
        return jnp.asarray(state.reason != REASONS.iterating), to_optimistix(state.reason)

    def postprocess(
        self,
        fn: Fn,
        y: Y,
        aux: Aux,
        args: Args,
        options: dict[str, Any],
        state: IterationState,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        self.progress_meter.close(state.meter)
        counters = state.counters
        evals = self.policy.evals_per_matvec * (counters.num_matvecs + counters.num_probes)
        exhausted = state.reason == REASONS.iterating
        stats = {
            **counters._asdict(),
            "num_fn_evals": state.num_fn_evals + evals,
            "residual_norm": state.best.test_norm,
            "initial_residual_norm": state.initial_norm,
            "reason": REASONS.where(exhausted, REASONS.max_steps, state.reason),
            **self.report(state.memory),
        }
        if state.history is not None:
            stats["history"] = state.history
        static = eqx.filter(y, eqx.is_inexact_array, inverse=True)
        return eqx.combine(state.best.point, static), state.best.aux, stats

    def target(self, initial_norm: Scalar) -> Scalar:
        """atol + rtol ‖F₀‖."""
        atol = jnp.asarray(self.atol).astype(initial_norm.dtype)
        return atol + jnp.asarray(self.rtol).astype(initial_norm.dtype) * initial_norm

    def _or_beside(self, best: Best, beside: Beside | None, wanted: Flag) -> Best:
        """The better of two points, of which the second is there where `wanted`."""
        if beside is None:
            return best
        norm, test_norm = tree.norm2(beside.value), self.norm(beside.value)
        better = wanted & is_finite(beside.point, norm, test_norm) & (norm < best.norm)
        return tree.where(better, Best(beside.point, norm, test_norm, beside.aux), best)

    def _counted(
        self, state: IterationState, running: Flag, kept: Flag, wanted: Flag, work: Work
    ) -> Counters:
        old, stepped, added = state.counters, running & (state.trial > 0), tree.count(wanted)
        # One that keeps its linearisations makes one at each trial point.
        linearised = tree.count(running) if isinstance(self.reuse, KeepLinearisation) else 0
        return old._replace(
            num_steps=old.num_steps + tree.count(stepped & kept),
            num_rejected_steps=old.num_rejected_steps + tree.count(stepped & ~kept),
            num_linearisations=(
                old.num_linearisations + linearised + work.num_linearisations * added
            ),
            num_matvecs=old.num_matvecs + work.num_matvecs * added,
            num_probes=old.num_probes + work.num_probes * added,
        )

    def _linearise(self, fn: Fn, y: Y, args: Args, tags: frozenset[object]) -> Linearisation:
        # Only the derivative with respect to y is wanted: args are closed over.
        target = fn if isinstance(fn, AbstractLinearisable) else lambda y, _: fn(y, args)
        return linearise(target, y, has_aux=True, policy=self.policy, tags=tags)

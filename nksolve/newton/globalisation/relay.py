"""Several globalisations and forcing terms in one program, of which one at a time is at work."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ... import tree
from ...krylov.base import AbstractKrylovSolver
from ...results import REASONS
from ...typing import Count, Scalar, Vector
from ..forcing import AbstractForcing, Progress
from ..state import Direction
from .base import AbstractGlobalisation, Judgement, Linear, Model, Shift, Trial


class RelayState(NamedTuple):
    """Whose turn it is, and the states of all."""

    turn: Count
    members: tuple[PyTree, ...]

    def handed(self, fresh: "RelayState", to: Count) -> "RelayState":
        """With the turn of another member, which begins as in `fresh`."""
        members = tuple(
            tree.where(to == k, new, old)
            for k, (new, old) in enumerate(zip(fresh.members, self.members, strict=True))
        )
        return RelayState(to, members)


class Relay(AbstractGlobalisation[RelayState]):
    """The globalisation of whose turn it is; who hands over sets `turn` in the state."""

    members: tuple[AbstractGlobalisation, ...]

    def init(self, variables: Vector, norm: Scalar, workspace: PyTree) -> RelayState:
        states = tuple(m.init(variables, norm, workspace) for m in self.members)
        return RelayState(jnp.zeros((), jnp.int32), states)

    def remember(self, state: RelayState, linear: Callable[[], Linear]) -> RelayState:
        return self._each(state, lambda _, m, s: m.remember(s, linear))

    def start(self, model: Model, state: RelayState) -> RelayState:
        def one(k, member, old):
            mine = state.turn == k
            new = member.start(model._replace(wanted=model.wanted & mine), old)
            return tree.where(mine, new, old)

        return self._each(state, one)

    def displacement(self, state: RelayState, direction: Vector) -> Vector:
        return self._of_turn(state, lambda m, s: m.displacement(s, direction))

    def step_length(self, state: RelayState) -> Scalar:
        return self._of_turn(state, lambda m, s: m.step_length(s))

    def held_length(self, state: RelayState) -> Scalar:
        return self._of_turn(state, lambda m, s: m.held_length(s))

    def linear_norm(self, state: RelayState, direction: Direction) -> Scalar:
        return self._of_turn(state, lambda m, s: m.linear_norm(s, direction))

    def judge(self, state: RelayState, trial: Trial) -> Judgement:
        judged = [
            m.judge(s, trial._replace(running=trial.running & (state.turn == k)))
            for k, (m, s) in enumerate(zip(self.members, state.members, strict=True))
        ]
        accepted = chosen(state.turn, [j.accepted for j in judged])
        failed = chosen(state.turn, [j.failed for j in judged])
        after = self._each(
            state, lambda k, _, old: tree.where(state.turn == k, judged[k].state, old)
        )
        return Judgement(accepted, failed, after)

    def check(self, linear_solver: AbstractKrylovSolver) -> None:
        for member in self.members:
            member.check(linear_solver)
        if sum(member.shift(None) is not None for member in self.members) > 1:
            raise ValueError(
                "At most one of several globalisations can add to J, as `PseudoTransient` does: "
                "take `nks.Dogleg()` or a line search, such as `nks.NonMonotone()`, for the others."
            )

    def shift(self, state: RelayState | None) -> Shift | None:
        states = [None] * len(self.members) if state is None else state.members
        shifts = [m.shift(s) for m, s in zip(self.members, states, strict=True)]
        for k, shift in enumerate(shifts):
            if shift is not None:
                if state is None:
                    return shift
                factor = jnp.where(state.turn == k, shift.factor, jnp.zeros_like(shift.factor))
                return Shift(factor, shift.mass)
        return None

    @property
    def needs_transpose(self) -> bool:
        return any(member.needs_transpose for member in self.members)

    def failure(self, state: RelayState) -> REASONS:
        reasons = [m.failure(s) for m, s in zip(self.members, state.members, strict=True)]
        reason = reasons[0]
        for k, other in enumerate(reasons[1:], 1):
            reason = REASONS.where(state.turn == k, other, reason)
        return reason

    def products(self, state: RelayState) -> tuple[Count, Count]:
        made = [m.products(s) for m, s in zip(self.members, state.members, strict=True)]
        forward, transposed = zip(*made, strict=True)
        count = lambda values: chosen(state.turn, [jnp.asarray(v, jnp.int32) for v in values])
        return count(forward), count(transposed)

    def work(self, state: RelayState) -> tuple[Count, Count, Count]:
        made = [m.work(s) for m, s in zip(self.members, state.members, strict=True)]
        count = lambda values: chosen(state.turn, [jnp.asarray(v, jnp.int32) for v in values])
        matvecs, transposed, applications = zip(*made, strict=True)
        return count(matvecs), count(transposed), count(applications)

    def _each(self, state, fn):
        pairs = zip(self.members, state.members, strict=True)
        return state._replace(members=tuple(fn(k, m, s) for k, (m, s) in enumerate(pairs)))

    def _of_turn(self, state, fn):
        return chosen(
            state.turn, [fn(m, s) for m, s in zip(self.members, state.members, strict=True)]
        )


class RelayForcing(AbstractForcing[RelayState]):
    """The forcing term of whose turn it is."""

    members: tuple[AbstractForcing, ...]

    def init(self, dtype: np.dtype) -> RelayState:
        return RelayState(jnp.zeros((), jnp.int32), tuple(m.init(dtype) for m in self.members))

    def eta(self, progress: Progress, state: RelayState) -> tuple[Scalar, RelayState]:
        made = [m.eta(progress, s) for m, s in zip(self.members, state.members, strict=True)]
        states = tuple(
            tree.where(state.turn == k, new, old)
            for k, ((_, new), old) in enumerate(zip(made, state.members, strict=True))
        )
        return chosen(state.turn, [eta for eta, _ in made]), RelayState(state.turn, states)


def chosen(turn: Count, values: Sequence[PyTree]) -> PyTree:
    """The value of whose turn it is."""
    value = values[0]
    for k, other in enumerate(values[1:], 1):
        value = tree.where(turn == k, other, value)
    return value

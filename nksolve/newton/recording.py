"""Intermediate iterates of a solve, for losses on the trajectory."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import PyTree

from ..typing import Args, Aux, Count, Flag, Fn, Y
from .base import AbstractRootFinder, AbstractWrapper


class RecordedState(NamedTuple):
    """The state of the solver, and the points recorded so far."""

    inner: PyTree
    trial: Count
    iterates: PyTree


class Recorded(AbstractWrapper):
    """A solver whose iterates after given trials are put in `stats["iterates"]`.

    They are the accepted points after these trials (the last, where the solve stopped before),
    stacked along a new first axis, without a derivative.

    **Arguments:**

    - `solver`: any of nksolve's root finders.
    - `trials`: increasing numbers of trials after the initial point; 0 is the initial point.

    Storage: one vector for each trial recorded.
    """

    solver: AbstractRootFinder
    trials: tuple[int, ...] = eqx.field(static=True)

    def __check_init__(self):
        if not isinstance(self.solver, AbstractRootFinder):
            raise TypeError(f"`Recorded` wraps nksolve's solvers, but got {self.solver!r}.")
        if list(self.trials) != sorted(set(self.trials)) or any(t < 0 for t in self.trials):
            raise ValueError(f"`trials` must be increasing and not negative: {self.trials}.")

    def init(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: frozenset[object],
    ) -> RecordedState:
        variables = eqx.filter(y, eqx.is_inexact_array)
        iterates = jtu.tree_map(lambda x: jnp.stack([x] * len(self.trials)), variables)
        inner = self.solver.init(fn, y, args, options, f_struct, aux_struct, tags)
        return RecordedState(inner, jnp.zeros((), jnp.int32), iterates)

    def step(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: RecordedState,
        tags: frozenset[object],
    ) -> tuple[Y, RecordedState, Aux]:
        """A step of the solver; every row that is still to come holds the point at hand."""
        y, inner, aux = self.solver.step(fn, y, args, options, state.inner, tags)
        trials = jnp.asarray(self.trials, jnp.int32)
        point = eqx.filter(y, eqx.is_inexact_array)

        def recorded(rows, x):
            to_come = (trials >= state.trial).reshape(-1, *([1] * x.ndim))
            return jnp.where(to_come, x, rows)

        iterates = jtu.tree_map(recorded, state.iterates, point)
        return y, RecordedState(inner, state.trial + 1, iterates), aux

    def terminate(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: RecordedState,
        tags: frozenset[object],
    ) -> tuple[Flag, optx.RESULTS]:
        return self.solver.terminate(fn, y, args, options, state.inner, tags)

    def postprocess(
        self,
        fn: Fn,
        y: Y,
        aux: Aux,
        args: Args,
        options: dict[str, Any],
        state: RecordedState,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        y, aux, stats = self.solver.postprocess(
            fn, y, aux, args, options, state.inner, tags, result
        )
        return y, aux, {**stats, "iterates": state.iterates}

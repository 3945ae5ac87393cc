"""The training step of `python -m benchmarks --layers` in JAX, shared by all contenders there."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .layers_cells import Cell
from .layers_timing import Prepared, Step, Units, Variant

# solve(V, injection, (forward, backward), units) -> z, differentiable in V and the injection.
Solve = Callable[[Any, Any, tuple[Any, Any], Units], Any]


def cell(z: Any, args: tuple[Any, Any]) -> Any:
    """tanh(z V + injection), for a batch or one sample."""
    V, injection = args
    return jnp.tanh(z @ V + injection)


def variant(label: str, solve: Solve) -> Variant:
    """A training step that solves so."""

    def prepare(known: Cell, units: Units, dtype: str) -> Prepared:
        names = ("V", "U", "b", "x", "c")
        arrays = [jnp.asarray(getattr(known, name), dtype) for name in names]
        tolerances = jnp.ones((2,), dtype)

        def train(V, U, b, x, c, tolerances):
            pair = tolerances[0], tolerances[1]
            injection = x @ U + b[None, :]
            z, pull = jax.vjp(lambda V, i: solve(V, i, pair, units), V, injection)
            dV, moved = pull(c)
            return jnp.vdot(z, c), Step(z, moved, (dV, x.T @ moved, jnp.sum(moved, 0)))

        start = time.perf_counter()
        compiled = jax.jit(train).lower(*arrays, tolerances).compile()
        seconds = time.perf_counter() - start

        def step(forward: float, backward: float) -> Step:
            pair = jnp.asarray([forward, backward], dtype)
            return jax.block_until_ready(compiled(*arrays, pair))[1]

        return Prepared(step, seconds)

    return Variant(label, prepare)

"""Gradients of `diffeqsolve` in `python -m benchmarks --ode`: their time and compilation."""

import math
import time
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

from .ode_ours import solution
from .ode_problems import Problem

ROWS = ("nksolve Kvaerno5", "nksolve Rodas5P", "nksolve BDF", "Diffrax Kvaerno5")
RTOL = 1e-6
_DEFAULT_STEPS = 4096  # Diffrax's


def measure(known: Problem, row: str, *, repeats: int, budget: float) -> dict[str, Any]:
    """Seconds of a forward solve, of its gradient with Diffrax's default checkpoints, and with one
    for every step; seconds to trace and compile the first two; the gradient itself.

    The loss is Σ y² at the end; its gradient is with respect to y0 and args.
    """
    given = known.given

    def value(params: Any, adjoint: Any) -> Any:
        y0, args = params
        sol = solution(
            known, row, given.fn, y0, args, RTOL, adjoint=adjoint, max_steps=_DEFAULT_STEPS
        )
        y = jnp.asarray(sol.ys)[-1]
        return jnp.sum(y**2), (sol.stats["num_steps"], sol.result)

    def compiled(fn: Callable) -> tuple[Callable, float]:
        start = time.perf_counter()
        program = jax.jit(fn).lower(params).compile()
        return program, time.perf_counter() - start

    params = (given.y0, given.args) if given.args is not None else (given.y0, jnp.zeros(()))
    default = dfx.RecursiveCheckpointAdjoint()
    forward, forward_compile = compiled(lambda p: value(p, default))
    _, (steps, result) = forward(params)
    if result != dfx.RESULTS.successful:
        return {"failure": "the forward solve failed"}
    out = {
        "forward": _least(lambda: forward(params), repeats, budget),
        "steps": int(steps),
        "forward_compile": forward_compile,
    }
    for name, adjoint in {
        "default": default,
        "checkpoints": dfx.RecursiveCheckpointAdjoint(checkpoints=int(steps) + 1),
    }.items():
        grad = jax.grad(value, has_aux=True)
        program, seconds = compiled(lambda p, adjoint=adjoint, grad=grad: grad(p, adjoint))
        out[name] = _least(lambda program=program: program(params), repeats, budget)
        out[f"{name}_compile"] = seconds
        leaves = jax.tree.leaves(program(params)[0])
        out[f"{name}_gradient"] = np.concatenate([np.ravel(x) for x in leaves]).tolist()
    return out


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The relative difference of two rows' gradients."""
    x, y = (np.asarray(row["default_gradient"]) for row in (a, b))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def _least(call: Callable[[], Any], repeats: int, budget: float) -> float:
    least, spent = math.inf, 0.0
    for _ in range(max(repeats, 2)):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds = time.perf_counter() - start
        least, spent = min(least, seconds), spent + seconds
        if spent + seconds > budget:
            break
    return least

"""Seconds to trace, lower and compile a solve and its gradient, without any cache."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx

import nksolve as nks

from .rows import Row


class CompileTime(NamedTuple):
    """Medians in seconds of tracing with lowering, of XLA's compilation, and of one gradient.

    The last is NaN where the linear solve of the gradient fails.
    """

    solver: str
    forward_trace: float
    forward_compile: float
    gradient_trace: float
    gradient_compile: float
    gradient_run: float


def compile_times(row: Row, *, repeats: int) -> list[CompileTime]:
    """nksolve against Optimistix with `lx.GMRES` forward and backward; gradients in args."""
    target = row.rtol * float(jnp.linalg.norm(row.fn(row.y0[0] if row.lanes else row.y0, row.args)))
    linear = lx.GMRES(rtol=1e-4, atol=target / row.size**0.5)
    adjoint = optx.ImplicitAdjoint(linear)
    ours = nks.NewtonKrylov(rtol=row.rtol, atol=0.0)
    theirs = optx.Newton(rtol=1e30, atol=target, norm=optx.two_norm, linear_solver=linear)

    def nksolve(fn, y, args):
        return nks.root_find(fn, ours, y, args, throw=False).value

    def optimistix(fn, y, args):
        return optx.root_find(fn, theirs, y, args, adjoint=adjoint, throw=False).value

    return [
        _measured(row, "nksolve", nksolve, repeats),
        _measured(row, "Optimistix, lx.GMRES, ImplicitAdjoint(lx.GMRES)", optimistix, repeats),
    ]


def _measured(row: Row, name: str, solve: Callable, repeats: int) -> CompileTime:
    samples = [_once(row, solve) for _ in range(repeats)]
    return CompileTime(name, *(statistics.median(s) for s in zip(*samples, strict=True)))


def _once(row: Row, solve: Callable) -> tuple[float, ...]:
    jax.clear_caches()

    def fn(y, args):  # a new function each time, so that no cache knows it
        return row.fn(y, args)

    def forward(args, y):
        one = lambda y: solve(fn, y, args)
        return jax.vmap(one)(y) if row.lanes else one(y)

    def loss(args, y):
        return jnp.sum(forward(args, y) ** 2)

    *plain, _ = _compile(forward, row)
    jax.clear_caches()
    *gradient, compiled = _compile(jax.grad(loss), row)
    try:
        run = min(_seconds(lambda: compiled(row.args, row.y0)) for _ in range(3))
    except jax.errors.JaxRuntimeError:
        run = float("nan")
    return (*plain, *gradient, run)


def _compile(fn: Callable, row: Row) -> tuple[float, float, Any]:
    start = time.perf_counter()
    lowered = jax.jit(fn).lower(row.args, row.y0)
    middle = time.perf_counter()
    compiled = lowered.compile()
    return middle - start, time.perf_counter() - middle, compiled


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start

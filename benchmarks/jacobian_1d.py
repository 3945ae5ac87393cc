"""The Jacobian of the 1-D Brusselator: factor and solve, ours and SciPy's."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
from jaxtyping import Array, Float

import nksolve as nks
from nksolve.precondition.block_tridiagonal import BlockTridiagonal
from nksolve.precondition.elimination import CyclicReduction, ScanElimination


class Line(NamedTuple):
    """Microseconds, and the relative residual of the solve."""

    name: str
    factor: float
    solve: float
    residual: float


def rhs(y: Float[Array, "n 2"], args: None = None) -> Float[Array, "n 2"]:
    """Hairer & Wanner's BRUSS: u' = 1 + u²v − 4u + α u'', v' = 3u − u²v + α v'', α = 1/50."""
    del args
    n = y.shape[0]
    wide = jnp.concatenate([jnp.array([[1.0, 3.0]], y.dtype), y, jnp.array([[1.0, 3.0]], y.dtype)])
    diffusion = 0.02 * (n + 1.0) ** 2 * (wide[2:] - 2.0 * y + wide[:-2])
    u, v = y[:, 0], y[:, 1]
    reaction = jnp.stack([1.0 + u * u * v - 4.0 * u, 3.0 * u - u * u * v], axis=-1)
    return diffusion + reaction


def stage(y: Float[Array, "n 2"], args: None = None) -> Float[Array, "n 2"]:
    """y − h f(y), h = 0.01: the equation of an implicit step."""
    return y - 0.01 * rhs(y, args)


def measure(n: int, repeats: int) -> list[Line]:
    """All lines, at a smooth state."""
    x = np.arange(1, n + 1) / (n + 1)
    y = jnp.asarray(np.stack([1.0 + 0.5 * np.sin(2 * np.pi * x), np.full(n, 3.0)], axis=-1))
    b = jnp.asarray(np.random.default_rng(0).standard_normal((n, 2)))
    dense = np.asarray(jax.jacobian(stage)(y)).reshape(2 * n, 2 * n)
    residual = lambda s: float(
        np.linalg.norm(dense @ np.ravel(s) - np.ravel(b)) / np.linalg.norm(b)
    )
    lines = []
    for elimination in (ScanElimination(), CyclicReduction()):
        lines.append(_ours(elimination, y, b, residual, repeats))
    sparse = scipy.sparse.csc_matrix(dense)
    flat = np.ravel(b)
    for ordering in ("NATURAL", "COLAMD"):
        factor = lambda o=ordering: scipy.sparse.linalg.splu(sparse, permc_spec=o)
        lu = factor()
        solve = lambda lu=lu: lu.solve(flat)
        name = f"SciPy splu, {ordering}"
        lines.append(Line(name, _best(factor, repeats), _best(solve, repeats), residual(solve())))
    bands = np.zeros((7, 2 * n))
    for k in range(-3, 4):
        bands[3 - k, max(k, 0) : 2 * n + min(k, 0)] = np.diagonal(dense, k)
    banded = lambda: scipy.linalg.solve_banded((3, 3), bands, flat, check_finite=False)
    both = _best(banded, repeats)
    lines.append(Line("SciPy solve_banded (both in one)", both, float("nan"), residual(banded())))
    return lines


def _ours(elimination, y, b, residual, repeats: int) -> Line:
    """Both inside a compiled loop, as an integrator runs them: dispatch is not counted."""
    preconditioner = BlockTridiagonal(elimination=elimination)
    inner = 100

    def factors(y):
        return preconditioner.init(nks.linearise(stage, y, None).operator, y, None)

    @jax.jit
    def factor(y):
        def body(_, y):
            state = factors(y)
            # Depends on all of the factors, changes nothing.
            return y + 0.0 * preconditioner.as_operator(state).mv(y)

        return jax.lax.fori_loop(0, inner, body, y)

    @jax.jit
    def solve(y, b):
        state = factors(y)
        operator = preconditioner.as_operator(state)
        return jax.lax.fori_loop(0, inner, lambda _, b: b + 0.0 * operator.mv(b), operator.mv(b))

    once = jax.jit(lambda y, b: preconditioner.as_operator(factors(y)).mv(b))
    solution = once(y, b)
    each = _best(lambda: jax.block_until_ready(solve(y, b)), repeats) / (inner + 1)
    both = _best(lambda: jax.block_until_ready(factor(y)), repeats) / inner
    name = f"nksolve BlockTridiagonal, {type(elimination).__name__}, values included"
    return Line(name, both - each, each, residual(solution))


def _best(call: Callable, repeats: int) -> float:
    """Microseconds, the least."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * min(times)

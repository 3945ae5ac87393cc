"""Kelley's buckling beam: three solutions, and Newton's method does not pick the right one."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Problem, at_least, floating, identity, interior
from .stencils import neighbour_sum


def beam_residual(u: Float[Array, " n"], lam: Float[Array, ""]) -> Float[Array, " n"]:
    """−u″ − λ sin u, three-point differences divided by h², u(0) = u(1) = 0."""
    per_h = u.shape[0] + 1.0
    return per_h**2 * (2.0 * u - neighbour_sum(u)) - lam * jnp.sin(u)


def beam(n: int = 63, lam: float = 20.0, *, dtype: DTypeLike | None = None) -> Problem:
    """A beam buckling under a load: −u″ = λ sin u, u(0) = u(1) = 0, n interior nodes.

    y has shape (n,); the start is s e^{−10s} with s = x(1−x)(2−x); `args` is λ, a scalar. For π² <
    λ < 4π² there are the unstable root zero and two stable ones ±u; pseudo-transient continuation
    of u' = −f from this start belongs to +u. Published for n = 63, λ = 20: ‖u‖∞ = 2.191 ("max"), in
    25 residuals of pseudo-transient continuation from δ₀ = 0.01 ("ptc_residuals", "ptc_delta0").
    `root` is zero, the trivial root: the wrong answer here.

    Source: Kelley, Solving Nonlinear Equations with Iterative Methods (SIAM, 2022), sections 2.8,
    3.7.
    """
    at_least("n", n, 1)
    dtype = floating(dtype)
    x = interior(n)
    s = x * (1.0 - x) * (2.0 - x)
    published = {}
    if n == 63 and lam == 20.0:
        published = {"max": 2.191, "ptc_residuals": 25, "ptc_delta0": 0.01}
    return Problem(
        name="beam",
        title=f"buckling beam, {n} interior nodes, lambda = {lam:g}",
        source="Kelley, Solving Nonlinear Equations with Iterative Methods (SIAM, 2022)",
        fn=beam_residual,
        y0=jnp.asarray(s * np.exp(-10.0 * s), dtype),
        args=jnp.asarray(lam, dtype),
        root=jnp.zeros((n,), dtype),
        tags=frozenset({"pde", "1d", "symmetric", "published", "several-roots"}),
        published=published,
        field=identity,
    )

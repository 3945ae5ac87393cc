"""KINSOL's elliptic test problem: mildly nonlinear, for Picard iteration and Newton alike."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Problem, at_least, floating, identity
from .stencils import neighbour_sum


def laplace_residual(u: Float[Array, "n n"], args: None) -> Float[Array, "n n"]:
    """Δ_h u − u³ + u + 2, the five-point Laplacian divided by h², u = 0 on the boundary."""
    del args
    per_h = u.shape[0] + 1.0
    return per_h**2 * (neighbour_sum(u) - 4.0 * u) - u**3 + u + 2.0


def laplace(n: int = 31, *, dtype: DTypeLike | None = None) -> Problem:
    """Δu = u³ − u − 2 on the unit square, u = 0 on the boundary, n × n interior nodes.

    y has shape (n, n), the start is zero. (The program's banner prints + 2; its code and its answer
    mean − 2.) Published for n = 31: 0.15564 at the centre ("centre"), 0.00405 at the corner node
    ("corner"); 7 modified Newton steps with the Jacobian of the start by differences
    ("modified_newton_steps") to a maximum norm of 1e-12, where the exact one takes 5;
    Anderson–Picard with SPGMR 42 iterations, 350 linear ("picard_steps",
    "picard_linear_iterations").

    Source: SUNDIALS, KINSOL examples kinLaplace_bnd and kinLaplace_picard_kry.
    """
    at_least("n", n, 1)
    dtype = floating(dtype)
    published = {}
    if n == 31:
        published = {
            "centre": 0.15564,
            "corner": 0.00405,
            "modified_newton_steps": 7,
            "picard_steps": 42,
            "picard_linear_iterations": 350,
        }
    return Problem(
        name="laplace",
        title=f"KINSOL's elliptic problem, {n} x {n} interior nodes",
        source="SUNDIALS, KINSOL example kinLaplace_bnd",
        fn=laplace_residual,
        y0=jnp.zeros((n, n), dtype),
        tags=frozenset({"pde", "2d", "symmetric", "published"}),
        published=published,
        field=identity,
    )

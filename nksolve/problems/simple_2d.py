"""Kelley's two equations in two unknowns: small enough to follow every digit."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Problem, floating


def simple_2d_residual(x: Float[Array, "2"], args: None) -> Float[Array, "2"]:
    """x₁ + sin x₂ and cos(x₁ + x₂)."""
    del args
    x1, x2 = x
    return jnp.stack([x1 + jnp.sin(x2), jnp.cos(x1 + x2)])


def simple_2d(*, dtype: DTypeLike | None = None) -> Problem:
    """x₁ + sin x₂ = 0, cos(x₁ + x₂) = 0; y of shape (2,), start (1, 1).

    Root (−sin x₂, x₂) with x₂ − sin x₂ = π/2. Published, 2-norms of the residual: "newton_history"
    of exact Newton with an Armijo line search, which halves the first step and only that,
    "gmres_history" of Newton–GMRES with η = 0.1 and at most two inner iterations.

    Source: Kelley, Solving Nonlinear Equations with Iterative Methods (SIAM, 2022), section 2.6,
    and SIAMFANLEquations.jl.
    """
    dtype = floating(dtype)
    x2 = 2.3
    for _ in range(50):
        x2 -= (x2 - np.sin(x2) - np.pi / 2) / (1.0 - np.cos(x2))
    return Problem(
        name="simple-2d",
        title="Kelley's two equations in two unknowns",
        source="Kelley, Solving Nonlinear Equations with Iterative Methods (SIAM, 2022)",
        fn=simple_2d_residual,
        y0=jnp.ones((2,), dtype),
        root=jnp.asarray((-np.sin(x2), x2), dtype),
        tags=frozenset({"small", "several-roots", "published"}),
        published={
            "newton_history": (1.88791, 2.43119e-1, 1.19231e-2, 1.03266e-5, 1.46388e-11),
            "gmres_history": (1.88791, 2.43120e-1, 1.19231e-2, 1.03261e-5, 1.40862e-11),
        },
    )

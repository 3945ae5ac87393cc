"""Hammarling's matrix square roots, problems 15 and 16 of Burkardt's test_nonlin."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Problem, floating


def hammarling_residual(x: Float[Array, " nn"], args: None) -> Float[Array, " nn"]:
    """X² − A by rows, A = 1e-4 I + e₁e₂ᵀ, for X of 2×2 or 3×3."""
    del args
    n = round(x.shape[0] ** 0.5)
    matrix = x.reshape(n, n)
    target = 1e-4 * jnp.eye(n, dtype=x.dtype).at[0, 1].set(1e4)
    return (matrix @ matrix - target).reshape(-1)


def _problem(n: int, number: int, dtype: DTypeLike | None) -> Problem:
    dtype = floating(dtype)
    root = 0.01 * np.eye(n)
    root[0, 1] = 50.0
    return Problem(
        name=f"hammarling-{n}",
        title=f"Hammarling's {n}x{n} matrix square root",
        source=f"Hammarling, through test_nonlin, problem {number}",
        fn=hammarling_residual,
        y0=jnp.asarray(np.eye(n).reshape(-1), dtype),
        root=jnp.asarray(root.reshape(-1), dtype),
        tags=frozenset({"nonlinear-library", "small", "badly-scaled"}),
    )


def hammarling_2(*, dtype: DTypeLike | None = None) -> Problem:
    """X² = A for A = [[1e-4, 1], [0, 1e-4]]; y = X by rows, shape (4,), start I.

    Root X = [[0.01, 50], [0, 0.01]], where the Jacobian is nearly singular.
    Source: Hammarling, through test_nonlin 15.
    """
    return _problem(2, 15, dtype)


def hammarling_3(*, dtype: DTypeLike | None = None) -> Problem:
    """X² = A for the 3×3 A = 1e-4 I + e₁e₂ᵀ; y = X by rows, shape (9,), start I.

    Root X = 0.01 I + 50 e₁e₂ᵀ. Source: Hammarling, through test_nonlin 16.
    """
    return _problem(3, 16, dtype)

"""Bratu's problem, Δu + λeᵘ = 0: a fold, beyond which there is no solution."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Mesh, Problem, at_least, floating, identity, interior
from .stencils import neighbour_sum

# λ* = 8 s² sech² s with s tanh s = 1.
FOLD_1D = 3.51383071912516
FOLD_2D = 6.808124423


def bratu_residual(u: Float[Array, "*grid"], lam: Float[Array, ""]) -> Float[Array, "*grid"]:
    """2d·u − Σ neighbours − h²λeᵘ in d dimensions, h = 1/(n+1), u = 0 on the boundary."""
    h = 1.0 / (u.shape[0] + 1)
    return 2.0 * u.ndim * u - neighbour_sum(u) - h**2 * lam * jnp.exp(u)


def bratu(n: int = 511, lam: float = 6.0, *, dtype: DTypeLike | None = None) -> Problem:
    """Bratu's problem on the unit square: f = 4u − Σ neighbours − h²λeᵘ, u = 0 on the boundary.

    y has shape (n, n), the interior nodes, h = 1/(n+1); the start is zero; `args` is λ, a scalar.
    Two solutions for 0 < λ < λ*, none beyond; from zero Newton finds the lower one. Published:
    λ* = 6.808124423 ("fold"), and on grids of 15, 31, 63 interior nodes a side 6.802174, 6.806653,
    6.807757 ("fold_on_grid", by n).

    Source: Mohsen, Comput. Math. Appl. 67 (2014); PETSc's SNES example ex5; the values on grids
    were computed for this package.
    """
    at_least("n", n, 1)
    dtype = floating(dtype)
    return Problem(
        name="bratu",
        title=f"2-D Bratu, {n} x {n} interior nodes, lambda = {lam:g}",
        source="Mohsen, Comput. Math. Appl. 67 (2014); PETSc SNES ex5",
        fn=bratu_residual,
        y0=jnp.zeros((n, n), dtype),
        args=jnp.asarray(lam, dtype),
        tags=frozenset({"pde", "2d", "symmetric", "fold"}),
        mesh=Mesh(2, "dirichlet", order=2),
        published={
            "fold": FOLD_2D,
            "fold_on_grid": {15: 6.802174, 31: 6.806653, 63: 6.807757},
        },
        field=identity,
    )


def bratu_1d(n: int = 127, lam: float = 3.0, *, dtype: DTypeLike | None = None) -> Problem:
    """Bratu's problem on the unit interval: f = 2u − Σ neighbours − h²λeᵘ, u(0) = u(1) = 0.

    y has shape (n,), h = 1/(n+1); the start is zero; `args` is λ, a scalar. The differential
    equation has the closed form u(x) = −2 ln(cosh((x−½)θ/2) / cosh(θ/4)) with θ = √(2λ) cosh(θ/4);
    the smaller θ gives the lower solution, which is `continuum` where λ ≤ λ* = 3.51383071912516
    ("fold"; at it θ* = 4.79871456103094, "fold_theta"). The root of f differs from it by O(h²).

    Source: Bratu, Bull. Soc. Math. France 42 (1914); Mohsen, Comput. Math. Appl. 67 (2014).
    """
    at_least("n", n, 1)
    dtype = floating(dtype)
    exact = bratu_1d_solution(interior(n), lam) if 0 < lam <= FOLD_1D else None
    return Problem(
        name="bratu-1d",
        title=f"1-D Bratu, {n} interior nodes, lambda = {lam:g}",
        source="Bratu, Bull. Soc. Math. France 42 (1914); Mohsen, Comput. Math. Appl. 67 (2014)",
        fn=bratu_residual,
        y0=jnp.zeros((n,), dtype),
        args=jnp.asarray(lam, dtype),
        continuum=None if exact is None else jnp.asarray(exact, dtype),
        tags=frozenset({"pde", "1d", "symmetric", "fold"}),
        mesh=Mesh(1, "dirichlet", order=2),
        published={"fold": FOLD_1D, "fold_theta": 4.79871456103094},
        field=identity,
    )


def bratu_3d(n: int = 15, lam: float = 6.0, *, dtype: DTypeLike | None = None) -> Problem:
    """Bratu's problem on the unit cube: f = 6u − Σ neighbours − h²λeᵘ, u = 0 on the boundary.

    y has shape (n, n, n), the interior nodes, h = 1/(n+1); the start is zero; `args` is λ, a
    scalar. λ = 6 lies below the fold (about 9.9): from zero Newton finds the lower solution.

    Source: Mohsen, Comput. Math. Appl. 67 (2014), the same equation in two dimensions.
    """
    at_least("n", n, 1)
    dtype = floating(dtype)
    return Problem(
        name="bratu-3d",
        title=f"3-D Bratu, {n} x {n} x {n} interior nodes, lambda = {lam:g}",
        source="Mohsen, Comput. Math. Appl. 67 (2014), in three dimensions",
        fn=bratu_residual,
        y0=jnp.zeros((n, n, n), dtype),
        args=jnp.asarray(lam, dtype),
        tags=frozenset({"pde", "3d", "symmetric", "fold"}),
        mesh=Mesh(3, "dirichlet", order=2),
        field=middle_line,
    )


def middle_line(y: Float[Array, "n n n"]) -> Float[Array, "n"]:
    """The line along the last axis through the middle, the `field` of `bratu_3d`."""
    return y[y.shape[0] // 2, y.shape[1] // 2]


def bratu_1d_solution(x: np.ndarray, lam: float, *, upper: bool = False) -> np.ndarray:
    """The closed form of `bratu_1d` at the points x, for 0 < λ ≤ λ*: its lower or upper solution.

    Raises `ValueError` beyond the fold. θ is found by bisection of θ − √(2λ) cosh(θ/4), which is
    positive between its two roots.
    """
    if not 0 < lam <= FOLD_1D:
        raise ValueError(f"1-D Bratu has this solution for 0 < lam <= {FOLD_1D}, not for {lam}")
    # The maximum of θ − √(2λ) cosh(θ/4) separates the roots.
    slope = np.sqrt(2.0 * lam)
    inside = 4.0 * np.arcsinh(4.0 / slope)
    outside = 400.0 if upper else 0.0
    for _ in range(200):
        middle = 0.5 * (inside + outside)
        if middle >= slope * np.cosh(middle / 4.0):
            inside = middle
        else:
            outside = middle
    theta = inside
    return -2.0 * np.log(np.cosh((x - 0.5) * theta / 2.0) / np.cosh(theta / 4.0))

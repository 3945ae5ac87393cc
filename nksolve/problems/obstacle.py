"""The obstacle problem of PETSc's ex9: a membrane over a ball, free where it does not touch it."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Problem, at_least, floating, identity
from .stencils import neighbour_sum

# Where the membrane leaves the ball: a² (ln 2 − ln a) = 1 − a².
FREE_RADIUS = 0.697965148223374
# There it becomes −A ln r + B, A = a²/√(1 − a²), B = A ln 2.
_A, _B = 0.680259411891719, 0.471519893402112
# Beyond this radius the ball's surface goes on along its tangent.
_SKIRT = 0.9


class ObstacleArgs(NamedTuple):
    """The obstacle ψ, and the boundary values g (which are read at the boundary only)."""

    obstacle: Float[Array, "n n"]
    boundary: Float[Array, "n n"]


def obstacle_force(u: Float[Array, "n n"], args: ObstacleArgs) -> Float[Array, "n n"]:
    """4u − Σ neighbours, the boundary values being g; 4 (u − g) at the boundary."""
    n = u.shape[0]
    inner = jnp.zeros((n, n), bool).at[1:-1, 1:-1].set(True)
    fixed = jnp.where(inner, u, args.boundary)
    return jnp.where(inner, 4.0 * u - neighbour_sum(fixed), 4.0 * (u - args.boundary))


def obstacle_residual(u: Float[Array, "n n"], args: ObstacleArgs) -> Float[Array, "n n"]:
    """min(u − ψ, f(u)), f the force; at a tie the first."""
    force = obstacle_force(u, args)
    return jnp.where(u - force <= args.obstacle, u - args.obstacle, force)


def obstacle(n: int = 33, *, dtype: DTypeLike | None = None) -> Problem:
    """−Δu ≥ 0, u ≥ ψ, and one of them with equality at each point of (−2, 2)².

    ψ = √(1 − r²) for r ≤ 0.9, and its tangent in r beyond; boundary values from the exact solution
    `continuum`, u = ψ for r ≤ 0.697965148223374 and −A ln r + B outside. y has shape (n, n), the
    nodes with the boundary, h = 4/(n − 1); the start is 0, or ψ where that is above. f = min(u − ψ,
    4u − Σ neighbours), a residual with kinks; the second by itself is `obstacle_force`, for
    `nks.complementarity` with the `bounds` (ψ, ∞). `args` is (ψ, g).

    Published, for n = 9 ("norms", "average_error", "largest_error"): ‖f‖₂ 3.86571 at the start,
    then 1.3323, 1.8e-6, 1.4e-11; distance from `continuum` 3.076e-3 on the average and 1.334e-2 at
    most.

    Source: PETSc's SNES example ex9 (with `vinewtonrsls`), by Bueler.
    """
    at_least("n", n, 3)
    dtype = floating(dtype)
    nodes = np.linspace(-2.0, 2.0, n)
    r = np.hypot(nodes[:, None], nodes[None, :])
    psi, exact = _ball(r), _membrane(r)
    bound = jnp.asarray(psi, dtype)
    published = {
        9: {
            "norms": (3.86571, 1.3323, 1.8e-6, 1.4e-11),
            "average_error": 3.076e-3,
            "largest_error": 1.334e-2,
        }
    }
    return Problem(
        name="obstacle",
        title=f"a membrane over a ball, {n} x {n} nodes",
        source="PETSc SNES ex9",
        fn=obstacle_residual,
        y0=jnp.maximum(bound, 0.0),
        args=ObstacleArgs(bound, jnp.asarray(exact, dtype)),
        bounds=(bound, jnp.full_like(bound, jnp.inf)),
        continuum=jnp.asarray(exact, dtype),
        tags=frozenset({"pde", "2d", "bounded", "kinks", "published"}),
        published=published.get(n, {}),
        field=identity,
    )


def _ball(r: np.ndarray) -> np.ndarray:
    height = np.sqrt(1.0 - _SKIRT**2)
    tangent = height - _SKIRT / height * (r - _SKIRT)
    return np.where(r <= _SKIRT, np.sqrt(np.maximum(1.0 - r**2, 0.0)), tangent)


def _membrane(r: np.ndarray) -> np.ndarray:
    outside = -_A * np.log(np.maximum(r, FREE_RADIUS)) + _B
    return np.where(r <= FREE_RADIUS, _ball(r), outside)

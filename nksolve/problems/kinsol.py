"""The small systems among KINSOL's examples."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Problem, floating

_FERRARIS_TRONCONI = {
    "lower": ((0.25, 1.5), (0.299449, 2.83693), 3, 11),
    "middle": ((0.625, 0.75 + np.pi), (0.5, np.pi), 5, 12),
}
# The root that the lower start leads to, to the precision of float64.
_LOWER_ROOT = (0.2994486924908786, 2.836927770458881)


def ferraris_tronconi_residual(x: Float[Array, "2"], args: None) -> Float[Array, "2"]:
    """½ sin(x₁x₂) − ¼x₂/π − ½x₁ and (1 − ¼/π)(e^{2x₁} − e) + e x₂/π − 2e x₁."""
    del args
    x1, x2 = x
    e, pi = np.e, np.pi
    first = 0.5 * jnp.sin(x1 * x2) - 0.25 * x2 / pi - 0.5 * x1
    second = (1.0 - 0.25 / pi) * (jnp.exp(2.0 * x1) - e) + e * x2 / pi - 2.0 * e * x1
    return jnp.stack([first, second])


def ferraris_tronconi(start: str = "lower", *, dtype: DTypeLike | None = None) -> Problem:
    """½ sin(x₁x₂) − ¼x₂/π − ½x₁ = 0, (1 − ¼/π)(e^{2x₁} − e) + e x₂/π − 2e x₁ = 0.

    y has shape (2,); bounds 0.25 ≤ x₁ ≤ 1, 1.5 ≤ x₂ ≤ 2π. From the lower bounds exact Newton
    reaches (0.299449, 2.83693) in 3 steps, from the middle of the box (0.5, π) in 5; modified
    Newton takes 11 and 12 ("solution", "newton_steps", "modified_newton_steps"; function tolerance
    1e-5). Raises `ValueError` for another start.

    Source: SUNDIALS, KINSOL example kinFerTron_dns; Floudas et al., Handbook of Test Problems in
    Local and Global Optimization (Kluwer, 1999), test problem 14.1.4.
    """
    if start not in _FERRARIS_TRONCONI:
        raise ValueError(f"start must be 'lower' or 'middle', not {start!r}")
    dtype = floating(dtype)
    y0, solution, newton_steps, modified_steps = _FERRARIS_TRONCONI[start]
    return Problem(
        name="ferraris-tronconi",
        title=f"Ferraris-Tronconi, from the {start} of its box",
        source="SUNDIALS, KINSOL example kinFerTron_dns",
        fn=ferraris_tronconi_residual,
        y0=jnp.asarray(y0, dtype),
        root=jnp.asarray(_LOWER_ROOT if start == "lower" else solution, dtype),
        bounds=(jnp.asarray([0.25, 1.5], dtype), jnp.asarray([1.0, 2.0 * np.pi], dtype)),
        tags=frozenset({"small", "several-roots", "bounded", "published"}),
        published={
            "solution": solution,
            "newton_steps": newton_steps,
            "modified_newton_steps": modified_steps,
        },
    )


def robokin_residual(x: Float[Array, "8"], args: None) -> Float[Array, "8"]:
    """Two bilinear, one product, one linear equation, and four unit circles; see `robokin`."""
    del args
    x1, x2, x3, x4, x5, x6, x7, x8 = x
    return jnp.stack(
        [
            -0.1238 * x1 + x7 - 0.001637 * x2 - 0.9338 * x4
            + 0.004731 * x1 * x3 - 0.3578 * x2 * x3 - 0.3571,
            0.2638 * x1 - x7 - 0.07745 * x2 - 0.6734 * x4
            + 0.2238 * x1 * x3 + 0.7623 * x2 * x3 - 0.6022,
            0.3578 * x1 + 0.004731 * x2 + x6 * x8,
            -0.7623 * x1 + 0.2238 * x2 + 0.3461,
            x1**2 + x2**2 - 1.0,
            x3**2 + x4**2 - 1.0,
            x5**2 + x6**2 - 1.0,
            x7**2 + x8**2 - 1.0,
        ]
    )  # fmt: skip


def robokin(*, dtype: DTypeLike | None = None) -> Problem:
    """Robot kinematics: eight quadratic equations for four pairs (cosine, sine).

    y has shape (8,), bounds −1 ≤ x ≤ 1, start √½ everywhere. (KINSOL adds 16 slack variables for
    the bounds, which enter linearly.) Published: the solution to six digits ("solution"), in 6
    exact Newton steps ("newton_steps"), and plain Newton takes as many on these eight.

    Source: SUNDIALS, KINSOL example kinRoboKin_dns; Floudas et al., Handbook of Test Problems in
    Local and Global Optimization (Kluwer, 1999), test problem 14.1.6.
    """
    dtype = floating(dtype)
    ones = jnp.ones((8,), dtype)
    return Problem(
        name="robokin",
        title="robot kinematics, 8 unknowns",
        source="SUNDIALS, KINSOL example kinRoboKin_dns",
        fn=robokin_residual,
        y0=jnp.full((8,), np.sqrt(0.5), dtype),
        bounds=(-ones, ones),
        tags=frozenset({"small", "several-roots", "bounded", "published"}),
        published={
            "solution": (
                0.671554, 0.740955, 0.951893, -0.306431, 0.963811, -0.266587, 0.404641, 0.914475,
            ),
            "newton_steps": 6,
        },
    )  # fmt: skip


def roberts_residual(y: Float[Array, "3"], dt: Float[Array, ""]) -> Float[Array, "3"]:
    """y − (e₁ + Δt r(y)): one backward Euler step of Robertson's kinetics, see `roberts`."""
    y1, y2, y3 = y
    slow = dt * (-0.04 * y1 + 1e4 * y2 * y3)
    fast = dt * 3e2 * y2**2
    return jnp.stack([y1 - 1.0 - slow, y2 + slow + fast, y3 - fast])


def roberts(*, dtype: DTypeLike | None = None) -> Problem:
    """One backward Euler step, Δt = 0.1 (`args`), of Robertson's kinetics from (1, 0, 0).

    y' = (−0.04y₁ + 1e4 y₂y₃, 0.04y₁ − 1e4 y₂y₃ − 3e2 y₂², 3e2 y₂²); note 3e2, not the 3e7 of the
    differential equation. y has shape (3,). The residual is y − G(y), so y − f is the fixed-point
    map. Published: the root to 17 digits; accelerated by Anderson(2), G takes 8 iterations to 1e-10
    ("anderson_steps").

    Source: SUNDIALS, KINSOL example kinRoberts_fp.
    """
    dtype = floating(dtype)
    root = (9.9678538655358029e-01, 2.9530060962800345e-03, 2.6160735013975683e-04)
    return Problem(
        name="roberts",
        title="backward Euler step of Robertson's kinetics",
        source="SUNDIALS, KINSOL example kinRoberts_fp",
        fn=roberts_residual,
        y0=jnp.asarray([1.0, 0.0, 0.0], dtype),
        args=jnp.asarray(0.1, dtype),
        root=jnp.asarray(root, dtype),
        tags=frozenset({"small", "fixed-point", "published"}),
        published={"anderson_steps": 8},
    )

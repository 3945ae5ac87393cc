"""KINSOL's food web: six species that diffuse and eat each other, badly scaled on purpose."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Problem, at_least, floating

PREY = 3
PREDATOR_SCALE = 1e-5


class FoodWebArgs(NamedTuple):
    """Coefficients of the unscaled equations, and the scale D: y = D c, residual D F(c)."""

    scale: Float[Array, "6"]
    diffusion: Float[Array, "6"]
    interaction: Float[Array, "6 6"]
    growth: Float[Array, "6"]


def food_web_residual(y: Float[Array, "m m 6"], args: FoodWebArgs) -> Float[Array, "m m 6"]:
    """D_i (d_i Δ_h c_i + c_i (b_i (1 + x y) + Σ_j a_ij c_j)) at c = y/D, zero-flux boundary."""
    mx = y.shape[0]
    c = y / args.scale[None, None, :]
    x = jnp.arange(mx, dtype=y.dtype) / (mx - 1.0)
    richness = (1.0 + x[:, None] * x[None, :])[:, :, None]
    # Reflection: the neighbour beyond the boundary is the one inside it.
    mirrored = jnp.pad(c, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    vertical = mirrored[2:, 1:-1] + mirrored[:-2, 1:-1]
    horizontal = mirrored[1:-1, 2:] + mirrored[1:-1, :-2]
    laplacian = (mx - 1.0) ** 2 * (vertical + horizontal - 4.0 * c)
    rates = c * (args.growth[None, None, :] * richness + c @ args.interaction.T)
    return args.scale[None, None, :] * (args.diffusion[None, None, :] * laplacian + rates)


def first_prey(y: Float[Array, "m m 6"]) -> Float[Array, "m m"]:
    """The concentration of the first prey, the field that is plotted."""
    return y[:, :, 0]


def food_web(mx: int = 8, scaled: bool = True, *, dtype: DTypeLike | None = None) -> Problem:
    """0 = d_i Δc_i + c_i (b_i + Σ_j a_ij c_j), i = 1…6, on the unit square with zero flux.

    Species 1–3 are prey: d = 1, b = 1 + xy, a_ii = −1, a_ij = −0.5e-6 for each predator j; 4–6 are
    predators: d = ½, b = −(1 + xy), a_ii = −1, a_ij = 1e4 for each prey j. y has shape (mx, mx, 6),
    nodes (i/(mx−1), j/(mx−1)), boundary included. Start: 1 (prey), 30000 (predators).

    `scaled` variables and residuals are D c and D F(c) with KINSOL's D = (1, 1, 1, 1e-5, 1e-5,
    1e-5); otherwise D = 1 throughout (`args.scale`).

    Published: equilibrium concentrations, unscaled, of a prey and a predator at the corners (0, 0)
    ("bottom_left") and (1, 1) ("top_right") for mx = 8 and 5; KINSOL's work for mx = 8 with
    SPGMR(15, 2 restarts) and a block-diagonal preconditioner: 9 Newton, 329 linear iterations, 338
    products ("newton_steps", "linear_iterations", "jacobian_products"), stopping at ‖D F‖∞ ≤ 1e-7.

    Source: SUNDIALS, KINSOL example kinFoodWeb_kry; Brown & Saad, SIAM J. Sci. Stat. Comput. 11
    (1990).
    """
    at_least("mx", mx, 2)
    dtype = floating(dtype)
    prey = np.arange(6) < PREY
    scale = np.where(prey | (not scaled), 1.0, PREDATOR_SCALE)
    interaction = np.zeros((6, 6))
    interaction[:PREY, PREY:] = -0.5e-6
    interaction[PREY:, :PREY] = 1e4
    np.fill_diagonal(interaction, -1.0)
    start = np.broadcast_to(scale * np.where(prey, 1.0, 30000.0), (mx, mx, 6))
    args = FoodWebArgs(
        scale=jnp.asarray(scale, dtype),
        diffusion=jnp.asarray(np.where(prey, 1.0, 0.5), dtype),
        interaction=jnp.asarray(interaction, dtype),
        growth=jnp.asarray(np.where(prey, 1.0, -1.0), dtype),
    )
    published = {
        8: {
            "bottom_left": (1.16428, 34927.5),
            "top_right": (1.25797, 37736.7),
            "newton_steps": 9,
            "linear_iterations": 329,
            "jacobian_products": 338,
        },
        5: {"bottom_left": (1.16253, 34875.0), "top_right": (1.2637, 37908.7)},
    }
    y0 = jnp.asarray(start, dtype)
    return Problem(
        name="food-web",
        title=f"predator-prey food web, 6 species on {mx} x {mx} nodes",
        source="SUNDIALS, KINSOL example kinFoodWeb_kry",
        fn=food_web_residual,
        y0=y0,
        args=args,
        bounds=(jnp.zeros_like(y0), jnp.full_like(y0, jnp.inf)),
        tags=frozenset({"pde", "2d", "nonsymmetric", "system", "badly-scaled", "published"}),
        published=published.get(mx, {}),
        field=first_prey,
    )

"""Two species carried by air, whose reactions follow the sun."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .base import at_least
from .initial_value import InitialValueProblem, kept_end

_BOTTOM, _TOP, _WIDTH = 30.0, 50.0, 20.0  # km
_HALF_DAY = 43200.0  # s


def diurnal(n: int = 10) -> InitialValueProblem:
    """Ozone chemistry with advection and diffusion on a square of 20 km, over a day (86400 s):

        c_t = K_h c_xx + V c_x + (K_v(y) c_y)_y + R(c, t),    K_v(y) = K_v0 exp(y/5),

    with two species c of which R makes and destroys the first in seconds, in sunlight. y is of
    shape (n, n, 2): heights 30 to 50 km, then x, then species; no flux through the boundary. The
    first species goes from 1e6 to 1e7 down to nothing at sunset, the second stays near 1e12: the
    usual tolerances are rtol = 1e-5 and atol = 1e-3.

    The end value is known for n = 10.
    """
    at_least("n", n, 2)
    x = np.linspace(-1.0, 1.0, n) ** 2
    profile = 1.0 - x + 0.5 * x**2
    start = (profile[:, None] * profile)[..., None] * np.array([1e6, 1e12])
    return InitialValueProblem(
        "diurnal",
        "Hindmarsh & Serban, Example programs for CVODE: cvDiurnal_kry; end value solved anew",
        _diurnal,
        jnp.asarray(start),
        (0.0, 2 * _HALF_DAY),
        # K_h, V, K_v0, q1, q2, c3, a3, a4
        jnp.array([4e-6, 1e-3, 1e-8, 1.63e-16, 4.66e-16, 3.7e16, 22.62, 7.601]),
        kept_end("diurnal_10") if n == 10 else None,
        100.0,
    )


def _diurnal(t: Any, c: Float[Array, "n n 2"], args: Float[Array, "8"]) -> Float[Array, "n n 2"]:
    k_h, velocity, k_v0, q1, q2, c3, a3, a4 = args
    n = c.shape[0]
    dx, dy = _WIDTH / (n - 1), (_TOP - _BOTTOM) / (n - 1)
    # No flux: the neighbour outside is that inside.
    wide = jnp.pad(c, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    left, right = wide[1:-1, :-2], wide[1:-1, 2:]
    below, above = wide[:-2, 1:-1], wide[2:, 1:-1]
    halfway = np.exp((_BOTTOM + dy * (np.arange(n + 1) - 0.5)) / 5.0)
    k_v = k_v0 * jnp.asarray(halfway / dy**2, c.dtype)[:, None, None]
    moved = k_h / dx**2 * (right - 2.0 * c + left) + velocity / (2.0 * dx) * (right - left)
    mixed = k_v[1:] * (above - c) - k_v[:-1] * (c - below)

    sine = jnp.sin(jnp.pi / _HALF_DAY * t).astype(c.dtype)
    by_day = sine > 0
    sun = jnp.where(by_day, sine, jnp.ones_like(sine))
    q3, q4 = (jnp.where(by_day, jnp.exp(-a / sun), jnp.zeros_like(sun)) for a in (a3, a4))
    c1, c2 = c[..., 0], c[..., 1]
    made, lost, split = q1 * c3 * c1, q2 * c1 * c2, q4 * c2
    reaction = jnp.stack([2.0 * q3 * c3 + split - made - lost, made - lost - split], axis=-1)
    return moved + mixed + reaction

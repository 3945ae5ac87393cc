"""Stiff initial value problems with known end values."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .base import at_least
from .diurnal import diurnal
from .initial_value import InitialValueProblem, kept_end
from .stencils import neighbour_sum

_TEST_SET = (
    "Mazzia & Magherini, Test Set for Initial Value Problem Solvers, 2008; end values solved anew "
    "to 1e-11 and better"
)


def rober(end: float = 1e11) -> InitialValueProblem:
    """Robertson's three reactions, to t = 1e11: rates of 0.04, 3e7 and 1e4."""
    value = np.array([2.083340149701255e-08, 8.333360770334713e-14, 0.999999979166505])
    return InitialValueProblem(
        "rober",
        _TEST_SET,
        _rober,
        jnp.array([1.0, 0.0, 0.0]),
        (0.0, end),
        jnp.array([0.04, 3e7, 1e4]),
        value if end == 1e11 else None,
        1e-6,
    )


def _rober(t, y, k):
    del t
    first, second, third = k[0] * y[0], k[1] * y[1] ** 2, k[2] * y[1] * y[2]
    return jnp.stack([third - first, first - third - second, second])


def hires() -> InitialValueProblem:
    """High irradiance response of photomorphogenesis: eight unknowns, to t = 321.8122."""
    value = np.array(
        [
            0.0007371312573325668,
            0.0001442485726316185,
            5.888729740967575e-05,
            0.001175651343283149,
            0.002386356198831331,
            0.006238968252742796,
            0.002849998395185769,
            0.002850001604814231,
        ]
    )
    y0 = jnp.zeros(8).at[0].set(1.0).at[7].set(0.0057)
    return InitialValueProblem("hires", _TEST_SET, _hires, y0, (0.0, 321.8122), None, value, 1e-4)


def _hires(t, y, args):
    del t, args
    y1, y2, y3, y4, y5, y6, y7, y8 = y
    bound = 280.0 * y6 * y8 - 1.81 * y7
    return jnp.stack(
        [
            -1.71 * y1 + 0.43 * y2 + 8.32 * y3 + 0.0007,
            1.71 * y1 - 8.75 * y2,
            -10.03 * y3 + 0.43 * y4 + 0.035 * y5,
            8.32 * y2 + 1.71 * y3 - 1.12 * y4,
            -1.745 * y5 + 0.43 * y6 + 0.43 * y7,
            -280.0 * y6 * y8 + 0.69 * y4 + 1.71 * y5 - 0.43 * y6 + 0.69 * y7,
            bound,
            -bound,
        ]
    )


def orego() -> InitialValueProblem:
    """The Oregonator, a limit cycle with steep fronts, to t = 360."""
    value = np.array([1.000814870318523, 1228.178521549917, 132.0554942846706])
    args = jnp.array([77.27, 8.375e-6, 0.161])
    y0 = jnp.array([1.0, 2.0, 3.0])
    return InitialValueProblem("orego", _TEST_SET, _orego, y0, (0.0, 360.0), args, value)


def _orego(t, y, args):
    del t
    (s, q, w), (y1, y2, y3) = args, y
    return jnp.stack([s * (y2 - y1 * y2 + y1 - q * y1**2), (y3 - y2 - y1 * y2) / s, w * (y1 - y3)])


def van_der_pol() -> InitialValueProblem:
    """Van der Pol's oscillator with μ = 1000, to t = 2000: y'' = μ(1 − y²)y' − y."""
    value = np.array([1.706167732170469, -0.0008928097010248125])
    y0 = jnp.array([2.0, 0.0])
    return InitialValueProblem(
        "van-der-pol", _TEST_SET, _van_der_pol, y0, (0.0, 2000.0), jnp.array(1000.0), value
    )


def _van_der_pol(t, y, mu):
    del t
    return jnp.stack([y[1], mu * (1.0 - y[0] ** 2) * y[1] - y[0]])


def brusselator_1d(n: int = 500) -> InitialValueProblem:
    """The Brusselator on a line, y of shape (n, 2), to t = 10: diffusion 0.02, ends at (1, 3).

    The end value is known for n = 500.
    """
    at_least("n", n, 1)
    x = jnp.arange(1, n + 1) / (n + 1)
    y0 = jnp.stack([1.0 + 0.5 * jnp.sin(2 * jnp.pi * x), jnp.full(n, 3.0)], axis=1)
    return InitialValueProblem(
        "brusselator-1d",
        "Hairer & Wanner, Solving Ordinary Differential Equations II, IV.10 (BRUSS), N = 500",
        _brusselator_1d,
        y0,
        (0.0, 10.0),
        jnp.array(0.02),
        kept_end("brusselator_1d_500") if n == 500 else None,
    )


def _brusselator_1d(t, y, diffusion):
    del t
    rate = diffusion * (y.shape[0] + 1) ** 2
    ends = jnp.array([[1.0, 3.0]], y.dtype)
    wide = jnp.concatenate([ends, y, ends])
    flux = rate * (wide[2:] - 2.0 * y + wide[:-2])
    u, v = y[:, 0], y[:, 1]
    autocatalysis = u * u * v
    return flux + jnp.stack([1.0 + autocatalysis - 4.0 * u, 3.0 * u - autocatalysis], axis=1)


def brusselator_2d(n: int = 32) -> InitialValueProblem:
    """The Brusselator on a periodic square, y of shape (2, n, n), to t = 11.5, with a source that
    is switched on at t = 1.1.

    The end value is known for n = 8 and 32.
    """
    at_least("n", n, 2)
    x = np.linspace(0.0, 1.0, n)
    u0 = np.broadcast_to(22.0 * (x * (1.0 - x)) ** 1.5, (n, n))
    v0 = np.broadcast_to(27.0 * (x * (1.0 - x)) ** 1.5, (n, n)).T
    args = jnp.array([3.4, 1.0, 10.0])
    return InitialValueProblem(
        "brusselator-2d",
        "Rackauckas et al., SciMLBenchmarks.jl, Brusselator (A = 3.4, B = 1, α = 10)",
        _brusselator_2d,
        jnp.asarray(np.stack([u0, v0])),
        (0.0, 11.5),
        args,
        kept_end(f"brusselator_2d_{n}") if n in (8, 32) else None,
        jumps=(1.1,),
    )


def _brusselator_2d(t, y, args):
    (a, b, alpha), (u, v) = args, y
    n = u.shape[0]
    x = np.linspace(0.0, 1.0, n)
    disc = (x[:, None] - 0.3) ** 2 + (x - 0.6) ** 2 <= 0.01
    source = jnp.where(t >= 1.1, jnp.asarray(5.0 * disc, y.dtype), jnp.zeros((), y.dtype))
    diffusion = alpha * (n - 1) ** 2
    autocatalysis = u * u * v
    return jnp.stack(
        [
            b + autocatalysis - (a + 1.0) * u + diffusion * _laplacian(u) + source,
            a * u - autocatalysis + diffusion * _laplacian(v),
        ]
    )


def gray_scott(n: int = 32) -> InitialValueProblem:
    """Gray and Scott's reaction on a periodic square of side 2.5, y of shape (2, n, n), to t = 200.

    The end value is known for n = 32.
    """
    at_least("n", n, 2)
    x = np.arange(n) * 2.5 / n
    bump = np.where((x >= 1.0) & (x <= 1.5), np.sin(4 * np.pi * x) ** 2, 0.0)
    v0 = 0.25 * bump[:, None] * bump
    return InitialValueProblem(
        "gray-scott",
        "PETSc, TS tutorials ex5 (Pearson, Science 261, 1993): D = 8e-5, 4e-5, γ = 0.024, κ = 0.06",
        _gray_scott,
        jnp.asarray(np.stack([1.0 - 2.0 * v0, v0])),
        (0.0, 200.0),
        jnp.array([8e-5, 4e-5, 0.024, 0.06]),
        kept_end("gray_scott_32") if n == 32 else None,
    )


def _gray_scott(t, y, args):
    del t
    (d_u, d_v, gamma, kappa), (u, v) = args, y
    width = (u.shape[0] / 2.5) ** 2
    reaction = u * v * v
    return jnp.stack(
        [
            d_u * width * _laplacian(u) - reaction + gamma * (1.0 - u),
            d_v * width * _laplacian(v) + reaction - (gamma + kappa) * v,
        ]
    )


def _laplacian(u: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The five-point stencil on a periodic grid, times the mesh width squared."""
    wide = jnp.pad(u, 1, mode="wrap")
    return neighbour_sum(wide)[1:-1, 1:-1] - 4.0 * u


STIFF: dict[str, Callable[..., InitialValueProblem]] = {
    "rober": rober,
    "hires": hires,
    "orego": orego,
    "van-der-pol": van_der_pol,
    "brusselator-1d": brusselator_1d,
    "brusselator-2d": brusselator_2d,
    "gray-scott": gray_scott,
    "diurnal": diurnal,
}

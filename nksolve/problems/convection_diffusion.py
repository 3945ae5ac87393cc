"""Kelley's two convection–diffusion problems on the unit square, with the same known solution."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Problem, at_least, floating, identity, interior
from .stencils import central_difference, neighbour_sum


class ConvectionArgs(NamedTuple):
    """The strength of the convection and the right-hand side at the nodes."""

    strength: Float[Array, ""]
    g: Float[Array, "n n"]


def convection_diffusion_residual(
    u: Float[Array, "n n"], args: ConvectionArgs
) -> Float[Array, "n n"]:
    """−Δ_h u + strength·u (∂_x u + ∂_y u) − g, centred differences, u = 0 on the boundary."""
    per_h = u.shape[0] + 1.0
    slopes = central_difference(u, 0) + central_difference(u, 1)
    diffusion = per_h**2 * (4.0 * u - neighbour_sum(u))
    return diffusion + (0.5 * per_h) * args.strength * u * slopes - args.g


def convection_diffusion_linear_residual(
    u: Float[Array, "n n"], args: ConvectionArgs
) -> Float[Array, "n n"]:
    """−Δ_h u + ∂_x u + strength·y ∂_y u + u − g, centred differences, u = 0 on the boundary."""
    n = u.shape[0]
    per_h = n + 1.0
    y = (jnp.arange(1, n + 1, dtype=u.dtype) / per_h)[None, :]
    slopes = central_difference(u, 0) + args.strength * y * central_difference(u, 1)
    return per_h**2 * (4.0 * u - neighbour_sum(u)) + (0.5 * per_h) * slopes + u - args.g


def convection_diffusion(n: int = 31, *, dtype: DTypeLike | None = None) -> Problem:
    """−Δu + 20u(u_x + u_y) = g on the unit square, u = 0 on the boundary, n × n interior nodes.

    y has shape (n, n), axis 0 along x; the start is zero; g is such that u* =
    10xy(1−x)(1−y)e^{x^4.5} (`continuum`) solves the differential equation. The residual is divided
    by nothing: −Δ_h carries its 1/h². Published for n = 31, 2-norms of the residual of exact Newton
    ("newton_history"): 412.45, 603.20, 134.42, 4.0358, 3.09e-3, 1.76e-9; the root is 5.86e-4 from
    u* in the maximum norm ("discretisation_error").

    Source: Kelley, Solving Nonlinear Equations with Iterative Methods (SIAM, 2022), sections 2.7.3
    and 3.6, and SIAMFANLEquations.jl.
    """
    x, exact, u_x, u_y, minus_laplacian = _known_solution(n)
    del x
    published = {}
    if n == 31:
        published = {
            "newton_history": (412.45, 603.20, 134.42, 4.0358, 3.09e-3, 1.76e-9),
            "start_norm": 412.4454,
            "discretisation_error": 5.86e-4,
        }
    return _problem(
        "convection-diffusion",
        f"nonlinear convection-diffusion, {n} x {n} interior nodes",
        "Kelley, Solving Nonlinear Equations with Iterative Methods (SIAM, 2022)",
        convection_diffusion_residual,
        exact,
        minus_laplacian + 20.0 * exact * (u_x + u_y),
        published,
        floating(dtype),
    )


def convection_diffusion_linear(n: int = 31, *, dtype: DTypeLike | None = None) -> Problem:
    """−Δu + u_x + 20y u_y + u = g on the unit square, as a root problem with the residual Lu − g.

    Linear: one exact Newton step solves it. y, the start, the nodes and u* are those of
    `convection_diffusion`. Published for n = 31, η = 9.8e-4 and a fast Poisson preconditioner,
    lengths of residual histories, the start counted ("history_lengths").

    Source: Kelley, Iterative Methods for Linear and Nonlinear Equations (SIAM, 1995), pages 54–55.
    """
    x, exact, u_x, u_y, minus_laplacian = _known_solution(n)
    published = {}
    if n == 31:
        published = {
            "history_lengths": {
                "gmres-right": 12,
                "gmres-left": 9,
                "gmres4-right": 16,
                "gmres4-left": 13,
                "bicgstab-left": 7,
                "bicgstab-right": 8,
                "bicgstab-none": 37,
            }
        }
    return _problem(
        "convection-diffusion-linear",
        f"linear convection-diffusion, {n} x {n} interior nodes",
        "Kelley, Iterative Methods for Linear and Nonlinear Equations (SIAM, 1995), pages 54-55",
        convection_diffusion_linear_residual,
        exact,
        minus_laplacian + u_x + 20.0 * x[None, :] * u_y + exact,
        published,
        floating(dtype),
    )


def _problem(name, title, source, fn, exact, g, published, dtype) -> Problem:
    return Problem(
        name=name,
        title=title,
        source=source,
        fn=fn,
        y0=jnp.zeros(exact.shape, dtype),
        args=ConvectionArgs(jnp.asarray(20.0, dtype), jnp.asarray(g, dtype)),
        continuum=jnp.asarray(exact, dtype),
        tags=frozenset({"pde", "2d", "nonsymmetric", "published"}),
        published=published,
        field=identity,
    )


def _known_solution(n: int) -> tuple[np.ndarray, ...]:
    """x and, on the grid, u* = w(x) v(y), ∂_x u*, ∂_y u* and −Δu*; w = 10x(1−x)E, v = y(1−y)."""
    at_least("n", n, 1)
    x = interior(n)
    # E = exp(x^4.5), E' = pE with p = 4.5 x^3.5, p' = 15.75 x^2.5.
    e, p, dp = np.exp(x**4.5), 4.5 * x**3.5, 15.75 * x**2.5
    q, dq = 10.0 * x * (1.0 - x), 10.0 * (1.0 - 2.0 * x)
    w, dw = q * e, (dq + q * p) * e
    ddw = (-20.0 + 2.0 * dq * p + q * (dp + p**2)) * e
    v, dv, ddv = x * (1.0 - x), 1.0 - 2.0 * x, np.full(n, -2.0)
    outer = np.multiply.outer
    return x, outer(w, v), outer(dw, v), outer(w, dv), -outer(ddw, v) - outer(w, ddv)

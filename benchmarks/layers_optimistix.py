"""Optimistix in `python -m benchmarks --layers`."""

import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx

from .layers_jax import cell, variant
from .layers_timing import Variant

_MOST = 5000
_DENSE = 2048  # unknowns of the largest matrix that the dense rows get


def rows(mode: str, size: int) -> dict[str, list[Variant]]:
    """Name → variants; those with matrices only where these are small."""
    unknowns = 64 * size if mode == "joint" else size
    gmres = [(f"restart {m}", m) for m in (20, 60)]
    out = {
        "Optimistix Picard, GMRES adjoint": [
            variant(label, _picard(_gmres(m), mode)) for label, m in gmres
        ],
        "Optimistix Newton + GMRES, GMRES adjoint": [
            variant(f"{label}, inner 1e{digits}", _newton(m, 10.0**digits, _gmres(m), mode))
            for label, m in gmres
            for digits in (-1, -3)
        ],
    }
    if unknowns <= _DENSE:
        default = lambda tolerance: lx.AutoLinearSolver(well_posed=None)
        out["Optimistix Picard, default adjoint"] = [variant("", _picard(default, mode))]
        out["Optimistix Newton + LU, default adjoint"] = [
            variant("", _newton(None, 0.0, default, mode))
        ]
    return out


def _gmres(restart: int):
    return lambda tolerance: lx.GMRES(
        0.0, tolerance, norm=optx.two_norm, restart=restart, stagnation_iters=restart,
        max_steps=_MOST,
    )  # fmt: skip


def _picard(adjoint, mode: str):
    def solve(V, injection, tolerances, units):
        def one(injection):
            forward, backward = _absolute(injection, tolerances, units, mode)
            solver = optx.FixedPointIteration(0.0, forward, norm=optx.two_norm)
            return optx.fixed_point(
                cell, solver, jnp.zeros_like(injection), (V, injection), max_steps=_MOST,
                adjoint=optx.ImplicitAdjoint(adjoint(backward)), throw=False,
            ).value  # fmt: skip

        return one(injection) if mode == "joint" else jax.vmap(one)(injection)

    return solve


def _newton(restart: int | None, inner: float, adjoint, mode: str):
    def solve(V, injection, tolerances, units):
        def one(injection):
            forward, backward = _absolute(injection, tolerances, units, mode)
            linear = lx.LU()
            if restart is not None:
                linear = lx.GMRES(
                    inner, inner * forward, norm=optx.two_norm, restart=restart,
                    stagnation_iters=restart, max_steps=_MOST,
                )  # fmt: skip
            solver = optx.Newton(0.0, forward, norm=optx.two_norm, linear_solver=linear)
            return optx.root_find(
                lambda z, args: cell(z, args) - z, solver, jnp.zeros_like(injection),
                (V, injection), max_steps=100, throw=False,
                adjoint=optx.ImplicitAdjoint(adjoint(backward)),
            ).value  # fmt: skip

        return one(injection) if mode == "joint" else jax.vmap(one)(injection)

    return solve


def _absolute(injection, tolerances, units, mode: str):
    """Tolerances in the 2-norm of a system, the adjoint's for ‖c‖ ≈ √n."""
    joint = mode == "joint"
    forward = tolerances[0] * (units.z_joint if joint else units.z_sample)
    adjoint = units.adjoint_joint if joint else units.adjoint_sample
    return forward, tolerances[1] * adjoint * injection.size**0.5

"""jaxopt in `python -m benchmarks --layers`; imported in the peers' environment."""

import functools as ft
import warnings

import jax
import jax.numpy as jnp

from .layers_jax import cell, variant
from .layers_timing import Variant

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says that it is no longer maintained
    import jaxopt
    from jaxopt.linear_solve import solve_gmres, solve_normal_cg

_MOST = 5000


def rows(mode: str, size: int) -> dict[str, list[Variant]]:
    """Name → variants."""
    del size
    picard = jaxopt.FixedPointIteration
    anderson = lambda ridge: ft.partial(jaxopt.AndersonAcceleration, history_size=6, ridge=ridge)
    forward = {
        "Picard": picard,
        "Anderson": anderson(1e-5),
        "Anderson, ridge 1e-10": anderson(1e-10),
    }
    out = {}
    for name, solver in forward.items():
        out[f"jaxopt {name}, normal CG"] = [
            variant("", _solve(solver, ft.partial(solve_normal_cg, maxiter=_MOST), mode))
        ]
        out[f"jaxopt {name}, GMRES"] = [
            variant(f"restart {m}", _solve(solver, _gmres(m), mode)) for m in (10, 30)
        ]
    return out


def _gmres(restart: int):
    method = "batched"  # the other one is slower still on small systems
    return ft.partial(solve_gmres, restart=restart, maxiter=200, solve_method=method)


def _solve(solver, linear, mode: str):
    def solve(V, injection, tolerances, units):
        forward, backward = tolerances
        joint = mode == "joint"
        scale = units.z_joint if joint else units.z_sample
        adjoint = units.adjoint_joint if joint else units.adjoint_sample
        chosen = solver(
            cell, maxiter=_MOST, tol=forward * scale,
            implicit_diff_solve=ft.partial(linear, tol=backward * adjoint),
        )  # fmt: skip
        run = lambda V, i: chosen.run(jnp.zeros_like(i), (V, i)).params
        return run(V, injection) if joint else jax.vmap(run, (None, 0))(V, injection)

    return solve

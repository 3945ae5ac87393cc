"""nksolve in `python -m benchmarks --layers`: the first row is what all ratios are to."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

import nksolve as nks

from .layers_jax import cell, variant
from .layers_timing import Variant


def rows(mode: str, size: int) -> dict[str, list[Variant]]:
    """Name → variants; solvers that this version does not have are left out."""
    del size
    out = {
        "nksolve Newton–Krylov": [
            variant(label, _verb(solver, mode)) for label, solver in _newton_krylov().items()
        ]
    }
    for name, others in _others().items():
        out[f"nksolve {name}"] = [variant(label, _verb(s, mode)) for label, s in others.items()]
    for name, solver in _layers(mode).items():
        out[f"nksolve {name}"] = [variant("", solver)]
    return out


# The solvers of each row: label → function of (atol).
_Solvers = dict[str, Callable[[Any], Any]]


def _newton_krylov() -> _Solvers:
    """Restart lengths and forcing terms."""

    def solver(restart, forcing):
        return lambda atol: nks.NewtonKrylov(
            0.0, atol, linear_solver=nks.GMRES(restart=restart), forcing=forcing
        )

    return {
        "restart 20": solver(20, nks.EisenstatWalker2()),
        "restart 60": solver(60, nks.EisenstatWalker2()),
        "restart 20, η = 0.03": solver(20, nks.ConstantForcing(0.03)),
    }


def _others() -> dict[str, _Solvers]:
    """Fixed-point solvers: a class that is missing makes no row."""
    if not hasattr(nks, "fixed_point"):
        return {}
    chosen: dict[str, dict[str, dict[str, Any]]] = {
        "Picard": {"": {}},
        "Anderson": {"": {}, "depth 12": {"depth": 12}},
        "Broyden": {"": {}},
        "Switching": {"": {}},
    }
    out = {}
    for name, variants in chosen.items():
        kind = getattr(nks, name, None)
        if kind is not None:
            out[name] = {
                label: (lambda atol, kind=kind, fields=fields: kind(0.0, atol, **fields))
                for label, fields in variants.items()
            }
    return out


def _verb(make: Callable[[Any], Any], mode: str):
    def solve(V, injection, tolerances, units):
        forward, rtol = _tolerances(tolerances, units, mode)

        def one(injection):
            arguments = make(forward), jnp.zeros_like(injection), (V, injection)
            adjoint = nks.KrylovAdjoint(rtol=rtol)
            if hasattr(nks, "fixed_point"):
                verb, fn = nks.fixed_point, cell
            else:
                verb, fn = nks.root_find, _residual
            return verb(fn, *arguments, adjoint=adjoint, max_steps=5000, throw=False).value

        return one(injection) if mode == "joint" else jax.vmap(one)(injection)

    return solve


def _residual(z, args):
    return cell(z, args) - z


class _Cell(eqx.Module):
    V: Array

    def __call__(self, z, x):
        return cell(z, (self.V, x))


def _layers(mode: str) -> dict[str, Any]:
    """`nks.ImplicitLayer` in the batch modes that this version has."""
    if not hasattr(nks, "ImplicitLayer"):
        return {}
    batches = {"joint": ["Joint"], "per sample": ["PerSample", "Compacted"]}[mode]
    solvers = [name for name in ("NewtonKrylov", "Switching") if hasattr(nks, name)]
    out = {}
    for batch in (name for name in batches if hasattr(nks, name)):
        for name in solvers:
            out[f"ImplicitLayer, {batch}, {name}"] = _layer(name, batch, mode)
    return out


def _layer(name: str, batch: str, mode: str):
    def solve(V, injection, tolerances, units):
        forward, rtol = _tolerances(tolerances, units, mode)
        layer = nks.ImplicitLayer(
            _Cell(V), solver=getattr(nks, name)(0.0, forward),
            adjoint=nks.KrylovAdjoint(rtol=rtol), batch=getattr(nks, batch)(),
        )  # fmt: skip
        return layer(injection, jnp.zeros_like(injection))[0]

    return solve


def _tolerances(tolerances, units, mode: str):
    """The forward one absolute, the adjoint's relative to ‖c‖."""
    joint = mode == "joint"
    forward = tolerances[0] * (units.z_joint if joint else units.z_sample)
    return forward, tolerances[1] * (units.adjoint_joint if joint else units.adjoint_sample)

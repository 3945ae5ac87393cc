"""The competitors of each row, with the settings that `python -m benchmarks --tune` found."""

import nksolve as nks

from .competitors import Competitor, nksolve, optimistix, scipy
from .rows import Row
from .tuning import bicgstab, cg, gmres, lu

# (restart, eta, looseness) of `lx.GMRES`; (eta, looseness) of the others.
GMRES = {
    "tanh-1024": (3, 1e-1, 1e4),
    "bratu-64": (40, 1e-1, 1e4),
    "bratu-128": (80, 1e-1, 1e4),
    "chandrasekhar-2048": (3, 1e-1, 1e3),
    "batch-256x64": (3, 0.3, 1e2),
}
BICGSTAB = {
    "tanh-1024": (0.3, 1e3),
    "bratu-64": (1e-1, 1e3),
    "bratu-128": (1e-1, 1e3),
    "chandrasekhar-2048": (0.3, 1e2),
    "batch-256x64": (0.3, 1e2),
}
CG = {"bratu-64": (0.3, 1e4), "bratu-128": (0.3, 1e4)}
LU = {"tanh-1024": 1e2, "bratu-64": 1e4, "chandrasekhar-2048": 1e3, "batch-256x64": 10.0}
SCIPY = {
    "tanh-1024": {"method": "bicgstab", "inner_maxiter": 20},
    "bratu-64": {"method": "lgmres", "inner_maxiter": 50},
    "bratu-128": {"method": "lgmres", "inner_maxiter": 50},
    "chandrasekhar-2048": {"method": "bicgstab", "inner_maxiter": 10},
    "batch-256x64": {"method": "bicgstab", "inner_maxiter": 150},
}


def competitors(row: Row) -> list[Competitor]:
    """nksolve first: all ratios are to it."""
    chosen = [*_ours(row), nksolve("nksolve, AD at each matvec", policy=nks.Recompute())]
    restart, eta, looseness = GMRES.get(row.name, (5, 1e-1, 1.0))
    chosen += [
        optimistix("Optimistix, lx.GMRES, default restart", gmres(20), eta=1e-2),
        optimistix(
            f"Optimistix, lx.GMRES, restart {restart}", gmres(restart), eta=eta, looseness=looseness
        ),
        _tuned("Optimistix, lx.BiCGStab", bicgstab, BICGSTAB.get(row.name, (1e-2, 1.0))),
    ]
    if row.tags:
        chosen.append(_tuned("Optimistix, lx.CG", cg, CG.get(row.name, (1e-2, 1.0))))
    if row.dense:
        loose = LU.get(row.name, 1.0)
        chosen.append(optimistix("Optimistix, lx.LU", lu, looseness=loose, dense=True))
    chosen.append(scipy("SciPy newton_krylov, default"))
    settings = SCIPY.get(row.name)
    if settings is not None:
        words = ", ".join(str(value) for value in settings.values())
        chosen.append(scipy(f"SciPy newton_krylov, {words}", **settings))
    return chosen


def _ours(row: Row) -> list[Competitor]:
    """The choice that docs/how-to-choose.md makes first, then the default."""
    default = nksolve("nksolve, default (GMRES)")
    if row.tags:  # a diffusion operator on a square
        return [
            nksolve("nksolve, GMRES + Spectral", linear_solver=nks.GMRES(preconditioner=_SPECTRAL)),
            nksolve("nksolve, CG", linear_solver=nks.CG()),
            default,
        ]
    if row.lanes:
        return [
            nksolve("nksolve, GMRES(10)", linear_solver=nks.GMRES(restart=10)),
            default,
            nksolve("nksolve, BiCGStab", linear_solver=nks.BiCGStab()),
        ]
    return [default]


_SPECTRAL = nks.Spectral()


def _tuned(name: str, linear_solver, knobs: tuple[float, float]) -> Competitor:
    return optimistix(name, linear_solver, eta=knobs[0], looseness=knobs[1])

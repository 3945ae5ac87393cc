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
    chosen = [nksolve("nksolve"), nksolve("nksolve, AD at each matvec", policy=nks.Recompute())]
    if row.tags:
        fields = {
            "linear_solver": nks.GMRES(restart=100, orthogonalisation=nks.MGS()),
            "forcing": nks.ConstantForcing(0.01),
        }
        chosen.append(nksolve("nksolve, GMRES(restart=100, MGS), η = 0.01", **fields))
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


def _tuned(name: str, linear_solver, knobs: tuple[float, float]) -> Competitor:
    return optimistix(name, linear_solver, eta=knobs[0], looseness=knobs[1])

"""The scan behind `choices.py`: the fastest setting of each peer that reaches the accuracy."""

import itertools as it
import time
from collections.abc import Callable, Iterator

import lineax as lx

from .competitors import Competitor, optimistix, scipy
from .rows import Row
from .timing import Measurement, judge

RESTARTS = (3, 5, 10, 20, 40, 80)
ETAS = (0.3, 1e-1, 1e-2, 1e-4)
LOOSENESSES = (1e4, 1e3, 1e2, 10.0, 1.0)


def gmres(restart: int) -> Callable:
    """`lx.GMRES` with this restart, as a function of its tolerances."""
    return lambda eta, atol: lx.GMRES(rtol=eta, atol=atol, restart=restart, max_steps=500)


def bicgstab(eta, atol):
    """`lx.BiCGStab`."""
    return lx.BiCGStab(rtol=eta, atol=atol, max_steps=5000)


def cg(eta, atol):
    """`lx.CG`."""
    return lx.CG(rtol=eta, atol=atol, max_steps=5000)


def lu(eta, atol):
    """`lx.LU`."""
    return lx.LU()


def _peers(row: Row) -> Iterator[tuple[str, Competitor]]:
    for restart in RESTARTS:
        if restart <= row.size:
            yield "gmres", optimistix(f"restart={restart}", gmres(restart))
    yield "bicgstab", optimistix("", bicgstab)
    if row.tags:
        yield "cg", optimistix("", cg)
    yield "lu", optimistix("", lu)


def _scipy_peers() -> Iterator[tuple[dict, Competitor]]:
    for method, inner in it.product(("lgmres", "gmres", "bicgstab"), (10, 20, 50, 150)):
        settings = {"method": method, "inner_maxiter": inner}
        yield settings, scipy("", **settings)


def tune(row: Row) -> Iterator[str]:
    """Prints what wins on a row, family by family; CPU time of the better of two runs."""
    best: dict[str, tuple[float, str]] = {}
    for family, peer in _peers(row):
        if family == "lu" and not row.dense:
            continue
        solve = peer.prepare(row, row.fn)
        solve()
        etas = (1e-2,) if family == "lu" else ETAS
        for knobs in it.product(etas, LOOSENESSES):
            seconds, failure = _try(row, lambda knobs=knobs, solve=solve: solve(knobs))
            if failure is None and seconds < best.get(family, (float("inf"),))[0]:
                setting = f"{peer.name} eta={knobs[0]:g} looseness={knobs[1]:g}"
                best[family] = seconds, setting
    for settings, peer in _scipy_peers():
        seconds, failure = _try(row, peer.prepare(row, row.fn))
        if failure is None and seconds < best.get("scipy", (float("inf"),))[0]:
            best["scipy"] = seconds, str(settings)
    for family, (seconds, setting) in best.items():
        yield f"{row.name}: {family} {setting} ({seconds * 1e3:.1f} ms CPU)"


def _try(row: Row, solve: Callable) -> tuple[float, str | None]:
    measurement = Measurement("")
    start = time.process_time()
    judge(row, solve(), measurement)
    seconds = time.process_time() - start
    if measurement.failure is None and seconds < 2.0:
        start = time.process_time()
        solve()
        seconds = min(seconds, time.process_time() - start)
    return seconds, measurement.failure

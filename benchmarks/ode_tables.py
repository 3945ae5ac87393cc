"""The tables of `python -m benchmarks --ode`."""

import itertools as it
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .ode_gradients import distance

Rows = dict[str, dict[str, Any]]


class Aim(NamedTuple):
    """Of a ratio of times at equal error: a peer's over ours."""

    what: str
    problem: str
    ours: str  # the beginning of the names of our contenders, of which the fastest counts
    peer: str  # likewise
    least: float


AIMS = (
    Aim("BRUSS-1D, 1,000: SciPy BDF, sparse", "bruss-1000", "nksolve", "SciPy BDF", 5.0),
    Aim("BRUSS-1D, 10,000: SciPy BDF, sparse", "bruss-10000", "nksolve", "SciPy BDF", 5.0),
    Aim("BRUSS-1D, 10,000: CVODE, GMRES", "bruss-10000", "nksolve", "CVODE GMRES", 200.0),
    Aim("BRUSS-1D, 1,000: Diffrax", "bruss-1000", "nksolve", "Diffrax Kvaerno5", 2000.0),
    Aim("BRUSS-1D, 1,000: CVODE, band", "bruss-1000", "nksolve", "CVODE band", 1 / 1.3),
    Aim("BRUSS-1D, 10,000: CVODE, band", "bruss-10000", "nksolve", "CVODE band", 1 / 1.3),
    Aim("BRUSS-1D, 100: Kvaerno5 of both", "bruss-100", "nksolve Kvaerno5", "Diffrax Kvaerno5", 20),
    Aim("2-D Brusselator, N = 32: SciPy BDF, sparse", "grid-32", "nksolve", "SciPy BDF", 3.0),
    Aim("2-D Brusselator, N = 128: SciPy BDF, sparse", "grid-128", "nksolve", "SciPy BDF", 5.0),
    Aim("ROBER: Diffrax", "rober", "nksolve", "Diffrax", 3.0),
    Aim("HIRES: Diffrax", "hires", "nksolve", "Diffrax", 3.0),
    Aim("ROBER, `vmap` of 1,000: Diffrax", "rober-1000", "nksolve", "Diffrax", 3.0),
)
GRADIENT_AIMS = {"checkpoints": 4.0, "default": 6.0}
BDF_GRADIENT_AIM = 8.0


def tables(results: Rows) -> list[str]:
    """The aims, the gradients, then each problem."""
    curves = {key: row for key, row in results.items() if not key.startswith("gradient")}
    slopes = {key: row for key, row in results.items() if key.startswith("gradient")}
    out = [_aims(curves)] if curves else []
    out += [_gradients(slopes), _compilation(slopes)] if slopes else []
    names = dict.fromkeys(key.partition(" | ")[0] for key in curves)
    return [*out, *(_problem(name, _of(curves, name)) for name in names)]


def seconds_at(row: dict[str, Any], error: float) -> float | None:
    """The time to that error, log-log between neighbouring points of the curve; the least where it
    passes there more than once, `None` where it does not."""
    points = useful(row)
    found = [p["seconds"] for p in points if p["error"] == error]
    for a, b in it.pairwise(points):
        low, high = sorted((math.log(a["error"]), math.log(b["error"])))
        if low < math.log(error) < high:
            share = (math.log(error) - math.log(a["error"])) / math.log(b["error"] / a["error"])
            found.append(a["seconds"] * (b["seconds"] / a["seconds"]) ** share)
    return min(found, default=None)


def useful(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The points with an error of at most 1: what is further off solved nothing."""
    return [p for p in row.get("points", []) if 0.0 < p.get("error", 0.0) <= 1.0]


def errors(rows: Rows) -> list[float]:
    """Those of all points."""
    return [p["error"] for row in rows.values() for p in useful(row)]


def fastest(rows: Rows, error: float) -> tuple[str, float] | None:
    """The contender that gets to that error first, and when."""
    times = {name: seconds_at(row, error) for name, row in rows.items()}
    reached = [(seconds, name) for name, seconds in times.items() if seconds is not None]
    return (min(reached)[1], min(reached)[0]) if reached else None


def compared(ours: Rows, peers: Rows) -> list[tuple[float, float, str, str]]:
    """(error, peer's time over ours, our contender, the peer's) at errors that both curves pass,
    evenly spaced in log."""
    theirs = errors(peers)
    if not theirs or not errors(ours):
        return []
    tried = np.geomspace(min(theirs), max(theirs), 25) if len(theirs) > 1 else theirs
    out = []
    for error in [*map(float, tried)]:
        mine, peer = fastest(ours, error), fastest(peers, error)
        if mine and peer:
            out.append((error, peer[1] / mine[1], mine[0], peer[0]))
    return out


def _aims(curves: Rows) -> str:
    columns = ("", "aim", "ratio", "least to greatest", "error", "ours", "peer", "")
    lines = ["### Time of a peer over ours, at equal error", "", _row(columns)]
    lines.append(_row(["---", "--:", "--:", "--:", "--:", "---", "---", "---"]))
    for aim in AIMS:
        rows = _of(curves, aim.problem)
        ours = {name: row for name, row in rows.items() if name.startswith(aim.ours)}
        peers = {name: row for name, row in rows.items() if name.startswith(aim.peer)}
        if not ours or not peers:
            continue
        found = compared(ours, peers)
        first = [aim.what, f"{aim.least:.2g}" if aim.least < 100 else f"{aim.least:,.0f}"]
        if not found:
            why = next((row["failure"] for row in peers.values() if row.get("failure")), "")
            lines.append(_row([*first, "not reached", "", "", "", why, ""]))
            continue
        found.sort(key=lambda one: one[0])
        error, ratio, mine, peer = found[len(found) // 2]
        every = [one[1] for one in found]
        spread = f"{_digits(min(every))} to {_digits(max(every))}" if len(every) > 1 else ""
        verdict = "met" if ratio >= aim.least else "missed"
        cells = [_digits(ratio), spread, f"{error:.0e}", mine, peer, verdict]
        lines.append(_row([*first, *cells]))
    return "\n".join(lines)


def _gradients(slopes: Rows) -> str:
    columns = (
        "", "steps", "forward, ms", "gradient/forward, checkpoints ≥ steps", "default",
        "aims", "difference of the gradient",
    )  # fmt: skip
    lines = ["### Gradients, rtol = 1e-6", "", _row(columns), _row(["---"] + ["--:"] * 6)]
    for key, row in slopes.items():
        _, name, contender = key.split(" | ")
        title = f"{name}, {contender}"
        if "default" not in row:
            lines.append(_row([title, row.get("failure", "–"), "", "", "", "", ""]))
            continue
        peer = slopes.get(f"gradient | {name} | Diffrax Kvaerno5", {})
        apart = f"{distance(row, peer):.1e}" if peer is not row and "default" in peer else ""
        aims = "" if contender.startswith("Diffrax") else "4, 6"
        aims = "8" if contender.endswith("BDF") else aims
        ratios = [_digits(row[kind] / row["forward"]) for kind in ("checkpoints", "default")]
        cells = [str(row["steps"]), _digits(1e3 * row["forward"]), *ratios, aims, apart]
        lines.append(_row([title, *cells]))
    return "\n".join(lines)


def _compilation(slopes: Rows) -> str:
    columns = ("", "forward", "gradient", "gradient, checkpoints ≥ steps")
    lines = ["### Seconds to trace and compile, no cache", "", _row(columns)]
    lines.append(_row(["---"] + ["--:"] * 3))
    for key, row in slopes.items():
        if "default" in row:
            names = ("forward_compile", "default_compile", "checkpoints_compile")
            cells = [f"{row[name]:.1f}" for name in names]
            lines.append(_row([key.removeprefix("gradient | ").replace(" | ", ", "), *cells]))
    return "\n".join(lines)


def _problem(name: str, rows: Rows) -> str:
    """Milliseconds to each decade of the error."""
    from .ode_problems import problem

    every = errors(rows)
    if not every:
        return f"### {problem(name).title}\n\nNothing was measured."
    decades = range(math.floor(math.log10(max(every))), math.ceil(math.log10(min(every))) - 1, -1)
    columns = [f"1e{k}" for k in decades]
    lines = [f"### {problem(name).title}: milliseconds to an error of", ""]
    lines += [
        _row(["", *columns, "compile, s", "evaluations + matvecs at the smallest error"]),
        _row(["---"] + ["--:"] * (len(columns) + 2)),
    ]
    for contender, row in rows.items():
        times = [seconds_at(row, 10.0**k) for k in decades]
        cells = [_digits(1e3 * s) if s else "" for s in times]
        finished = useful(row)
        if len(finished) == 1:
            (only,) = finished
            cells[0] = f"{_digits(1e3 * only['seconds'])} to {only['error']:.0e}"
        if not finished:
            cells[0] = row.get("failure", "not reached").replace("|", "/")
        counted = [p for p in finished if "work" in p]
        last = min(counted, key=lambda p: p["error"]) if counted else None
        work = f"{last['work']:,} at {last['error']:.0e}" if last else ""
        compiled = f"{row['compile']:.1f}" if "compile" in row else ""
        lines.append(_row([contender, *cells, compiled, work]))
    return "\n".join(lines)


def _of(curves: Rows, name: str) -> Rows:
    start = f"{name} | "
    return {k.removeprefix(start): row for k, row in curves.items() if k.startswith(start)}


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _digits(x: float) -> str:
    """Two significant digits, none of them an exponent."""
    if not math.isfinite(x) or x <= 0:
        return "–"
    return f"{x:,.{max(0, 1 - math.floor(math.log10(x)))}f}"

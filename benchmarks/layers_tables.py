"""The tables of `python -m benchmarks --layers`."""

import math
from collections.abc import Iterator
from typing import Any

FAMILIES = ("nksolve", "torchdeq", "jaxopt", "Optimistix")


def tables(results: dict[Any, dict[str, dict[str, Any]]]) -> list[str]:
    """A summary, then one table for each size, precision, mode and spectrum."""
    groups: dict[tuple, dict[float, dict[str, dict[str, Any]]]] = {}
    for case, rows in results.items():
        key = case.spectrum, case.dtype, case.mode, case.size
        groups.setdefault(key, {})[case.rho] = rows
    return [_summary(groups), *(_table(*key, by_rho) for key, by_rho in groups.items())]


def _summary(groups: dict[tuple, dict[float, dict[str, dict[str, Any]]]]) -> str:
    columns = ("cell", "nksolve, ms", "its fastest row", *FAMILIES[1:], "compile")
    lines = ["### The fastest of each library, times that of nksolve", "", _row(columns)]
    lines.append(_row(["---", "--:", "---", *["--:"] * 4]))
    for (spectrum, dtype, mode, size), by_rho in groups.items():
        for rho, rows in by_rho.items():
            best = {family: _best(rows, family) for family in FAMILIES}
            name, ours = best["nksolve"]
            title = f"D = {size}, ρ = {rho:g}, {dtype}, {mode}"
            title += "" if spectrum == "symmetric" else f", {spectrum}"
            if ours is None:
                lines.append(_row([title, "–", "", "", "", "", ""]))
                continue
            peers = [best[family][1] for family in FAMILIES[1:]]
            ratios = [_ratio(p and p["seconds"], ours["seconds"]) for p in peers]
            fastest = [p for p in peers if p is not None and p["compile_seconds"]]
            fastest = min(fastest, key=lambda p: p["seconds"], default=None)
            compiled = _ratio(ours["compile_seconds"], fastest and fastest["compile_seconds"])
            short = name.removeprefix("nksolve ")
            lines.append(_row([title, _ms(ours["seconds"]), short, *ratios, compiled]))
    return "\n".join(lines)


def _table(
    spectrum: str, dtype: str, mode: str, size: int, by_rho: dict[float, dict[str, dict[str, Any]]]
) -> str:
    tol = "1e-6" if dtype == "float32" else "1e-10"
    lines = [f"### D = {size}, {mode}, {dtype} to {tol}, {spectrum}", ""]
    columns = [f"ρ = {rho:g}, ms (gradient error)" for rho in by_rho]
    lines += [
        _row(["solver", *columns, "compile, s"]),
        _row(["---", *["--:"] * len(by_rho), "--:"]),
    ]
    names = list(dict.fromkeys(name for rows in by_rho.values() for name in rows))
    for name in names:
        found = [rows.get(name) for rows in by_rho.values()]
        compiled = [f["compile_seconds"] for f in found if f and f.get("compile_seconds")]
        last = f"{min(compiled):.1f}" if compiled else "–"
        lines.append(_row([name, *(_cell(f) for f in found), last]))
    return "\n".join(lines)


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    if result.get("failure"):
        text = str(result["failure"]).replace("|", "/")
        return text if len(text) <= 40 else f"{text.partition(':')[0]}"
    return f"{_ms(result['seconds'])} ({result['gradient_error']:.0e})"


def _best(rows: dict[str, dict[str, Any]], family: str) -> tuple[str, dict[str, Any] | None]:
    def finished() -> Iterator[tuple[str, dict[str, Any]]]:
        for name, result in rows.items():
            if name.startswith(family) and not result.get("failure"):
                yield name, result

    return min(finished(), key=lambda pair: pair[1]["seconds"], default=("", None))


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2g}" if a and b else "–"


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.{max(0, 1 - math.floor(math.log10(ms)))}f}"


def _row(columns: Any) -> str:
    return "| " + " | ".join(columns) + " |"

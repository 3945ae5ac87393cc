"""Measurements as markdown."""

import math
from collections.abc import Sequence

from .compiling import CompileTime
from .rows import Row
from .timing import Measurement

_COLUMNS = (
    "solver", "wall ms", "ratio", "CPU ms", "ratio", "‖F‖/‖F₀‖", "steps", "fn", "matvecs",
)  # fmt: skip
_COMPILE = (
    "problem", "solver", "forward: trace", "compile", "gradient: trace", "compile", "run, ms",
)  # fmt: skip


def solve_table(row: Row, measurements: Sequence[Measurement]) -> str:
    """One problem: a line for each solver; ratios of the times to those of the first."""
    first = measurements[0]
    lines = [f"### {row.title}, to {row.rtol:g}", "", *_header(_COLUMNS)]
    lines += [_line(_cells(m, first)) for m in measurements]
    return "\n".join(lines)


def _cells(m: Measurement, first: Measurement) -> list[str]:
    if m.failure is not None:
        return [m.name, "failed", "", "", "", f"{m.ratio:.1e}", _or_dash(m.steps), "", m.failure]
    return [
        m.name,
        _digits(1e3 * m.median),
        _digits(m.median / first.median),
        _digits(1e3 * m.median_cpu),
        _digits(m.median_cpu / first.median_cpu),
        f"{m.ratio:.1e}",
        _or_dash(m.steps),
        _or_dash(m.evaluations),
        _or_dash(m.matvecs),
    ]


def compile_table(entries: Sequence[tuple[Row, CompileTime]]) -> str:
    """Seconds to compile."""
    lines = _header(_COMPILE)
    for row, entry in entries:
        seconds = [f"{x:.2f}" for x in entry[1:-1]]
        run = "fails" if math.isnan(entry.gradient_run) else _digits(1e3 * entry.gradient_run)
        lines.append(_line([row.name, entry.solver, *seconds, run]))
    return "\n".join(lines)


def _header(columns: Sequence[str]) -> list[str]:
    # The first column that holds numbers is the first that is not a name.
    names = [c in ("problem", "solver") for c in columns]
    return [_line(columns), _line(["---" if name else "--:" for name in names])]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _or_dash(number: int | None) -> str:
    return "–" if number is None else str(number)


def _digits(x: float) -> str:
    """Three significant digits, none of them an exponent."""
    if not math.isfinite(x):
        return "–"
    return f"{x:.{max(0, 2 - math.floor(math.log10(x)))}f}" if x > 0 else "0"

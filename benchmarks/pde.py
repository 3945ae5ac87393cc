"""Partial differential equations, preconditioned: `python -m benchmarks --pde [--small] [--write]`.

nksolve beside PETSc in C, SciPy and Optimistix, and writes docs/validation/pde.md.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from . import jacobian_1d, petsc
from .pde_cases import Case, bratu, brusselator
from .pde_ours import ours
from .pde_peers import peers
from .pde_timing import Result, measure

PAGE = Path(__file__).resolve().parent.parent / "docs" / "validation" / "pde.md"
_COLUMNS = (
    "solver", "seconds", "ratio", "µs/unknown", "Newton", "Krylov", "residual/target",
)  # fmt: skip


def cases(*, small: bool) -> list[Case]:
    """The problems, smallest grid first."""
    if small:
        return [bratu(15), bratu(31), brusselator(16)]
    grids = [bratu(n) for n in (127, 255, 511, 1023)]
    return [*grids, *(brusselator(n) for n in (32, 64, 128))]


def report(
    *, small: bool, only: Sequence[str], repeats: int, budget: float, limit: float = 60.0
) -> str:
    """All tables; `only` keeps the families `bratu`, `brusselator`, `jacobian`."""
    parts = [_about_petsc()]
    before: dict[str, dict[str, tuple[int, Result]]] = {}
    for case in cases(small=small):
        if only and case.family not in only:
            continue
        theirs, note = peers(case)
        results = measure(
            case,
            [*ours(case), *theirs],
            repeats=repeats,
            limit=limit,
            budget=budget,
            before=before.setdefault(case.family, {}),
        )
        parts.append(_table(case, results, note))
        print(parts[-1], flush=True)
    if not only or "jacobian" in only:
        for n in (20,) if small else (500, 5000):
            parts.append(_jacobian(n, repeats=5 if small else 30))
            print(parts[-1], flush=True)
    return "\n\n".join(parts)


def _about_petsc() -> str:
    found, reason = petsc.find()
    if found is None:
        return f"**PETSc is missing: {reason}. Its lines were left out.**"
    compiler = " ".join(found.compile[1:3])
    return f"PETSc {found.version}, `{Path(found.compile[0]).name} {compiler}`."


def _table(case: Case, results: Sequence[Result], note: str) -> str:
    first = results[0].best
    lines = [f"### {case.title}", "", _row(_COLUMNS), _row(["---"] + ["--:"] * 6)]
    for result in results:
        best = result.best
        if best is None:
            lines.append(_row([result.name, result.remark, "", "", "", "", ""]))
            continue
        ratio = "–" if first is None else _digits(best.seconds / first.seconds)
        each = _digits(1e6 * best.seconds / case.size)
        residual = "–" if math.isnan(best.residual) else f"{best.residual:.2g}"
        counts = [str(c) if c is not None else "–" for c in (best.newton, best.krylov)]
        lines.append(_row([result.name, _digits(best.seconds), ratio, each, *counts, residual]))
    if note:
        lines += ["", f"Left out: {note}."]
    return "\n".join(lines)


def _jacobian(n: int, repeats: int) -> str:
    lines = jacobian_1d.measure(n, repeats)
    columns = ("solver", "factor, µs", "solve, µs", "both", "ratio", "relative residual")
    out = [f"### Jacobian of the 1-D Brusselator, {2 * n} unknowns, blocks of 2, float64", ""]
    out += [_row(columns), _row(["---"] + ["--:"] * 5)]
    total = lambda line: line.factor + (0.0 if math.isnan(line.solve) else line.solve)
    for line in lines:
        cells = [_digits(x) for x in (line.factor, line.solve, total(line))]
        ratio = _digits(total(line) / total(lines[0]))
        out.append(_row([line.name, *cells, ratio, f"{line.residual:.1e}"]))
    return "\n".join(out)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _digits(x: float) -> str:
    """Three significant digits, none of them an exponent."""
    if not math.isfinite(x) or x <= 0:
        return "–"
    return f"{x:.{max(0, 2 - math.floor(math.log10(x)))}f}"

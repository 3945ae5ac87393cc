"""How every solver ends on every problem, near and far, and whether it says so: no clock.

The law is that of `tests/newton/census.py`; a broken clause would stand in the last column.
"""

from collections import Counter
from pathlib import Path

import nksolve as nks
from tests.newton.catalogue import SOLVERS
from tests.newton.census import Verdict, judged, lanes, members, most_steps, solved

PAGE = Path(__file__).resolve().parent.parent / "docs" / "validation" / "honesty.md"
REASONS = [name for name in nks.REASONS._name_to_item if name != "iterating"]
DTYPES = ("float64", "float32")


def verdicts(dtype: str, names: list[str], *, small: bool) -> dict[str, Verdict]:
    """Of each solver."""
    given = lanes(2 if small else 24, dtype, 1 if small else 12)
    found = {}
    for name in names:
        ended = solved(name, given, dtype, most_steps(name))
        found[name] = judged(name, given, ended, dtype)
        print(dtype, name, dict(found[name].reasons), found[name].broken, flush=True)
    return found


def table(found: dict[str, Verdict]) -> str:
    """How many solves ended for which reason."""
    head = "| | solves | " + " | ".join(f"`{r}`" for r in REASONS) + " | broken |"
    lines = [head, "|---|--:|" + "--:|" * (len(REASONS) + 1)]
    total: Counter[str] = Counter()
    for name, verdict in found.items():
        counts = Counter(verdict.reasons)
        counts["broken"] = sum(len(bad) for bad in verdict.broken.values())
        total += counts
        lines.append(_row(name, counts))
    return "\n".join([*lines, _row("all", total)])


def _row(name: str, counts: Counter[str]) -> str:
    solves = sum(counts[r] for r in REASONS)
    return (
        f"| {name} | {solves} | " + " | ".join(str(counts[r]) for r in [*REASONS, "broken"]) + " |"
    )


def report(*, small: bool, only: list[str], repeats: int, budget: float) -> str:
    """A table for each dtype, and the sums."""
    del repeats, budget
    names = [n for n in SOLVERS if n in only] or list(SOLVERS)[:: 12 if small else 1]
    parts, solves, successes, same, void, broken = [], 0, 0, 0, 0, 0
    for dtype in DTYPES:
        found = verdicts(dtype, names, small=small)
        problems = len(members(2 if small else 24, dtype))
        parts.append(f"### {dtype}, {problems} problems\n\n{table(found)}")
        for verdict in found.values():
            solves += verdict.reasons.total()
            successes += sum(verdict.reasons[r] for r in REASONS if r.startswith("residual"))
            same, void = same + verdict.same, void + verdict.void
            broken += sum(len(bad) for bad in verdict.broken.values())
    told = (
        f"**{solves:,} solves, {successes:,} successes, {broken} broken clauses.** In {same:,} "
        f"solves the program of the solve and the one that recomputes ‖F‖ agree to the last bit; "
        f"for {void} successes the bound is infinite, and says nothing."
    )
    return "\n\n".join([told, *parts])

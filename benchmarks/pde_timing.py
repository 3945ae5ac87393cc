"""Times of the contenders on a case: interleaved runs, the least of each, a limit for the slow."""

import dataclasses
import gc
from collections.abc import Sequence

from .pde_cases import Case, Contender, Outcome


@dataclasses.dataclass
class Result:
    """One contender on one case."""

    name: str
    best: Outcome | None = None
    remark: str = ""  # why there is no time
    spent: float = 0.0
    runs: int = 0


def measure(
    case: Case,
    contenders: Sequence[Contender],
    *,
    repeats: int,
    limit: float,
    budget: float,
    before: dict[str, tuple[int, Result]],
) -> list[Result]:
    """Runs them in turn, `repeats` times; each for at most `budget` seconds and one run.

    `before` has the results on the next smaller grid: who would take longer than the limit here
    by the least growth to be expected, or failed there, is not run. It is brought up to date.
    """
    results, running = [], []
    for contender in contenders:
        result = Result(contender.name, remark=_hopeless(contender, before, limit))
        results.append(result)
        if not result.remark:
            solve = contender.prepare(case, limit)
            _once(solve, result)
            running.append((solve, result))
    for _ in range(repeats - 1):
        for solve, result in running:
            if not result.remark and result.spent * (result.runs + 1) / result.runs < budget:
                _once(solve, result)
    before.update({r.name: (case.n, r) for r in results})
    return results


def _hopeless(contender: Contender, before: dict[str, tuple[int, Result]], limit: float) -> str:
    if contender.name not in before:
        return ""
    n, last = before[contender.name]
    if last.best is None:
        return last.remark if last.remark.startswith("not run") else f"not run: failed at {n}²"
    if last.best.seconds * contender.growth > limit:
        return f"not run: {last.best.seconds:.3g} s at {n}², would pass {limit:g} s"
    return ""


def _once(solve, result: Result) -> None:
    gc.collect()
    outcome = solve()
    result.runs += 1
    result.spent += outcome.seconds
    if outcome.failure is not None:
        result.remark, result.best = outcome.failure, None
    elif result.best is None or outcome.seconds < result.best.seconds:
        result.best = outcome

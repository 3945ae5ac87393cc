"""One contender of `python -m benchmarks --ode` on one problem: its work–precision curve."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .ode_problems import Problem


class Solved(NamedTuple):
    """A solve's end value, and what it counted."""

    y: np.ndarray
    success: bool
    counts: dict[str, int]


class Runner(NamedTuple):
    """A compiled contender. `count(rtol)` is evaluations + matvecs, in an untimed run; `None` where
    `solve` tells them itself, as `work`."""

    solve: Callable[[float], Solved]
    compile_seconds: float
    count: Callable[[float], int] | None = None


def curve(
    known: Problem,
    runner: Runner,
    reference: np.ndarray,
    *,
    repeats: int,
    budget: float,
    ladder: tuple[float, ...] | None = None,
) -> Iterator[dict[str, Any]]:
    """A point for each rtol, loose ones first, while the budget of seconds lasts; one at least.

    The time is the least of several runs: of `repeats`, or as many as fit the point's share of the
    budget.
    """
    ladder = known.ladder if ladder is None else ladder
    spent, counting = 0.0, 0.0
    for i, rtol in enumerate(ladder):
        share = max(0.0, budget - spent) / (len(ladder) - i)
        runs: list[float] = []
        # (The very first run pays for imports and caches, so that it is made twice if it can be.)
        while len(runs) < max(repeats, 2) and (
            not runs
            or sum(runs) + runs[-1] <= share
            or (i == 0 and len(runs) == 1 and runs[0] <= budget)
        ):
            start = time.perf_counter()
            solved = runner.solve(rtol)
            runs.append(time.perf_counter() - start)
        spent += sum(runs)
        point = {"rtol": rtol, "seconds": min(runs), "runs": len(runs), **solved.counts}
        if solved.success and np.all(np.isfinite(solved.y)):
            point["error"] = known.error(solved.y, reference)
        if runner.count is not None and counting + min(runs) <= budget:
            start = time.perf_counter()
            point["work"] = runner.count(rtol)
            counting += 2.0 * (time.perf_counter() - start)  # that of the next is larger
        yield point
        if spent + 2.0 * min(runs) > budget:
            return

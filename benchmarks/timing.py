"""Medians of interleaved runs, work counted in a run of its own, and times to compile."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Sequence

from tests.helpers.counting import Counter

from .competitors import Competitor, Outcome, Solve
from .rows import Row


@dataclasses.dataclass
class Measurement:
    """One competitor on one row; times in seconds."""

    name: str
    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    ratio: float = float("nan")  # ‖F‖/‖F₀‖ at the end
    steps: int | None = None
    evaluations: int | None = None
    matvecs: int | None = None
    failure: str | None = None

    @property
    def median(self) -> float:
        """Wall time."""
        return statistics.median(self.wall) if self.wall else float("nan")

    @property
    def median_cpu(self) -> float:
        """Time on all cores together: not disturbed by what else runs on the machine."""
        return statistics.median(self.cpu) if self.cpu else float("nan")


def measure(
    row: Row, competitors: Sequence[Competitor], *, repeats: int, budget: float
) -> list[Measurement]:
    """Runs the competitors in turn, `repeats` times; each for at most `budget` seconds in all."""
    measurements, running = [], []
    for competitor in competitors:
        measurement = Measurement(competitor.name)
        measurements.append(measurement)
        solve = competitor.prepare(row, row.fn)
        outcome = solve()
        judge(row, outcome, measurement)
        if measurement.failure is None:
            count(row, competitor, measurement)
        running.append((solve, measurement))
    for _ in range(repeats):
        for solve, measurement in running:
            if sum(measurement.wall) + (measurement.wall or [0.0])[-1] < budget:
                _time(solve, measurement)
    return measurements


def judge(row: Row, outcome: Outcome, measurement: Measurement) -> None:
    """Notes the steps, the accuracy, and whether it failed."""
    measurement.steps = outcome.steps
    measurement.ratio = row.residual_ratio(outcome.value)
    measurement.failure = outcome.failure
    # In float32 the residual as computed differs from the true one by rounding.
    if outcome.failure is None and not measurement.ratio <= 1.05 * row.rtol:
        measurement.failure = "reports success, but ‖F‖ is above the tolerance"


def count(row: Row, competitor: Competitor, measurement: Measurement) -> None:
    """Counts evaluations of fn and products with its Jacobian; a dense one counts n products."""
    counter = Counter()
    solve = competitor.prepare(row, lambda y, args: row.fn(counter.tick(y), args))
    with counter.measure() as work:
        solve()
    lanes = row.y0.shape[0] if row.lanes else 1
    measurement.evaluations = sum(_weight(n, lanes) for n in work.lanes("primal"))
    products = sum(_weight(n, lanes) for n in work.lanes("tangent"))
    measurement.matvecs = measurement.evaluations * row.size if competitor.dense else products


def _weight(size: int | None, lanes: int) -> int:
    return max((size or 1) // lanes, 1)


def _time(solve: Solve, measurement: Measurement) -> None:
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    solve()
    measurement.wall.append(time.perf_counter() - wall)
    measurement.cpu.append(time.process_time() - cpu)

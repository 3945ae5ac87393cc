"""One contender of `python -m benchmarks --layers` on one cell: loosest tolerances, least time.

A contender has a few variants (depth, restart, forcing, …). For each the loosest forward and
backward tolerances are found with which the residuals, recomputed in float64, are as small as
asked; then it is timed, and the fastest variant stands in the table.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import layers_cells as cells

# Tolerances tried, in units of the one asked for: quarters of a decade.
_LOOSEST, _TIGHTEST = 4, -8


class Step(NamedTuple):
    """What a training step returns."""

    z: Any
    moved: Any  # dL/d(injection)
    grads: tuple[Any, Any, Any]  # dL/dV, dL/dU, dL/db


class Prepared(NamedTuple):
    """A compiled training step: step(forward tolerance, backward tolerance), finished on return."""

    step: Callable[[float, float], Step]
    compile_seconds: float | None


@dataclasses.dataclass(frozen=True)
class Units:
    """‖z‖ and ‖λ‖ of the joint system and the least of a sample; tolerances are told in them."""

    z_joint: float
    z_sample: float
    adjoint_joint: float  # ‖λ‖/‖c‖
    adjoint_sample: float

    @staticmethod
    def of(known: cells.Cell) -> "Units":
        """Of that cell."""
        multiplier = known.c + known.moved @ known.V.T
        norm = lambda a: np.linalg.norm(a, axis=1)
        return Units(
            float(np.linalg.norm(known.z)),
            float(norm(known.z).min()),
            float(np.linalg.norm(multiplier) / np.linalg.norm(known.c)),
            float((norm(multiplier) / norm(known.c)).min()),
        )


class Variant(NamedTuple):
    """`prepare(cell, units, dtype)` compiles a training step."""

    label: str
    prepare: Callable[[cells.Cell, Units, str], Prepared]


@dataclasses.dataclass
class Measured:
    """A row of the tables."""

    seconds: float | None = None
    compile_seconds: float | None = None
    forward: float = float("nan")
    backward: float = float("nan")
    gradient_error: float = float("nan")
    label: str = ""
    tolerances: tuple[float, float] = (0.0, 0.0)
    failure: str = ""


class _TooSlow(Exception):
    pass


def measure(
    variants: Sequence[Variant],
    known: cells.Cell,
    dtype: str,
    tol: float,
    *,
    repeats: int,
    limit: float,
    budget: float,
) -> Measured:
    """The fastest variant, each timed `repeats` times or for `budget` seconds.

    A variant that takes more than `limit` seconds a step is given up.
    """
    units, best, failures = Units.of(known), Measured(), []
    for variant in variants:
        try:
            prepared = variant.prepare(known, units, dtype)
            found = _tuned(prepared, known, tol, limit)
        except _TooSlow as slow:
            found = Measured(failure=str(slow))
        except Exception as error:
            lines = str(error).strip().splitlines()
            found = Measured(failure=f"{type(error).__name__}: {lines[0][:80] if lines else ''}")
        else:
            if not found.failure:
                found.seconds = _least(prepared, found.tolerances, repeats, budget)
                found.compile_seconds = prepared.compile_seconds
        found.label = variant.label
        if found.failure:
            failures.append(found)
        elif best.seconds is None or found.seconds < best.seconds:
            best = found
        prepared = None
        gc.collect()
    return failures[0] if best.seconds is None and failures else best


def _tuned(prepared: Prepared, known: cells.Cell, tol: float, limit: float) -> Measured:
    def run(forward: int, backward: int) -> Measured:
        tolerances = tol * 10 ** (forward / 4), tol * 10 ** (backward / 4)
        start = time.perf_counter()
        out = prepared.step(*tolerances)
        seconds = time.perf_counter() - start
        if seconds > limit:
            raise _TooSlow(f"{seconds:.3g} s a step")
        z, moved = np.asarray(out.z), np.asarray(out.moved)
        error = cells.gradient_error(known, np.asarray(out.grads[0]))
        both = cells.residuals(known, z, moved)
        return Measured(None, None, *both, error, tolerances=tolerances)

    forward = _loosest(lambda k: run(k, _LOOSEST), lambda m: m.forward <= tol)
    if isinstance(forward, Measured):
        return dataclasses.replace(forward, failure=f"forward residual {forward.forward:.1e}")
    backward = _loosest(lambda k: run(forward, k), lambda m: m.backward <= tol)
    if isinstance(backward, Measured):
        return dataclasses.replace(backward, failure=f"backward residual {backward.backward:.1e}")
    return run(forward, backward)


def _loosest(run: Callable[[int], Measured], passes: Callable[[Measured], bool]) -> int | Measured:
    """Bisection for the largest exponent that passes; the last that failed if none does."""
    low, high, failed = _TIGHTEST - 1, _LOOSEST + 1, None
    while high - low > 1:
        middle = (low + high + 1) // 2
        middle = min(max(middle, _TIGHTEST), _LOOSEST)
        if middle in (low, high):
            break
        out = run(middle)
        if passes(out):
            low = middle
        else:
            high, failed = middle, out
    if low >= _TIGHTEST:
        return low
    assert failed is not None
    return failed


def _least(
    prepared: Prepared, tolerances: tuple[float, float], repeats: int, budget: float
) -> float:
    least, spent = float("inf"), 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        prepared.step(*tolerances)
        seconds = time.perf_counter() - start
        least, spent = min(least, seconds), spent + seconds
        if spent + seconds > budget:
            break
    return least

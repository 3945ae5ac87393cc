"""A catalogue of badly behaved residuals: why each solver stops, and that the best point is kept.

Which points were evaluated is told by the residual itself, not by the solver.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks

from .catalogue import SOLVERS, Wanted
from .solving import SUCCESS, all_finite, reason, run, two_norm


def _wall(y):  # NaN beyond 2.5; the full step from (2.4, 0.1) goes to 20
    return jnp.where(jnp.any(y > 2.5), jnp.nan, y**2 - 4.0)


def _jump(y):  # from −1.5 to ½ at ½, without a zero
    return y - 1.0 + jnp.where(y > 0.5, 1.0, -1.0)


def _singular_start(y):
    return jnp.stack([y[0] ** 2 - 1.0, y[1] - 1.0])


def _singular_root(y):
    return (y - 1.0) ** 2


def _singular(y):
    return jnp.stack([y[0] + y[1] - 2.0, 2.0 * (y[0] + y[1]) - 4.0])


def _inconsistent(y):
    return jnp.stack([y[0] + y[1] - 2.0, y[0] + y[1] - 3.0])


def _no_root(y):
    return y**2 + 1.0


def _local_minimum(y):  # of |F|, at 1; the root is at −2.10
    return y**3 - 3.0 * y + 3.0


def _overflow(y):  # e⁷¹⁰ is infinite
    return jnp.exp(300.0 * y) - 1.0


def _constant(y):
    return 0.0 * y + 1.0


def _nan_slope(y):  # F = 1 at 0, J is NaN
    return jnp.sign(y) * jnp.sqrt(jnp.abs(y)) + 1.0


def _infinite_slope(y):  # at the root
    return jnp.sqrt(y)


def _infinite_start(y):
    return y + 1.0 / (y - 1.0)


def _nan_start(y):
    return y + jnp.log(-y)


def _root_start(y):
    return y**2 - 1.0


class Kind(NamedTuple):
    """A residual, where to start, the reason expected, and the solvers that have another one."""

    fn: Callable[[Any], Any]
    y0: tuple[float, float]
    reason: str
    but: dict[str, str] | None = None


_SEARCHES = "Backtracking Feasible Switching RightPreconditioned LeftPreconditioned"
_REGIONS = "Dogleg Hookstep LevenbergMarquardt"
_EVALUATING = "Anderson NGMRES Broyden"

KINDS = {
    "NaN beyond a wall": Kind(_wall, (2.4, 0.1), "residual_rtol", {"nonfinite": "FullStep"}),
    "a jump": Kind(
        _jump,
        (3.0, 3.0),
        "line_search_failed",
        {
            "trust_region_failed": _REGIONS,
            "stagnated": "FullStep NonMonotone CriticalPoint Anderson NGMRES",
            "max_steps": "NLEQErr PseudoTransient Robust Broyden",
        },
    ),
    # LSMR's d = (0, 1) leads to (0, 1), where F is orthogonal to the range of J.
    "singular at the start": Kind(
        _singular_start,
        (0.0, 0.0),
        "residual_rtol",
        {"linear_solve_failed": "LevenbergMarquardt", "residual_atol": "LeftPreconditioned"},
    ),
    "singular at the root": Kind(_singular_root, (3.0, 3.0), "residual_rtol"),
    "singular everywhere": Kind(
        _singular,
        (3.0, 5.0),
        "residual_rtol",
        {"residual_atol": "LevenbergMarquardt LeftPreconditioned"},
    ),
    "singular everywhere, no root": Kind(
        _inconsistent,
        (3.0, 5.0),
        "linear_solve_failed",
        {"stagnated": f"PseudoTransient {_EVALUATING}"},
    ),
    "no root": Kind(
        _no_root,
        (3.0, 3.0),
        "line_search_failed",
        {
            "trust_region_failed": _REGIONS,
            "stagnated": f"FullStep PseudoTransient {_EVALUATING}",
            "max_steps": "CriticalPoint Scaled",
            "diverged": "Robust",
        },
    ),
    "a local minimum": Kind(
        _local_minimum,
        (2.0, 2.0),
        "line_search_failed",
        {
            "trust_region_failed": _REGIONS,
            "residual_rtol": "NonMonotone PseudoTransient Robust Anderson Broyden",
            "diverged": "FullStep",
            "max_steps": "CriticalPoint",
            "stagnated": "NGMRES",
        },
    ),
    "overflow": Kind(
        _overflow,
        (-0.1, -0.05),
        "residual_rtol",
        {
            "trust_region_failed": _REGIONS,
            "nonfinite": "FullStep CriticalPoint Broyden",
            "diverged": "PseudoTransient Anderson",
            "stagnated": "NGMRES",
            "line_search_failed": "LeftPreconditioned",
        },
    ),
    "constant": Kind(
        _constant,
        (1.0, 1.0),
        "linear_solve_failed",
        {"stagnated": f"PseudoTransient {_EVALUATING}"},
    ),
    "NaN in J alone": Kind(
        _nan_slope, (0.0, 0.0), "linear_solve_failed", {"residual_rtol": _EVALUATING}
    ),
    "J infinite at the root": Kind(
        _infinite_slope,
        (1.0, 2.0),
        "residual_rtol",
        {
            "nonfinite": f"FullStep {_REGIONS} {_EVALUATING}",
            "max_steps": "PseudoTransient",
            "residual_atol": "Switching",
        },
    ),
    "infinite at the start": Kind(_infinite_start, (1.0, 1.0), "nonfinite"),
    "NaN at the start": Kind(_nan_start, (1.0, 1.0), "nonfinite"),
    "a root at the start": Kind(_root_start, (1.0, -1.0), "residual_atol"),
}

MAIN = [
    "FullStep", "Backtracking", "NonMonotone", "CriticalPoint", "Dogleg", "Hookstep",
    "LevenbergMarquardt", "NLEQErr", "PseudoTransient", "Feasible", "Robust", "Scaled", "Anderson",
    "NGMRES", "Broyden", "Switching", "RightPreconditioned", "LeftPreconditioned",
]  # fmt: skip


def expected(kind, solver):
    named = [why for why, solvers in (kind.but or {}).items() if solver in solvers.split()]
    assert len(named) <= 1
    return named[0] if named else kind.reason


#: Points that were evaluated, with F there.
SEEN: list[tuple[np.ndarray, np.ndarray]] = []


def _see(y, f):
    SEEN.append((np.asarray(y), np.asarray(f)))


_FUNCTIONS = [kind.fn for kind in KINDS.values()]


def _any_of(y, which):
    """One program for all of them."""
    return lax.switch(which, _FUNCTIONS, y)


@functools.cache
def _telling(fn):
    """fn, which tells where it is evaluated."""

    def told(y, args):
        value = fn(y, args)
        jax.debug.callback(_see, y, value)
        return value

    return told


def watched(fn, solver, y0, args=None, **kwargs):
    """A solve, and the points that it evaluated."""
    SEEN.clear()
    solution = run(_telling(fn), solver, y0, args, **kwargs)
    jax.effects_barrier()
    return solution, list(SEEN)


def scaled_norm(solution, f):
    """‖S_F⁻¹ F‖₂, S_F = I but in `nks.Scaled`."""
    if "scaling" in solution.stats:
        f = f / np.asarray(solution.stats["scaling"].residual)
    with np.errstate(over="ignore"):  # infinite, and not the least
        return two_norm(f)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MAIN)
def test_reason_and_best_point(name, kind):
    case = KINDS[kind]
    y0 = jnp.asarray(case.y0)
    solver = SOLVERS[name](Wanted(jnp.asarray(1e-8), jnp.asarray(0.0), y0, 301, 2))
    which = jnp.asarray(list(KINDS).index(kind), jnp.int32)
    solution, seen = watched(_any_of, solver, y0, which, max_steps=300)
    assert reason(solution) == expected(case, name)
    succeeded = reason(solution) in SUCCESS
    finite = [(y, f) for y, f in seen if all_finite((y, f))]
    if not finite:
        np.testing.assert_array_equal(solution.value, y0)
        assert not np.isfinite(solution.stats["residual_norm"])
        return
    value = np.asarray(solution.value)
    there = scaled_norm(solution, np.asarray(case.fn(solution.value)))
    np.testing.assert_allclose(solution.stats["residual_norm"], there, rtol=1e-9)
    start = scaled_norm(solution, np.asarray(case.fn(y0)))
    assert succeeded == (there <= 1e-8 * start)
    # What the steps inside of N evaluate is not among the trials.
    least = min(scaled_norm(solution, f) for _, f in finite)
    if name == "LeftPreconditioned":
        least = np.nanmin(solution.stats["history"].norm)
    np.testing.assert_allclose(there, least, rtol=1e-9)
    assert any(np.allclose(value, y, rtol=1e-14, atol=0) for y, _ in finite)
    if kind == "a root at the start":
        assert int(solution.stats["num_steps"]) == 0 and there == 0


def test_each_reason_is_expected_of_some_solver():
    told = {expected(kind, name) for kind in KINDS.values() for name in MAIN}
    assert told >= set(nks.REASONS._name_to_item) - {"iterating", "step_small"}

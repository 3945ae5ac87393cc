"""Running a solve, and what must hold of any solve, whatever its end."""

from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx

import nksolve as nks

SUCCESS = ("residual_atol", "residual_rtol")


def run(fn, solver, y0, args=None, **kwargs) -> Any:
    """`root_find` without raising."""
    return nks.root_find(fn, solver, y0, args, throw=False, **kwargs)


def reason(solution) -> str:
    return nks.reason_name(solution.stats["reason"])


def counters(solution) -> dict[str, int]:
    return {k: int(v) for k, v in solution.stats.items() if k.startswith("num_")}


def trials(solution) -> int:
    """Points evaluated, the initial one included."""
    return 1 + counters(solution)["num_steps"] + counters(solution)["num_rejected_steps"]


def rows(solution) -> dict[str, np.ndarray]:
    """The rows of the history that were written."""
    history, n = solution.stats["history"], trials(solution)
    assert n <= history.norm.shape[0], "the history is too short for this test"
    names = ("norm", "eta", "num_matvecs", "step_length", "accepted", "reason")
    return {name: np.asarray(getattr(history, name))[:n] for name in names}


def two_norm(tree) -> float:
    leaves = [np.ravel(np.asarray(leaf, np.complex128)) for leaf in jtu.tree_leaves(tree)]
    return float(np.linalg.norm(np.concatenate([*leaves, np.zeros(0)])))


def all_finite(tree) -> bool:
    return all(bool(np.all(np.isfinite(np.asarray(leaf)))) for leaf in jtu.tree_leaves(tree))


def assert_honest(solution, fn, y0, args, *, rtol, atol, slack=1e-12) -> None:
    """Of any solve from a point where fn is finite, in the 2-norm and with a history: what is
    reported of the returned point is so, no point evaluated was better, and success is success.

    `slack` is the rounding of fn, relative to the norm at the start.
    """
    start, end = two_norm(fn(y0, args)), two_norm(fn(solution.value, args))
    assert all_finite(solution.value)
    assert np.isfinite(end)
    reported = float(solution.stats["residual_norm"])
    np.testing.assert_allclose(reported, end, rtol=1e-10, atol=slack * start)
    np.testing.assert_allclose(solution.stats["initial_residual_norm"], start, rtol=1e-10)
    assert reported == np.nanmin(rows(solution)["norm"])
    succeeded = bool(solution.result == optx.RESULTS.successful)
    assert succeeded == (reason(solution) in SUCCESS)
    assert succeeded == (reported <= atol + rtol * float(solution.stats["initial_residual_norm"]))
    if succeeded:
        assert end <= atol + (rtol + slack) * start


def max_norm(f) -> Any:
    return jnp.max(jnp.abs(f))

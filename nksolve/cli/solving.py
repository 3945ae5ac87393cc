"""Solve a problem once: compile, run, and time the two apart."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx

from ..krylov.base import AbstractKrylovSolver
from ..newton.forcing import AbstractForcing
from ..newton.newton_krylov import NewtonKrylov
from ..newton.report import StepReport
from ..problems import Problem
from ..results import REASONS, reason_name
from ..verbs.root_find import root_find

_REASON = "U24"


class Tolerances(NamedTuple):
    """‖F‖ ≤ atol + rtol ‖F₀‖."""

    rtol: float
    atol: float


# In float32 the residual itself is known to no more than some 1e-4 of its initial value.
DOUBLE = Tolerances(1e-8, 1e-12)
SINGLE = Tolerances(1e-4, 1e-6)


class Outcome(NamedTuple):
    """A solve that has been run, on the host.

    `choice` is what an automatic linear solver chose, empty for others. `compile_seconds` is
    tracing and compilation; `run_seconds` is the one run of the compiled program, with the calls of
    `verbose`. `history` is a structured array, one row for each trial.
    """

    y: Any
    succeeded: bool
    reason: str
    advice: str
    choice: str
    counters: dict[str, int]
    initial_norm: float
    norm: float
    history: np.ndarray
    compile_seconds: float
    run_seconds: float


def solve(
    problem: Problem,
    tolerances: Tolerances,
    *,
    max_steps: int,
    linear_solver: AbstractKrylovSolver,
    forcing: AbstractForcing,
    verbose: Callable[[StepReport], None],
    phase: Callable[[str], AbstractContextManager[Any]],
) -> Outcome:
    """Runs Newton–Krylov on the problem, telling `verbose` of each trial.

    `phase(text)` is entered for each of the two phases. Errors in `problem.fn` come through.
    """
    solver = NewtonKrylov(
        *tolerances,
        linear_solver=linear_solver,
        forcing=forcing,
        history_length=max_steps + 1,
        verbose=verbose,
    )

    @eqx.filter_jit
    def program(y0, args):
        return root_find(problem.fn, solver, y0, args, max_steps=max_steps, throw=False)

    start = time.perf_counter()
    with phase("compiling"):
        compiled = program.lower(problem.y0, problem.args).compile()
    compile_seconds = time.perf_counter() - start

    start = time.perf_counter()
    with phase("solving"):
        solution = compiled(problem.y0, problem.args)
        jax.block_until_ready(eqx.filter(solution, eqx.is_array))
        jax.effects_barrier()  # the last lines have been printed
    run_seconds = time.perf_counter() - start

    stats = solution.stats
    return Outcome(
        y=jtu.tree_map(_on_host, solution.value),
        succeeded=bool(solution.result == optx.RESULTS.successful),
        reason=reason_name(stats["reason"]),
        advice=str(REASONS[stats["reason"]]),
        choice=str(stats.get("choice", "")),
        counters={k: int(v) for k, v in stats.items() if k.startswith("num_")},
        initial_norm=float(stats["initial_residual_norm"]),
        norm=float(stats["residual_norm"]),
        history=_table(stats["history"], int(stats["num_linearisations"])),
        compile_seconds=compile_seconds,
        run_seconds=run_seconds,
    )


def save(path: Path, problem: Problem, outcome: Outcome) -> None:
    """Writes the outcome as `.npz`; docs/command-line.md lists what is in it."""
    leaves = jtu.tree_flatten_with_path(eqx.filter(outcome.y, eqx.is_array))[0]
    if isinstance(outcome.y, np.ndarray):
        unknowns = {"y": outcome.y}
    else:
        unknowns = {f"y_{i}": leaf for i, (_, leaf) in enumerate(leaves)}
        unknowns["y_names"] = np.asarray([jtu.keystr(key) for key, _ in leaves])
    with open(path, "wb") as file:
        np.savez(
            file,
            allow_pickle=False,
            **unknowns,
            **outcome.counters,
            history=outcome.history,
            reason=outcome.reason,
            residual_norm=outcome.norm,
            initial_residual_norm=outcome.initial_norm,
            problem=problem.title,
            compile_seconds=outcome.compile_seconds,
            run_seconds=outcome.run_seconds,
        )


def _table(history: Any, length: int) -> np.ndarray:
    """The rows that were written, with the reasons by name."""
    columns = {
        "norm": np.asarray(history.norm),
        "eta": np.asarray(history.eta),
        "num_matvecs": np.asarray(history.num_matvecs),
        "step_length": np.asarray(history.step_length),
        "accepted": np.asarray(history.accepted),
        "reason": np.asarray([reason_name(int(r)) for r in history.reason], _REASON),
    }
    table = np.empty(length, [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        table[name] = column[:length]
    return table


def _on_host(leaf: Any) -> Any:
    return np.asarray(leaf) if isinstance(leaf, jnp.ndarray) else leaf

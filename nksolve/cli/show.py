"""What is written to the terminal."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..newton.report import StepReport
from ..problems import PROBLEMS, Problem
from .solving import Outcome, Tolerances
from .source import size_options

_HEADER = (
    f"{'trial':>5}  {'‖F‖':>10}  {'‖F‖/‖F₀‖':>9}  {'step λ':>8}  {'forcing η':>9}  {'matvecs':>7}"
)
_COUNTERS = {
    "num_steps": "Newton steps",
    "num_rejected_steps": "rejected trials",
    "num_fn_evals": "evaluations of F",
    "num_matvecs": "matvecs",
    "num_linear_failures": "linear failures",
}


def console(*, stderr: bool = False) -> Console:
    """Made anew each time, so that it writes to the stdout of the moment. Piped, it is wide."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=200)


class Display:
    """A line for each trial as it happens, below a header; on a terminal with a spinner."""

    def __init__(self, out: Console):
        self._out = out
        self._initial = float("nan")

    def begin(self, problem: Problem, tolerances: Tolerances, choice: str) -> None:
        """What is about to be solved, and how where that is known."""
        leaves = [x for x in jtu.tree_leaves(problem.y0) if isinstance(x, jax.Array)]
        dtype = jnp.result_type(*leaves) if leaves else "no dtype"
        unknowns = sum(x.size for x in leaves)
        self._out.print(Text(problem.title, style="bold"))
        self._out.print(
            f"{unknowns} unknown{'s' * (unknowns != 1)}, {dtype}, {jax.default_backend()}, "
            f"until ‖F‖ ≤ {tolerances.atol:g} + {tolerances.rtol:g} ‖F₀‖"
        )
        if choice:
            self._out.print(choice)

    def phase(self, text: str) -> AbstractContextManager[Any]:
        """A spinner for as long as the phase takes; on "solving" the header of the lines."""
        if text == "solving":
            self._out.print(Text(f"\n{_HEADER}", style="bold"))
        return self._out.status(text)

    def trial(self, report: StepReport) -> None:
        """One line. η and the matvecs are of the linear solve that follows the trial."""
        if report.trial == 0:
            self._initial = report.norm
        solved = report.num_matvecs > 0
        ratio = report.norm / self._initial if self._initial else float("nan")
        line = (
            f"{report.trial:5d}  {report.norm:10.3e}  {ratio:9.1e}  "
            f"{f'{report.step_length:8.2g}' if report.trial else ' ' * 8}  "
            f"{f'{report.eta:9.1e}' if solved else ' ' * 9}  "
            f"{report.num_matvecs if solved else '':>7}"
        )
        note = "" if report.accepted else "rejected"
        note = ", ".join(filter(None, (note, report.reason)))
        style = "" if report.accepted else "dim"
        self._out.print(Text(f"{line}  {note}".rstrip(), style=style))

    def end(self, outcome: Outcome, written: Iterable[str]) -> None:
        """The table of results."""
        good = outcome.succeeded
        table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
        table.add_column(style="bold")
        table.add_column()
        table.add_row("result", Text(outcome.reason, style="bold green" if good else "bold red"))
        if outcome.choice:
            table.add_row("linear solver", outcome.choice)
        table.add_row("‖F‖", f"{outcome.initial_norm:.3e} → {outcome.norm:.3e}")
        for name, label in _COUNTERS.items():
            if name in outcome.counters and not (
                name == "num_linear_failures" and outcome.counters[name] == 0
            ):
                table.add_row(label, str(outcome.counters[name]))
        table.add_row("to compile", f"{outcome.compile_seconds:.2f} s (tracing included)")
        table.add_row("to run", f"{outcome.run_seconds:.3g} s (once, with the lines above)")
        self._out.print(table)
        for path in written:
            self._out.print(f"wrote {path}", soft_wrap=True, markup=False)


def fail(text: str) -> None:
    """An error, on stderr."""
    console(stderr=True).print(Text.assemble(("nksolve: ", "bold red"), text), soft_wrap=True)


def list_problems() -> None:
    """The registry as a table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", style="bold", no_wrap=True)
    for heading in ("sizes and parameters", "title", "source"):
        table.add_column(heading)
    for name, build in PROBLEMS.items():
        problem = build()
        table.add_row(name, size_options(name), problem.title, Text(problem.source))
    console().print(table)

"""The commands and their options."""

from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import jax
import typer

from ..krylov.base import AbstractKrylovSolver
from ..newton.forcing import AbstractForcing
from ..problems import Problem
from . import show, solving, source
from .choosing import Method, choose
from .source import UsageError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Newton–Krylov solvers for JAX.",
    epilog="Exit codes: 0 solved, 1 not solved (the reason is printed), 2 wrongly asked.",
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"nksolve {version_of('nksolve')}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    del version


@app.command()
def problems() -> None:
    """List the problems that can be solved by name."""
    show.list_problems()


@app.command()
def solve(
    problem: Annotated[
        str,
        typer.Argument(
            help="A name that `nksolve problems` lists, or a Python file that defines fn(y, args), "
            "y0 and, if wanted, args."
        ),
    ],
    n: Annotated[int | None, typer.Option("--n", help="The size n of the problem.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another size or parameter; repeatable."),
    ] = None,
    rtol: Annotated[
        float | None,
        typer.Option(min=0, help="Stop at ‖F‖ ≤ atol + rtol ‖F₀‖.  [1e-8; in float32 1e-4]"),
    ] = None,
    atol: Annotated[
        float | None, typer.Option(min=0, help="See --rtol.  [1e-12; in float32 1e-6]")
    ] = None,
    max_steps: Annotated[int, typer.Option(min=0, help="Most trial points.")] = 1000,
    method: Annotated[
        Method,
        typer.Option(
            help="auto: multigrid where the problem lives on a grid that can be coarsened, else "
            "what the pattern of the Jacobian allows; gmres: without preconditioner."
        ),
    ] = Method.auto,
    restart: Annotated[int, typer.Option(min=1, help="Length of a GMRES cycle.")] = 60,
    float32: Annotated[bool, typer.Option("--float32", help="Compute in float32.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the history and the solution.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Write solution, history, counters.")
    ] = None,
) -> None:
    """Solve a problem by Newton–Krylov and show how the residual falls."""
    jax.config.update("jax_enable_x64", not float32)  # before any array is made
    usual = solving.SINGLE if float32 else solving.DOUBLE
    tolerances = solving.Tolerances(
        usual.rtol if rtol is None else rtol, usual.atol if atol is None else atol
    )
    display = show.Display(show.console())
    try:
        _check_writable(plot, save)
        what = source.load(problem, n, settings or [], float32=float32)
        linear_solver, forcing, choice = choose(what, method, restart)
        display.begin(what, tolerances, choice)
        outcome = _solve(what, tolerances, max_steps, linear_solver, forcing, display)
    except UsageError as error:
        show.fail(str(error))
        raise typer.Exit(2) from None
    if save is not None:
        solving.save(save, what, outcome)
    if plot is not None:
        _draw(plot, what, outcome, tolerances)
    display.end(outcome, [str(path) for path in (save, plot) if path is not None])
    if not outcome.succeeded:
        show.fail(f"not solved, {outcome.reason}: {outcome.advice}")
        raise typer.Exit(1)


def _solve(
    what: Problem,
    tolerances: solving.Tolerances,
    max_steps: int,
    linear_solver: AbstractKrylovSolver,
    forcing: AbstractForcing,
    display: show.Display,
) -> solving.Outcome:
    try:
        return solving.solve(
            what,
            tolerances,
            max_steps=max_steps,
            linear_solver=linear_solver,
            forcing=forcing,
            verbose=display.trial,
            phase=display.phase,
        )
    except Exception as error:
        if what.source.endswith(".py"):  # the user's fn, or what nksolve says of it
            raise UsageError(source.failure_in(Path(what.source), error)) from error
        raise


def _check_writable(plot: Path | None, save: Path | None) -> None:
    """What would otherwise fail after the solve."""
    for path in (plot, save):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent} to write {path.name} in")
    if plot is None:
        return
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'nksolve[plot]'")
    from ..plot import can_write

    if not can_write(plot):
        raise UsageError(f"--plot cannot write {plot.name}: give it a name that ends in .png")


def _draw(
    path: Path, what: Problem, outcome: solving.Outcome, tolerances: solving.Tolerances
) -> None:
    from ..plot import plot_solve

    field = None if what.field is None else what.field(outcome.y)
    subtitle = "" if outcome.succeeded else f"\nnot solved: {outcome.reason}"
    target = tolerances.atol + tolerances.rtol * outcome.initial_norm
    figure = plot_solve(outcome.history, field, title=what.title + subtitle, target=target)
    figure.savefig(path)

"""Which solver solves which of the 23 problems of the nonlinear library: no clock.

Solved is what ends with ‖F‖∞ < 1e-6 at the point that is returned, recomputed, whatever the solver
says of itself. Work is evaluations of F and products with J, both counted as they run.
"""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import scipy.optimize as sopt

import nksolve as nks
from nksolve.problems.base import Problem
from nksolve.problems.registry import NONLINEAR_LIBRARY, get
from tests.helpers.counting import Counter

PAGE = Path(__file__).resolve().parent.parent / "docs" / "validation" / "nonlinear.md"
PICTURE = PAGE.parent.parent / "images" / "nonlinear-profile.png"
TOLERANCE, MOST = 1e-6, 256
#: The systems of Moré, Garbow and Hillstrom are solved from these multiples of their start too.
MGH, FACTORS = list(NONLINEAR_LIBRARY)[:14], (1.0, 10.0, 100.0)
#: All problems are solved from that many random points, which no solver was fitted to.
RANDOM = 10


class Outcome(NamedTuple):
    """Of a solver on a problem."""

    solved: bool
    steps: int
    work: int


def max_norm(f: Any) -> Any:
    """The largest entry."""
    return jnp.max(jnp.abs(f))


def start(problem: Problem, factor: float) -> Any:
    """A multiple of the standard start; of zero it is the factor in every entry, as in MINPACK."""
    if factor == 1.0:
        return problem.y0
    scaled = factor * problem.y0
    return jnp.where(jnp.any(problem.y0 != 0), scaled, jnp.full_like(scaled, factor))


def starts(problem: Problem, *, small: bool) -> dict[str, Any]:
    """All starts of a problem, by name."""
    factors = FACTORS if problem.name in MGH and not small else FACTORS[:1]
    found = {f"{factor:g}": start(problem, factor) for factor in factors}
    rng = np.random.default_rng(sum(map(ord, problem.name)))
    spread = np.maximum(np.abs(np.asarray(problem.y0)), 1.0)
    for k in range(1 if small else RANDOM):
        away = rng.normal(size=problem.y0.shape)
        found[f"random {k}"] = problem.y0 + jnp.asarray(spread * away)
    return found


def _ours(make: Callable[[Any], Any]) -> Callable[[Problem], Any]:
    def prepared(problem: Problem):
        counter = Counter()
        krylov = nks.GMRES(restart=min(problem.y0.size, 30))
        solver = make(krylov)

        @jax.jit
        def solve(y0):
            fn = lambda y, args: problem.fn(counter.tick(y), args)
            solution = nks.root_find(fn, solver, y0, problem.args, max_steps=MOST, throw=False)
            return solution.value, solution.stats["num_steps"]

        return _counted(solve, counter)

    return prepared


def _optimistix(solver: Any) -> Callable[[Problem], Any]:
    def prepared(problem: Problem):
        counter = Counter()

        @jax.jit
        def solve(y0):
            fn = lambda y, args: problem.fn(counter.tick(y), args)
            solution = optx.root_find(fn, solver, y0, problem.args, max_steps=MOST, throw=False)
            return solution.value, solution.stats["num_steps"]

        return _counted(solve, counter)

    return prepared


def _counted(solve: Callable, counter: Counter) -> Callable[[Any], tuple[Any, int, int]]:
    def run(y0):
        with counter.measure() as count:
            value, steps = jax.block_until_ready(solve(y0))
        lanes = [e.lanes or 1 for e in count.executions]
        return value, int(steps), sum(lanes)

    return run


def _scipy(method: str) -> Callable[[Problem], Any]:
    def prepared(problem: Problem):
        fn = jax.jit(lambda y: problem.fn(y, problem.args))
        calls = [0]

        def residual(y):
            calls[0] += 1
            return np.asarray(fn(jnp.asarray(y)))

        def run(y0):
            calls[0] = 0
            y0 = np.asarray(y0)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    if method == "krylov":
                        options = {"fatol": TOLERANCE, "maxiter": MOST}
                        found = sopt.root(residual, y0, method="krylov", options=options)
                        return found.x, int(found.get("nit", 0)), calls[0]
                    found = sopt.root(residual, y0, method="hybr", options={"xtol": 1e-10})
                    return found.x, 0, calls[0]
            except (ValueError, FloatingPointError, ZeroDivisionError, np.linalg.LinAlgError):
                return np.full_like(y0, np.nan), 0, calls[0]

        return run

    return prepared


_EXACT = nks.ConstantForcing(1e-10)


def _newton(**fields: Any) -> Callable[[Problem], Any]:
    return _ours(
        lambda krylov: nks.NewtonKrylov(
            0.0, TOLERANCE, norm=max_norm, linear_solver=krylov, **fields
        )
    )


def _levenberg_marquardt(problem: Problem) -> Any:
    lsmr = nks.LSMR(kept=min(problem.y0.size, 30))
    solver = nks.NewtonKrylov(
        0.0, TOLERANCE, norm=max_norm, linear_solver=lsmr, globalisation=nks.LevenbergMarquardt()
    )
    return _ours(lambda _: solver)(problem)


SOLVERS: dict[str, Callable[[Problem], Any]] = {
    "Robust": _ours(lambda krylov: nks.Robust(0.0, TOLERANCE, norm=max_norm, linear_solver=krylov)),
    "NewtonKrylov": _newton(),
    "NewtonKrylov, exact": _newton(forcing=_EXACT),
    "full steps, exact": _newton(forcing=_EXACT, globalisation=nks.FullStep()),
    "NonMonotone": _newton(globalisation=nks.NonMonotone()),
    "Dogleg": _newton(globalisation=nks.Dogleg()),
    "Hookstep": _newton(globalisation=nks.Hookstep()),
    "LM": _levenberg_marquardt,
    "NLEQErr, exact": _newton(forcing=_EXACT, globalisation=nks.NLEQErr()),
    "Optimistix Newton": _optimistix(optx.Newton(1e-10, 1e-10)),
    "Optimistix Dogleg": _optimistix(optx.Dogleg(1e-10, 1e-10)),
    "Optimistix LM": _optimistix(optx.LevenbergMarquardt(1e-10, 1e-10)),
    "SciPy hybr": _scipy("hybr"),
    "SciPy krylov": _scipy("krylov"),
}


def outcomes(name: str, solver: str, *, small: bool) -> dict[str, Outcome]:
    """Of a solver on a problem, for each start."""
    problem = get(name)
    run = SOLVERS[solver](problem)
    found = {}
    for label, y0 in starts(problem, small=small).items():
        value, steps, work = run(y0)
        value = jnp.asarray(value)
        norm = float(max_norm(problem.fn(value, problem.args)))
        found[label] = Outcome(bool(norm < TOLERANCE), steps, work)
    jax.clear_caches()
    return found


@dataclasses.dataclass
class Table:
    """All outcomes: problem → solver → start."""

    cells: dict[str, dict[str, dict[str, Outcome]]]

    @property
    def solvers(self) -> list[str]:
        """Their names."""
        return list(next(iter(self.cells.values())))

    def solved(self, solver: str, kind: str, names: list[str]) -> int:
        """How many solves of these problems from starts of that kind succeed."""
        return sum(
            outcome.solved
            for name in names
            for label, outcome in self.cells[name][solver].items()
            if label.split()[0] == kind
        )


def measured(only: list[str], *, small: bool) -> Table:
    """Runs them all, or the problems and solvers whose names contain one of `only`."""
    fits = lambda names: [n for n in names if any(o in n for o in only)] or list(names)
    names, solvers = fits(NONLINEAR_LIBRARY), fits(SOLVERS)
    if small:
        names, solvers = names[3:5], solvers[:2]
    cells: dict[str, dict[str, dict[str, Outcome]]] = {}
    for name in names:
        cells[name] = {s: outcomes(name, s, small=small) for s in solvers}
        told = {s: " ".join(map(_told, row.values())) for s, row in cells[name].items()}
        print(name, told, flush=True)
    return Table(cells)


def _told(outcome: Outcome) -> str:
    return f"{outcome.steps} / {outcome.work}" if outcome.solved else "–"


def profile(table: Table) -> None:
    """Dolan and Moré's performance profile of the work, over all problems and starts that any of
    them solves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    solvers = table.solvers
    rows = [
        [row[s][label].work if row[s][label].solved else np.inf for s in solvers]
        for row in table.cells.values()
        for label in row[solvers[0]]
    ]
    # What nobody solves says nothing of the work.
    rows = [row for row in rows if min(row) < np.inf]
    work = np.maximum(np.array(rows, float), 1.0)
    ratio = work / np.min(work, axis=1, keepdims=True)
    ratio[~np.isfinite(work)] = np.inf
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    taus = np.logspace(0, 3, 200)
    for k, solver in enumerate(solvers):
        share = [(ratio[:, k] <= tau).mean() for tau in taus]
        style = ":" if "SciPy" in solver else "--" if "Optimistix" in solver else "-"
        axes.step(taus, share, style, where="post", label=solver)
    axes.set(xscale="log", xlabel="work, in units of the least", ylabel="share solved", ylim=(0, 1))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


def report(*, small: bool, only: list[str], repeats: int, budget: float) -> str:
    """The tables."""
    del repeats, budget
    table = measured(only, small=small)
    names, solvers = list(table.cells), table.solvers
    head = "| | " + " | ".join(solvers) + " |\n|---|" + "--:|" * len(solvers)
    row = lambda name, cells: f"| {name} | " + " | ".join(cells) + " |"
    counts = lambda kind, of: [table.solved(s, kind, of) for s in solvers]
    bold = lambda numbers: [f"**{n}**" for n in numbers]
    lines = [
        "### From the standard start",
        "",
        "Steps / work; – where it was not solved.",
        "",
        head,
        *(row(name, [_told(table.cells[name][s]["1"]) for s in solvers]) for name in names),
        row(f"solved, of {len(names)}", bold(counts("1", names))),
    ]
    hard = [name for name in names if name in MGH]
    if small or not hard:
        return "\n".join(lines)
    kinds = [f"{factor:g}" for factor in FACTORS]
    lines += [
        "",
        f"### Solved of the {len(hard)} systems of Moré, Garbow and Hillstrom",
        "",
        head,
        *(row(f"from {k} times the start", map(str, counts(k, hard))) for k in kinds),
        row("in all", bold(sum(counts(k, hard)[i] for k in kinds) for i in range(len(solvers)))),
        "",
        f"### Solved from {RANDOM} random starts each",
        "",
        head,
        *(row(name, map(str, counts("random", [name]))) for name in names),
        row(f"solved, of {RANDOM * len(names)}", bold(counts("random", names))),
    ]
    profile(table)
    return "\n".join(lines)

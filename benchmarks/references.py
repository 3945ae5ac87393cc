"""End values of stiff problems against references, and what they cost in counts: no clock.

`python -m benchmarks.references [--only NAME ...] [--methods NAME ...] [--write]`: NAME is a
problem or a method; results are kept from run to run, so that it can be done piece by piece.
"""

import argparse
import functools as ft
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate as spi
import scipy.sparse as sps

import nksolve as nks
import nksolve.ode as ode
from nksolve.problems.stiff import STIFF, InitialValueProblem

from .__main__ import BEGIN, END, machine

PAGE = Path(__file__).resolve().parent.parent / "docs" / "validation" / "ode-references.md"
KEPT = Path(__file__).resolve().parent.parent / ".cache" / "ode_references.json"
RTOLS = (1e-4, 1e-6, 1e-8)

METHODS: tuple[str, ...] = (
    "Kvaerno3",
    "Kvaerno4",
    "Kvaerno5",
    "KenCarp3",
    "KenCarp4",
    "KenCarp5",
    "ImplicitEuler",
    "Rosenbrock23",
    "Rodas4",
    "Rodas5P",
    "ROK4",
    "Exprb32",
    "Exprb43",
    "BDF",
)
_MATRIX_FREE = ("ROK4", "Exprb32", "Exprb43")


class Case(NamedTuple):
    """A problem with the linear solver that suits it and a limit of steps."""

    problem: InitialValueProblem
    linear_solver: Any
    max_steps: int

    @property
    def nodes(self) -> tuple[int, ...]:
        """The shape of the grid, () for kinetics."""
        return self.problem.y0.shape[1:] if self.problem.y0.ndim == 3 else ()


def fourier(rates: Callable[[Any], Any], n: int) -> nks.GMRES:
    """GMRES with (I − γ D Δ)⁻¹ by the Fourier transform, on a periodic n × n grid; `rates`
    gives from `args` the two diffusion rates over the mesh width squared."""
    angles = 2 * np.pi * np.arange(n) / n
    line = 2 * np.cos(angles) - 2
    eigenvalues = line[None, :, None] + line[None, None, : n // 2 + 1]

    def build(t, y, gamma, args):
        del t, y
        damped = 1 / (1 - gamma * rates(args)[:, None, None] * eigenvalues)
        transform = lambda v: jnp.fft.rfft2(v)
        return lambda v: jnp.fft.irfft2(damped.astype(complex) * transform(v), (n, n))

    return nks.GMRES(preconditioner=ode.StagePreconditioner(build))


def _brusselator(n: int) -> Case:
    rates = lambda args: jnp.stack([args[2], args[2]]) * (n - 1) ** 2
    return Case(STIFF["brusselator-2d"](n), fourier(rates, n), 4_000)


def _gray_scott(n: int) -> Case:
    return Case(STIFF["gray-scott"](n), fourier(lambda args: args[:2] * (n / 2.5) ** 2, n), 4_000)


def _kinetics(name: str) -> Case:
    problem = STIFF[name]()
    return Case(problem, nks.BandedDirect(block=len(problem.y0)), 40_000)


def _line() -> Case:
    return Case(STIFF["brusselator-1d"](), nks.BandedDirect(block=2), 6_000)


CASES: dict[str, Callable[[], Case]] = {
    "rober": ft.partial(_kinetics, "rober"),
    "hires": ft.partial(_kinetics, "hires"),
    "orego": ft.partial(_kinetics, "orego"),
    "van-der-pol": ft.partial(_kinetics, "van-der-pol"),
    "brusselator-1d": _line,
    "brusselator-2d-8": ft.partial(_brusselator, 8),
    "brusselator-2d-32": ft.partial(_brusselator, 32),
    "gray-scott": ft.partial(_gray_scott, 32),
}
TITLES = {
    "rober": "ROBER, to t = 1e11",
    "hires": "HIRES",
    "orego": "OREGO",
    "van-der-pol": "VDPOL, μ = 1000",
    "brusselator-1d": "BRUSS-1D, 1,000 unknowns",
    "brusselator-2d-8": "2-D Brusselator, N = 8, jump at 1.1 declared",
    "brusselator-2d-32": "2-D Brusselator, N = 32, jump at 1.1 declared",
    "gray-scott": "Gray–Scott, N = 32",
}


class Result(NamedTuple):
    """Of one solve; `w` is max |y − ref| / (atol + rtol |ref|)."""

    w: float
    accepted: int
    rejected: int
    evaluations: int
    linearisations: int
    newton: int
    krylov: int
    failures: int
    reason: str  # of ending, "" where it arrived


def weighted_error(problem: InitialValueProblem, y: Any, rtol: float) -> float:
    """w."""
    assert problem.end is not None
    size = np.abs(problem.end)
    allowed = rtol * (problem.atol_factor + size)
    return float(np.max(np.abs(np.asarray(y) - problem.end) / allowed))


@ft.cache
def solver_for(name: str, method: str) -> Callable[[float], dfx.Solution]:
    """The solve as a function of rtol."""
    case = CASES[name]()
    problem = case.problem
    cls = getattr(ode, method)
    solver = cls() if method in _MATRIX_FREE else cls(linear_solver=case.linear_solver)
    terms: Any = dfx.ODETerm(problem.fn)
    if method.startswith("KenCarp"):
        still = dfx.ODETerm(lambda t, y, args: jnp.zeros_like(y))
        terms = dfx.MultiTerm(still, terms)
    controller_cls = ode.BDFController if method == "BDF" else dfx.PIDController

    @jax.jit
    def run(rtol):
        controller: Any = controller_cls(rtol=rtol, atol=rtol * problem.atol_factor)
        if problem.jumps:
            jumps = jnp.array(problem.jumps)
            controller = dfx.ClipStepSizeController(controller, jump_ts=jumps)
        return dfx.diffeqsolve(
            terms,
            solver,
            *problem.span,
            None,
            problem.y0,
            problem.args,
            stepsize_controller=controller,
            max_steps=case.max_steps,
            adjoint=ode.WithStats(dfx.ForwardMode()),
            throw=False,
        )

    return run


def solved(name: str, method: str, rtol: float) -> Result:
    """One cell of the table."""
    sol = solver_for(name, method)(rtol)
    arrived = sol.result == dfx.RESULTS.successful
    count = lambda key: int(sol.stats[key])
    most = count("num_steps") >= CASES[name]().max_steps
    assert sol.ys is not None
    return Result(
        weighted_error(CASES[name]().problem, sol.ys[-1], rtol) if arrived else float("nan"),
        count("num_accepted_steps"),
        count("num_rejected_steps"),
        count("num_fn_evals"),
        count("num_linearisations"),
        count("num_newton_steps"),
        count("num_matvecs"),
        count("num_convergence_failures"),
        "" if arrived else ("steps" if most else "failed"),
    )


def scipy_bdf(name: str, rtol: float) -> tuple[float, int]:
    """(w, accepted steps) of SciPy's `BDF`, begun anew at each jump."""
    case = CASES[name]()
    problem, y = case.problem, np.asarray(case.problem.y0)
    flat = jax.jit(lambda t, v: problem.fn(t, v.reshape(y.shape), problem.args).ravel())
    jacobian = jax.jit(jax.jacfwd(flat, argnums=1))
    times = [problem.span[0], *problem.jumps, problem.span[1]]
    v, steps = y.ravel(), 0
    for begin, end in itertools.pairwise(times):
        last = np.nextafter(end, begin) if end in problem.jumps else end
        fn = lambda t, v, last=last: np.asarray(flat(min(t, last), v))
        if v.size <= 1000:
            jac = lambda t, v, last=last: sps.csc_matrix(np.asarray(jacobian(min(t, last), v)))
            options: dict[str, Any] = dict(jac=jac)
        else:
            options = dict(jac_sparsity=pattern(*case.nodes))
        out = spi.solve_ivp(
            fn, (begin, end), v, "BDF", rtol=rtol, atol=rtol * problem.atol_factor, **options
        )
        v, steps = out.y[:, -1], steps + len(out.t) - 1
    return weighted_error(problem, v.reshape(y.shape), rtol), steps


def pattern(rows: int, columns: int) -> sps.csc_matrix:
    """Two unknowns a node, each coupled with the four neighbours and with the other."""
    ring = lambda n: sps.eye(n) + sps.eye(n, k=1) + sps.eye(n, k=-1) + _corners(n)
    plane = sps.kron(sps.eye(rows), ring(columns)) + sps.kron(ring(rows), sps.eye(columns))
    other = sps.eye(rows * columns)
    return sps.csc_matrix(sps.bmat([[plane, other], [other, plane]]))


def _corners(n: int) -> sps.coo_matrix:
    return sps.coo_matrix(([1.0, 1.0], ([0, n - 1], [n - 1, 0])), shape=(n, n))


# --- the table ---------------------------------------------------------------------------------


def measured(names: list[str], methods: list[str]) -> Iterator[str]:
    """Runs what is asked for, and keeps it."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name in names:
        for method in [*methods, "SciPy BDF"]:
            for rtol in RTOLS:
                key = f"{name}|{method}|{rtol:g}"
                if method == "SciPy BDF":
                    if key not in kept:
                        kept[key] = scipy_bdf(name, rtol)
                    continue
                kept[key] = solved(name, method, rtol)
                yield f"{key}: {Result(*kept[key])}"
                KEPT.parent.mkdir(exist_ok=True)
                KEPT.write_text(json.dumps(kept, indent=0))
            solver_for.cache_clear()
            jax.clear_caches()
        KEPT.write_text(json.dumps(kept, indent=0))


_HEADER = (
    "method", "w", "steps", "evaluations", "linearisations", "Newton", "Krylov", "failures",
)  # fmt: skip


def table(kept: dict[str, Any]) -> str:
    """All that is kept, as markdown."""
    parts = []
    for name in CASES:
        for rtol in RTOLS:
            lines = [f"### {TITLES[name]}, rtol = {rtol:g}", "", "| " + " | ".join(_HEADER) + " |"]
            lines.append("|---" * len(_HEADER) + "|")
            for method in METHODS:
                value = kept.get(f"{name}|{method}|{rtol:g}")
                if value is not None:
                    lines.append(_row(method, Result(*value)))
            other = kept.get(f"{name}|SciPy BDF|{rtol:g}")
            if other is not None:
                cells = [f"SciPy `BDF`, {other[1]} steps", _digits(other[0])]
                lines.append("| " + " | ".join([*cells, *[""] * (len(_HEADER) - 2)]) + " |")
            if len(lines) > 4:
                parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _row(method: str, result: Result) -> str:
    steps = f"{result.accepted} + {result.rejected}"
    w = _digits(result.w)
    w = f"**{w}**" if result.w > 20 else w
    w = {"": w, "steps": "– (steps)", "failed": "– (failed)"}[result.reason]
    counts = (result.evaluations, result.linearisations, result.newton, result.krylov)
    cells = [method, w, steps, *(f"{c:,}" for c in counts), str(result.failures)]
    return "| " + " | ".join(cells) + " |"


def _digits(x: float) -> str:
    return f"{x:.2g}" if x < 10 else f"{x:,.0f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.references", description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(CASES), help="names of problems")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="names of methods")
    parser.add_argument("--write", action="store_true", help="write what is kept into docs")
    parser.add_argument("--kept", action="store_true", help="measure nothing")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if not options.kept:
        there = [m for m in options.methods if hasattr(ode, m)]
        for line in measured(options.only, there):
            print(line, flush=True)
    text = machine() + "\n\n" + table(json.loads(KEPT.read_text()))
    if options.write:
        head, _, rest = PAGE.read_text().partition(BEGIN)
        _, _, tail = rest.partition(END)
        PAGE.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")
    else:
        print(text)


if __name__ == "__main__":
    main()

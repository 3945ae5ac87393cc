"""The peers of `python -m benchmarks --pde`: PETSc, SciPy, Optimistix."""

import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import scipy.fft
from scipy.optimize import NoConvergence, newton_krylov
from scipy.sparse.linalg import LinearOperator

from tests.helpers.counting import Counter

from . import petsc
from .competitors import optimistix as row_optimistix
from .pde_cases import LAM, TAGS, Case, Contender, Outcome
from .rows import Row
from .tuning import bicgstab, cg, gmres

_GALERKIN = ("-pc_type", "mg", "-pc_mg_galerkin", "pmat")
_EW = ("-snes_ksp_ew",)
# SOR sweeps instead of Chebyshev's, whose bounds cost ten GMRES steps a level at each set-up.
_SOR = ("-mg_levels_ksp_type", "richardson", "-mg_levels_pc_type", "sor")
# The fastest of a scan at 513²: coarse Jacobians by rediscretisation, one set-up, loose solves.
_TUNED = ("-pc_type", "mg", "-pc_mg_galerkin", "none", *_SOR, "-mg_levels_ksp_max_it", "1")
_LAGGED = ("-ksp_rtol", "1e-3", "-snes_lag_preconditioner", "10")


def peers(case: Case) -> tuple[list[Contender], str]:
    """The contenders, and a note on those that are missing."""
    found, note = petsc.find()
    chosen = []
    if found is not None:
        theirs = _petsc_bratu(found) if case.family == "bratu" else _petsc_brusselator(found, case)
        note = "" if theirs else "PETSc is here, but not the sources of its tutorials"
        chosen += theirs
    return chosen + _scipy(case) + _optimistix(case), note


# --- PETSc -----------------------------------------------------------------------------------


def _petsc_bratu(found: petsc.Petsc) -> list[Contender]:
    program = petsc.bratu_program(found)
    if program is None:
        return []

    def contender(name: str, options: tuple[str, ...], processes=1, sequence=False) -> Contender:
        def prepare(case: Case, limit: float):
            doublings = (case.n + 1).bit_length() - 1
            size = str(5 if sequence else case.n + 2)
            grid = ["-mms", "0", "-par", str(LAM), "-da_grid_x", size, "-da_grid_y", size]
            if sequence:  # the tolerance of the finest grid, for all
                grid += ["-snes_grid_sequence", str(doublings - 2)]
                stop = ["-snes_rtol", "1e-50", "-snes_atol", repr(case.target)]
            else:
                grid += ["-pc_mg_levels", str(doublings - 1)]
                stop = ["-snes_rtol", "1e-8"]
            words = [*grid, *stop, *options]

            def solve() -> Outcome:
                run = petsc.run_bratu(found, program, words, limit=limit, processes=processes)
                # What is relative to the coarsest grid's start says nothing.
                residual = float("nan") if sequence else run.norm / 1e-8
                return Outcome(run.seconds, run.newton, run.krylov, residual, run.failure)

            return solve

        return Contender(name, prepare, growth=3.0)

    return [
        contender("PETSc ex5, Galerkin multigrid", _GALERKIN),
        contender("PETSc ex5, Galerkin multigrid, -snes_ksp_ew", (*_GALERKIN, *_EW)),
        contender("PETSc ex5, tuned", (*_TUNED, *_LAGGED)),
        contender("PETSc ex5, tuned, 2 processes", (*_TUNED, *_LAGGED), processes=2),
        contender("PETSc ex5, tuned, grid sequencing", (*_TUNED, "-ksp_rtol", "1e-3"), 1, True),
    ]


def _petsc_brusselator(found: petsc.Petsc, case: Case) -> list[Contender]:
    program = petsc.build(found, petsc.BRUSSELATOR)
    levels = str(max(2, case.n.bit_length() - 2))
    galerkin = (*_GALERKIN, "-pc_mg_levels", levels)

    def contender(name: str, *options: str, growth: float = 3.0) -> Contender:
        def prepare(case: Case, limit: float):
            words = ["-n", str(case.n), "-max_norm", repr(case.target), *options]

            def solve() -> Outcome:
                run = petsc.run_brusselator(found, program, words, limit=limit, repeats=2)
                residual = run.norm / case.target
                return Outcome(run.seconds, run.newton, run.krylov, residual, run.failure)

            return solve

        return Contender(name, prepare, growth=growth)

    free = ("-snes_mf", "-ksp_max_it", "20000")
    tight = ("-ksp_gmres_restart", "400", "-ksp_rtol", "1e-2", "-mat_mffd_err", "1e-6")
    return [
        contender("PETSc, matrix-free GMRES(30)", *free, *_EW, growth=8.0),
        contender("PETSc, matrix-free GMRES(400), tuned", *free, *tight, growth=8.0),
        contender("PETSc, assembled Jacobian, Galerkin multigrid", *galerkin, *_EW),
        contender("PETSc, assembled, Galerkin multigrid, tuned", *galerkin, *_SOR, *_LAGGED),
        contender("PETSc, assembled, LU", "-pc_type", "lu", growth=6.0),
    ]


# --- SciPy -----------------------------------------------------------------------------------


class FastPoisson(LinearOperator):
    """The inverse of 4 − Σ neighbours − h²λ mean(eᵘ) by sine transforms; u follows Newton."""

    def __init__(self, case: Case):
        n = case.n
        super().__init__(np.float64, (n * n, n * n))
        line = 2.0 - 2.0 * np.cos(np.pi * np.arange(1, n + 1) / (n + 1))
        self.n, self.values, self.shift = n, line[:, None] + line[None, :], 0.0
        self.update(np.asarray(case.y0), None)

    def update(self, x: np.ndarray, f: Any) -> None:
        """SciPy calls this at each Newton step."""
        del f
        self.shift = LAM * float(np.mean(np.exp(x))) / (self.n + 1) ** 2

    def _matvec(self, v: np.ndarray) -> np.ndarray:
        modes: Any = scipy.fft.dstn(v.reshape(self.n, self.n), type=1, workers=-1)
        modes /= self.values - self.shift
        out: Any = scipy.fft.idstn(modes, type=1, workers=-1, overwrite_x=True)
        return out.ravel()


class MeanReaction(LinearOperator):
    """nksolve's preconditioner of the Brusselator, in SciPy."""

    def __init__(self, case: Case):
        n = case.n
        super().__init__(np.float64, (case.size, case.size))
        line = 2.0 * np.cos(2.0 * np.pi * np.arange(n) / n) - 2.0
        line = (n - 1.0) ** 2 * float(case.args.alpha) * line
        self.n, self.a = n, float(case.args.a)
        self.values = line[:, None] + line[None, : n // 2 + 1]
        self.update(np.asarray(case.y0), None)

    def update(self, x: np.ndarray, f: Any) -> None:
        """SciPy calls this at each Newton step."""
        del f
        y = x.reshape(self.n, self.n, 2)
        uv, self.uu = 2.0 * np.mean(y[..., 0] * y[..., 1]), np.mean(y[..., 0] ** 2)
        self.first, self.second = self.values + uv - (self.a + 1.0), self.values - self.uu
        self.lower = self.a - uv
        self.determinant = self.first * self.second - self.uu * self.lower

    def _matvec(self, v: np.ndarray) -> np.ndarray:
        w = v.reshape(self.n, self.n, 2)
        modes: Any = scipy.fft.rfft2(w, axes=(0, 1), workers=-1)
        p, q = modes[..., 0], modes[..., 1]
        out = np.empty_like(modes)
        out[..., 0] = (self.second * p - self.uu * q) / self.determinant
        out[..., 1] = (self.first * q - self.lower * p) / self.determinant
        real: Any = scipy.fft.irfft2(out, s=(self.n, self.n), axes=(0, 1), workers=-1)
        return real.ravel()


def _scipy(case: Case) -> list[Contender]:
    inner = {"bratu": FastPoisson, "brusselator": MeanReaction}[case.family]
    plain, fast = "SciPy newton_krylov", "sine transforms" if case.family == "bratu" else "FFT"
    contenders = [
        scipy_contender(f"{plain}, {method}", None, method=method, inner_maxiter=length)
        for method, length in (("lgmres", 50), ("gmres", 200))
    ]
    # The default difference step loses too many digits for solves this tight.
    contenders += [
        scipy_contender(
            f"{plain}, {method}, rdiff=1e-6, inner_M by {fast}", inner, method=method, rdiff=1e-6
        )
        for method in ("lgmres", "gmres", "bicgstab")
    ]
    return contenders


class _TooLong(Exception):
    pass


def scipy_contender(name: str, inner: Callable | None, **settings: Any) -> Contender:
    """`newton_krylov` with the residual compiled by JAX; stopped at the limit by an alarm."""

    def prepare(case: Case, limit: float):
        compiled = jax.jit(case.fn)
        y0 = np.asarray(case.y0)
        jax.block_until_ready(compiled(y0, case.args))

        def solve() -> Outcome:
            work = {"steps": 0, "evaluations": 0}

            def residual(y):
                work["evaluations"] += 1
                return np.asarray(compiled(y, case.args))

            def step(*_):
                work["steps"] += 1

            def alarm(*_):
                raise _TooLong

            norm = (lambda f: np.max(np.abs(f))) if case.family != "bratu" else np.linalg.norm
            matrix = {} if inner is None else {"inner_M": inner(case)}
            previous = signal.signal(signal.SIGALRM, alarm)
            signal.setitimer(signal.ITIMER_REAL, limit)
            start, failure, y = time.perf_counter(), None, y0
            try:
                y = newton_krylov(
                    residual,
                    y0,
                    f_tol=case.target,
                    tol_norm=norm,
                    maxiter=100,
                    callback=step,
                    **matrix,
                    **settings,
                )
            except _TooLong:
                failure = f"> {limit:g} s"
            except (NoConvergence, ValueError) as error:
                failure = type(error).__name__
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, previous)
            seconds = time.perf_counter() - start
            residual_now = float("nan") if failure else case.residual(y)
            products = work["evaluations"] - work["steps"] - 1
            return Outcome(seconds, work["steps"], products, residual_now, failure)

        return solve

    return Contender(name, prepare)


# --- Optimistix ------------------------------------------------------------------------------


def _optimistix(case: Case) -> list[Contender]:
    name = "Optimistix Newton"
    if case.family == "bratu":  # the settings of choices.py, tuned on 64² and 128²
        return [
            optimistix(f"{name}, lx.CG", cg, 0.3),
            optimistix(f"{name}, lx.BiCGStab", bicgstab, 1e-1),
            optimistix(f"{name}, lx.GMRES, restart 80", gmres(80), 1e-1),
        ]
    return [
        optimistix(f"{name}, lx.GMRES, restart 200", gmres(200), 1e-1, (1e3, 1.0)),
        optimistix(f"{name}, lx.BiCGStab", bicgstab, 1e-2, (1e3, 1.0)),
    ]


def optimistix(
    name: str,
    linear_solver: Callable,
    eta: float,
    loosenesses: Sequence[float] = (1e4, 1e3, 1e2, 1e1, 1.0),
) -> Contender:
    """`optx.Newton`, its tolerance loosened as far as the result still passes.

    A compiled solve cannot be stopped, so the limit acts through `growth`.
    """

    def prepare(case: Case, limit: float):
        # Its test in the 2-norm; that of the Brusselator follows from ‖F‖∞ ≤ ‖F‖₂.
        start = float(np.linalg.norm(case.fn(case.y0, case.args)))
        tags = TAGS[case.family]
        row = Row(case.family, "", case.fn, case.y0, case.args, case.target / start, tags)
        contender = row_optimistix(name, linear_solver, eta=eta)
        run = contender.prepare(row, case.fn)
        knobs, spent = (eta, 1.0), 0.0
        for looseness in loosenesses:
            knobs = (eta, looseness)
            begin = time.perf_counter()
            outcome = run(knobs)
            spent += time.perf_counter() - begin
            if spent > limit or (outcome.failure is None and case.residual(outcome.value) <= 1.0):
                break
        products: dict[str, int | None] = {}

        def solve() -> Outcome:
            begin = time.perf_counter()
            outcome = run(knobs)
            seconds = time.perf_counter() - begin
            residual = case.residual(outcome.value)
            failure = outcome.failure
            if failure is None and not residual <= 1.0:
                failure = "reports success, but ‖F‖ is above the tolerance"
            if failure is None and not products:
                products["number"] = _products(row, linear_solver, knobs, case)
            return Outcome(seconds, outcome.steps, products.get("number"), residual, failure)

        return solve

    return Contender(name, prepare)


def _products(row: Row, linear_solver: Callable, knobs: tuple[float, float], case: Case) -> int:
    """J·v, as they ran."""
    eta, looseness = knobs
    contender = row_optimistix("", linear_solver, eta=eta, looseness=looseness)
    counter = Counter()
    run = contender.prepare(row, lambda y, args: case.fn(counter.tick(y), args))
    with counter.measure() as work:
        run()
    return work.tangent

"""nksolve and Diffrax in `python -m benchmarks --ode`: Diffrax's `diffeqsolve` for both."""

import time
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx

import nksolve as nks
from nksolve import ode
from tests.helpers.counting import Counter

from .ode_problems import Problem
from .ode_timing import Runner, Solved

_METHODS = ("Kvaerno3", "Kvaerno5", "Rodas5P", "Rosenbrock23", "BDF")
_DIFFRAX = ("Kvaerno3", "Kvaerno5")
MAX_STEPS = 1_000_000


def rows(known: Problem) -> list[str]:
    """Contenders. Diffrax with a dense Jacobian is left out where it takes minutes or memory runs
    out, and so is Rosenbrock23 where others are far ahead."""
    if known.lanes:
        return [f"nksolve {m}" for m in ("Kvaerno5", "Rodas5P", "BDF")] + ["Diffrax Kvaerno5"]
    if known.name in ("bruss-10000", "grid-128"):
        return [f"nksolve {m}" for m in ("Kvaerno5", "Rodas5P", "BDF")]
    ours = [f"nksolve {m}" for m in _METHODS]
    dense = [f"Diffrax {m}" for m in _DIFFRAX]
    krylov = [f"{name}, Newton(lx.GMRES)" for name in dense]
    if known.size > 500:
        dense = ["Diffrax Kvaerno5"] if known.shape == "line" else []
        krylov = krylov[1:]
    return [*ours, *dense, *krylov]


def linear_solver(known: Problem, method: str) -> nks.AbstractKrylovSolver:
    """What a user would choose."""
    if known.shape == "kinetics":
        return nks.AutoLinear()
    if known.shape == "line":
        return nks.BandedDirect(block=2)
    if known.name.startswith("gray"):  # mildly stiff: no preconditioner pays
        return nks.GMRES(restart=15)
    return nks.GMRES(restart=5 if method == "BDF" else 10, preconditioner=MEAN_REACTION)


def solver(known: Problem, row: str, atol: Any = 1e-8) -> dfx.AbstractSolver:
    """By the name of the row."""
    library, _, method = row.partition(" ")
    if library == "Diffrax":
        method, _, krylov = method.partition(",")
        if not krylov:
            return getattr(dfx, method)()
        newton = dfx.with_stepsize_controller_tols(optx.Newton)
        return getattr(dfx, method)(
            root_finder=newton(linear_solver=lx.GMRES(rtol=1e-3, atol=1e-2 * atol))
        )
    extra: dict[str, Any] = {}
    if known.shape != "kinetics" and method in ("BDF", "Kvaerno3", "Kvaerno5"):
        steps = 4 if method == "BDF" else 10
        extra["root_finder"] = ode.SimplifiedNewton(kappa=0.1, max_steps=steps)
    return getattr(ode, method)(linear_solver=linear_solver(known, method), **extra)


def controller(known: Problem, row: str, rtol: Any, atol: Any) -> Any:
    """`PIDController` as it comes, `BDFController` for BDF; jumps declared."""
    kind = ode.BDFController if row.endswith("BDF") else dfx.PIDController
    chosen = kind(rtol=rtol, atol=atol)
    jumps = known.given.jumps
    if not jumps:
        return chosen
    return dfx.ClipStepSizeController(chosen, jump_ts=jnp.array(jumps))


def solution(
    known: Problem, row: str, fn: Callable, y0: Any, args: Any, rtol: Any, **keywords: Any
) -> dfx.Solution:
    """Of one lane."""
    rtol, atol = known.tolerances(rtol)
    return dfx.diffeqsolve(
        dfx.ODETerm(fn),
        solver(known, row, atol),
        *known.given.span,
        None,
        y0,
        args,
        stepsize_controller=controller(known, row, rtol, atol),
        throw=False,
        **{"max_steps": MAX_STEPS, **keywords},
    )


def runner(known: Problem, row: str) -> Runner:
    """Compiles it: one program for all tolerances."""
    given = known.given
    is_ours = row.startswith("nksolve")

    def program(fn: Callable, y0: Any, args: Any, rtol: Any) -> Any:
        keywords = {"adjoint": ode.WithStats()} if is_ours else {}
        one = lambda args: solution(known, row, fn, y0, args, rtol, **keywords)
        sol = jax.vmap(one)(args) if known.lanes else one(args)
        ok = sol.result == dfx.RESULTS.successful
        end = jax.tree.map(lambda y: y[:, -1] if known.lanes else y[-1], sol.ys)
        return end, sol.stats, jnp.all(ok)

    start = time.perf_counter()
    traced = jax.jit(lambda y0, args, rtol: program(given.fn, y0, args, rtol))
    compiled = traced.lower(given.y0, given.args, 1e-3).compile()
    seconds = time.perf_counter() - start
    probes = _probes(known, row) if is_ours else 0

    def solve(rtol: float) -> Solved:
        y, stats, ok = jax.block_until_ready(compiled(given.y0, given.args, rtol))
        number = lambda name: int(np.sum(stats[name]))
        counts = {"steps": number("num_accepted_steps"), "rejected": number("num_rejected_steps")}
        if is_ours:
            counts |= {
                "evaluations": number("num_fn_evals"),
                "matvecs": number("num_matvecs") + probes * number("num_preconditioner_updates"),
                "linearisations": number("num_linearisations"),
                "newton": number("num_newton_steps"),
                "failures": number("num_convergence_failures"),
            }
            counts["work"] = counts["evaluations"] + counts["matvecs"]
        return Solved(np.asarray(y), bool(ok), counts)

    counted: list[Any] = []

    def count(rtol: float) -> int:
        if not counted:
            counter = Counter()
            fn = lambda t, y, args: given.fn(t, counter.tick(y), args)
            counted.extend([counter, jax.jit(lambda y, a, r: program(fn, y, a, r))])
        counter, counting = counted
        with counter.measure() as work:
            jax.block_until_ready(counting(given.y0, given.args, rtol))
        return sum(e.lanes or 1 for e in work.executions)

    return Runner(solve, seconds, None if is_ours or known.lanes else count)


def _probes(known: Problem, row: str) -> int:
    """Products with the Jacobian that a factorisation takes."""
    given = known.given
    args = given.args[0] if known.lanes else given.args
    chosen = linear_solver(known, row.partition(" ")[2])
    structure = nks.linearise(lambda y, args: given.fn(0.0, y, args), given.y0, args).operator
    chosen = chosen.chosen(lambda: structure, given.y0, args)
    if isinstance(chosen.preconditioner, ode.StagePreconditioner):
        return 0
    return int(chosen.preconditioner.num_probes(structure, given.y0, args))


def _mean_reaction(t: Any, y: Any, gamma: Any, args: Any) -> Callable:
    """(I − γ (αΔ + the mean over the grid of the reactions' 2 × 2 Jacobian))⁻¹ by Fourier."""
    (a, _, alpha), (u, v) = args, y
    n = u.shape[0]
    cosine = 2.0 * np.cos(2.0 * np.pi * np.arange(n) / n) - 2.0
    symbol = jnp.asarray(cosine[:, None] + cosine[: n // 2 + 1], u.dtype)
    shifted = 1.0 - gamma * alpha * (n - 1) ** 2 * symbol
    uv, uu = 2.0 * jnp.mean(u * v), jnp.mean(u * u)
    p, q = shifted - gamma * (uv - a - 1.0), -gamma * uu
    r, s = -gamma * (a - uv), shifted + gamma * uu
    by = 1.0 / (p * s - q * r)
    p, q, r, s = p * by, q * by, r * by, s * by

    def inverse(w):
        first, second = jnp.fft.rfft2(w)
        with jax.numpy_dtype_promotion("standard"):  # a complex number times a real one
            both = jnp.stack([s * first - q * second, p * second - r * first])
        return jnp.fft.irfft2(both, s=(n, n)).astype(w.dtype)

    return inverse


MEAN_REACTION = ode.StagePreconditioner(_mean_reaction)

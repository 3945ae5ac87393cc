"""The measurements behind docs/how-to-choose.md: every Krylov method on every kind of Jacobian, and
every preconditioner on the problems it is for."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

import nksolve as nks
from nksolve.problems import get

from .pde_ours import bratu_shift, mean_reaction

PAGE = Path(__file__).resolve().parent.parent / "docs" / "validation" / "advice.md"


class System(NamedTuple):
    """A x = b: v → A v and b."""

    title: str
    mv: Callable[[Any], Any]
    b: Any


def methods() -> dict[str, Any]:
    """Every Krylov method, by what it is called in the table."""
    common = {"rtol": 1e-8, "atol": 0.0, "max_steps": 5000}
    return {
        "GMRES(30)": nks.GMRES(**common),
        "GMRES(100)": nks.GMRES(**common, restart=100),
        "GCRODR(20, 5)": nks.GCRODR(**common, restart=20, recycle=5),
        "CG": nks.CG(**common),
        "MINRES": nks.MINRES(**common),
        "BiCGStab": nks.BiCGStab(**common),
        "BiCGStab, ℓ = 2": nks.BiCGStab(**common, ell=2),
        "IDR(4)": nks.IDR(**common),
        "TFQMR": nks.TFQMR(**common),
        "LSMR": nks.LSMR(**common),
    }


def systems(small: bool) -> list[System]:
    """One of each kind of Jacobian."""
    n = 16 if small else 64
    rng = np.random.default_rng(0)
    bratu = get("bratu", n=n)
    upwind = get("convection-diffusion-linear", n=n - 1)
    size = 64 if small else 512
    skew = rng.standard_normal((size, size)) / np.sqrt(size)
    skew = jnp.asarray(skew - skew.T + 0.3 * np.eye(size))
    weights = rng.standard_normal((size, size)) / np.sqrt(size)
    layer = jnp.asarray(np.eye(size) - 0.9 * weights)
    at_start = nks.linearise(bratu.fn, bratu.y0, bratu.args).operator
    upwind_j = nks.linearise(upwind.fn, upwind.y0, upwind.args).operator
    ones = jnp.ones_like(bratu.y0)
    vector = jnp.asarray(rng.standard_normal(size))
    shift = 0.2 if small else 0.02
    return [
        System(f"symmetric definite: Bratu {n}²", at_start.mv, ones),
        System(
            f"symmetric indefinite: Bratu {n}² − {shift} I",
            lambda v: at_start.mv(v) - shift * v,
            ones,
        ),
        System(
            f"nonsymmetric: convection–diffusion {n - 1}²",
            upwind_j.mv,
            -upwind.fn(upwind.y0, upwind.args),
        ),
        System(f"nearly skew: K + 0.3 I, {size}", lambda v: skew @ v, vector),
        System(f"implicit layer: I − 0.9 W, {size}", lambda v: layer @ v, vector),
    ]


def method_tables(*, small: bool, repeats: int) -> str:
    """Linear solves to a relative residual of 1e-8."""
    parts = []
    for system in systems(small):
        lines = [f"### {system.title}", "", "| method | products with A (and Aᵀ) | ms | result |"]
        lines.append("|---|--:|--:|---|")
        for name, solver in methods().items():
            seconds, solution = _timed(_linear(system, solver), repeats)
            stats = solution.stats
            products = int(stats["num_matvecs"]) + int(stats["num_transposed_matvecs"])
            good = bool(solution.result == lx.RESULTS.successful)
            reason = "" if good else str(lx.RESULTS[solution.result]).split(".")[0].split(" - ")[0]
            lines.append(f"| {name} | {products} | {1e3 * seconds:.3g} | {_short(good, reason)} |")
        parts.append("\n".join(lines))
        print(parts[-1], flush=True)
    return "\n\n".join(parts)


def _short(good: bool, reason: str) -> str:
    return "" if good else f"failed: {reason[:60].strip()}"


def _linear(system: System, solver: Any) -> Callable[[], Any]:
    @jax.jit
    def solve(b):
        tags = _promised(solver)
        operator = lx.FunctionLinearOperator(system.mv, jax.eval_shape(lambda: b), tags)
        solution = lx.linear_solve(operator, b, solver, throw=False)
        return eqx.tree_at(lambda s: s.state, solution, None)

    return lambda: solve(system.b)


class Choice(NamedTuple):
    """A preconditioned Newton solve."""

    name: str
    linear_solver: Any
    policy: Any = nks.Linearise()


def preconditioners(small: bool) -> list[tuple[str, Any, dict[str, Any], list[Choice]]]:
    """(title, problem, fields of the Newton solver, choices)."""
    n = 15 if small else 127
    bratu = get("bratu", n=n)
    multigrid = nks.Multigrid(bratu.fn, nks.VertexDirichlet())
    spectral = nks.Spectral(shift=bratu_shift)
    algebraic = nks.AlgebraicMultigrid.from_jacobian(bratu.fn, bratu.y0, bratu.args)
    line = get("bratu-1d", n=100 if small else 10_000, lam=3.0)
    web = get("food-web")
    brusselator = get("brusselator", n=16 if small else 64)
    layer, start, weights = _layer(64 if small else 512)

    def gmres(preconditioner: Any = None, restart: int = 60) -> nks.GMRES:
        return nks.GMRES(
            restart=restart, max_steps=2000, preconditioner=preconditioner or nks.Identity()
        )

    scalar = [
        Choice("none", gmres()),
        Choice("none, CG", nks.CG()),
        Choice("Chebyshev(8)", gmres(nks.Chebyshev(8))),
        Choice("SparseLU", gmres(nks.SparseLU())),
        Choice("SparseDirect", nks.SparseDirect()),
        Choice("Spectral()", gmres(nks.Spectral())),
        Choice("Spectral(mean reaction)", gmres(spectral)),
        Choice("Lagged(Spectral)", gmres(nks.Lagged(spectral, growth=3.0))),
        Choice("QuasiNewton(Spectral())", gmres(nks.QuasiNewton(nks.Spectral()))),
        Choice("AlgebraicMultigrid", gmres(algebraic)),
        Choice("Multigrid", gmres(multigrid)),
        Choice("Multigrid, CG", nks.CG(preconditioner=multigrid)),
        Choice("Multigrid, LowerPrecision", gmres(multigrid), nks.LowerPrecision()),
    ]
    one = [
        Choice("BlockTridiagonal(1)", gmres(nks.BlockTridiagonal(1))),
        Choice("BandedDirect", nks.BandedDirect(lower=1, upper=1)),
        Choice("SparseDirect", nks.SparseDirect()),
        Choice("Spectral()", gmres(nks.Spectral())),
    ]
    species = [
        Choice("none", gmres()),
        Choice("BlockJacobi(coupling=0)", gmres(nks.BlockJacobi(coupling=0))),
        Choice("BlockJacobi(coupling=Star())", gmres(nks.BlockJacobi(coupling=nks.Star()))),
        Choice("BlockTridiagonal() (lines)", gmres(nks.BlockTridiagonal())),
        Choice("SparseDirect", nks.SparseDirect()),
    ]
    pattern = [
        Choice("none", gmres()),
        Choice("SparseDirect", nks.SparseDirect()),
        Choice("2×2 systems by FFT", gmres(nks.UserPreconditioner(mean_reaction))),
    ]
    low_rank = [
        Choice("none", gmres()),
        Choice("none, restart 8", gmres(restart=8)),
        Choice("Nystrom(16)", gmres(nks.Nystrom(16))),
        Choice("Lagged(Nystrom(16))", gmres(nks.Lagged(nks.Nystrom(16), max_age=5))),
        Choice("Deflation(16)", gmres(nks.Deflation(16))),
    ]
    relative = {"rtol": 1e-8, "atol": 0.0}
    largest = {"rtol": 0.0, "norm": lambda f: jnp.max(jnp.abs(f))}
    return [
        (f"Bratu {n}², λ = 6", bratu, relative, scalar),
        (f"Bratu in one dimension, {line.y0.size} unknowns", line, relative, one),
        ("food web 8 × 8 × 6", web, {**largest, "atol": 1e-7}, species),
        (
            f"Brusselator {brusselator.y0.shape[0]}²",
            brusselator,
            {**largest, "atol": 1e-4},
            pattern,
        ),
        (f"implicit layer, {start.size} unknowns", (layer, start, weights), relative, low_rank),
    ]


def _layer(size: int) -> tuple[Callable, Any, Any]:
    """z = tanh(W z + 1) with W = 0.3 Q + a part of rank 8: J is near I but for few directions."""
    rng = np.random.default_rng(1)
    noise = 0.3 * rng.standard_normal((size, size)) / np.sqrt(size)
    low = rng.standard_normal((size, 8)) @ rng.standard_normal((8, size)) / size
    weights = jnp.asarray(noise + 3.0 * low)
    return lambda z, w: z - jnp.tanh(w @ z + 1.0), jnp.zeros(size), weights


def preconditioner_tables(*, small: bool, repeats: int) -> str:
    """Newton solves."""
    parts = []
    for title, problem, fields, choices in preconditioners(small):
        fn, y0, args = (
            problem if isinstance(problem, tuple) else (problem.fn, problem.y0, problem.args)
        )
        lines = [f"### {title}", "", "| M⁻¹ | Newton steps | matvecs | probes | ms | reason |"]
        lines.append("|---|--:|--:|--:|--:|---|")
        for choice in choices:
            solver = nks.NewtonKrylov(
                **fields, linear_solver=choice.linear_solver, policy=choice.policy
            )
            run = jax.jit(lambda y, a, s=solver, f=fn: _solved(f, s, y, a))
            seconds, solution = _timed(lambda run=run, y0=y0, args=args: run(y0, args), repeats)
            stats = solution.stats
            reason = nks.reason_name(stats["reason"])
            numbers = [int(stats[f"num_{key}"]) for key in ("steps", "matvecs", "probes")]
            cells = " | ".join(map(str, numbers))
            lines.append(
                f"| {choice.name} | {cells} | {1e3 * seconds:.3g} | "
                f"{'' if reason.startswith('residual') else reason} |"
            )
        parts.append("\n".join(lines))
        print(parts[-1], flush=True)
    return "\n\n".join(parts)


def _solved(fn: Callable, solver: nks.NewtonKrylov, y0: Any, args: Any) -> Any:
    # A hundred thousand matvecs and no root in sight are reported, not waited for.
    tags = _promised(solver.linear_solver)
    return nks.root_find(fn, solver, y0, args, throw=False, max_steps=40, tags=tags)


def _promised(solver: Any) -> frozenset[object]:
    """Symmetry, to who asks for it: also of matrices that have none, to see what comes of it."""
    return frozenset({lx.symmetric_tag} if solver.needs_symmetry else ())


def _timed(solve: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The least of some runs after one that compiles."""
    solution = jax.block_until_ready(solve())
    least = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        solution = jax.block_until_ready(solve())
        least = min(least, time.perf_counter() - start)
        if least > 5.0:
            break
    return least, solution


def report(*, small: bool, only: Sequence[str], repeats: int, budget: float) -> str:
    """Both sets of tables."""
    del only, budget
    return "\n\n".join(
        [
            "## Krylov methods, linear solves to 1e-8",
            method_tables(small=small, repeats=repeats),
            "## Preconditioners, Newton solves",
            preconditioner_tables(small=small, repeats=repeats),
        ]
    )

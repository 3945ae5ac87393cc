"""How nksolve solves each case of `python -m benchmarks --pde`."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nksolve as nks
from nksolve.problems.bratu import bratu_residual
from nksolve.problems.brusselator import BrusselatorArgs

from .pde_cases import TAGS, Case, Contender, Outcome


def ours(case: Case) -> list[Contender]:
    """The first is what all ratios are to."""
    return {"bratu": _bratu, "brusselator": _brusselator}[case.family]()


def _bratu() -> list[Contender]:
    multigrid = nks.Multigrid(bratu_residual, nks.VertexDirichlet())
    spectral = nks.Spectral(shift=bratu_shift)
    return [
        nksolve("nksolve, CG + Multigrid", nks.CG(preconditioner=multigrid)),
        nksolve(
            "the same, Krylov solve in float32",
            nks.CG(preconditioner=multigrid),
            policy=nks.LowerPrecision(),
        ),
        sequenced(
            "the same, grid sequencing",
            nks.CG(preconditioner=multigrid),
            policy=nks.LowerPrecision(),
        ),
        nksolve("nksolve, GMRES(10) + Multigrid", nks.GMRES(restart=10, preconditioner=multigrid)),
        nksolve("nksolve, GMRES(10) + Spectral", nks.GMRES(restart=10, preconditioner=spectral)),
    ]


def _brusselator() -> list[Contender]:
    by_mode = nks.UserPreconditioner(mean_reaction)
    return [
        nksolve("nksolve, GMRES + 2×2 systems by FFT", nks.GMRES(preconditioner=by_mode)),
    ]


def nksolve(name: str, linear_solver: Any, **fields: Any) -> Contender:
    """`nks.NewtonKrylov` with that linear solver, compiled beforehand."""

    def prepare(case: Case, limit: float):
        del limit
        solver = nks.NewtonKrylov(
            rtol=0.0, atol=case.target, norm=case.norm, linear_solver=linear_solver, **fields
        )

        @jax.jit
        def run(y, args):
            tags = TAGS[case.family]
            solution = nks.root_find(case.fn, solver, y, args, throw=False, tags=tags)
            stats = solution.stats
            return solution.value, stats["num_steps"], stats["num_matvecs"], stats["reason"]._value

        jax.block_until_ready(run(case.y0, case.args))

        def solve() -> Outcome:
            start = time.perf_counter()
            value, steps, matvecs, _ = jax.block_until_ready(run(case.y0, case.args))
            seconds = time.perf_counter() - start
            residual = case.residual(value)
            failure = None if residual <= 1.0 + 1e-9 else "not converged"
            return Outcome(seconds, int(steps), int(matvecs), residual, failure)

        return solve

    return Contender(name, prepare, growth=3.0)


def sequenced(name: str, linear_solver: Any, **fields: Any) -> Contender:
    """The same by nested iteration over four grids: Newton and Krylov counts are those of the
    finest."""

    def prepare(case: Case, limit: float):
        del limit
        solver = nks.NewtonKrylov(
            rtol=0.0,
            atol=case.target,
            norm=case.norm,
            linear_solver=linear_solver,
            forcing=nks.EisenstatWalker2(eta_0=1e-3),
            **fields,
        )

        @jax.jit
        def run(y, args):
            solution = nks.grid_sequence(
                case.fn,
                solver,
                y,
                args,
                grid=nks.VertexDirichlet(),
                num_levels=4,
                throw=False,
                tags=TAGS[case.family],
            )
            return solution.value, solution.stats["num_steps"], solution.stats["num_matvecs"]

        jax.block_until_ready(run(case.y0, case.args))

        def solve() -> Outcome:
            start = time.perf_counter()
            value, steps, matvecs = jax.block_until_ready(run(case.y0, case.args))
            seconds = time.perf_counter() - start
            residual = case.residual(value)
            failure = None if residual <= 1.0 + 1e-9 else "not converged"
            return Outcome(seconds, int(steps), int(matvecs), residual, failure)

        return solve

    return Contender(name, prepare, growth=3.0)


def bratu_shift(y, lam):
    """−h² λ mean(eᵘ): what `Spectral` takes for the reaction of Bratu's problem."""
    h = 1.0 / (y.shape[0] + 1)
    return -(h**2) * lam * jnp.mean(jnp.exp(y))


def mean_reaction(operator, y, args: BrusselatorArgs):
    """(α Δ_h + R̄)⁻¹ for the Brusselator: R̄ is the mean of the 2×2 reaction blocks.

    On the grid's Fourier modes α Δ_h is a number, so that one 2×2 system is left for each.
    """
    del operator
    n = y.shape[0]
    u, v = y[..., 0], y[..., 1]
    uv, uu = jnp.mean(2.0 * u * v), jnp.mean(u * u)
    angles = 2.0 * jnp.pi * jnp.arange(n, dtype=y.dtype) / n
    line = (n - 1.0) ** 2 * args.alpha * (2.0 * jnp.cos(angles) - 2.0)
    laplacian = line[:, None] + line[None, : n // 2 + 1]
    first, second = laplacian + uv - (args.a + 1.0), laplacian - uu
    lower = args.a - uv
    determinant = first * second - uu * lower
    inverse = [second, -uu, -lower, first]
    inverse = [(x / determinant).astype(np.result_type(y.dtype, np.complex64)) for x in inverse]

    def solve(w):
        p, q = jnp.fft.rfft2(w[..., 0]), jnp.fft.rfft2(w[..., 1])
        parts = inverse[0] * p + inverse[1] * q, inverse[2] * p + inverse[3] * q
        return jnp.stack([jnp.fft.irfft2(part, s=(n, n)) for part in parts], axis=-1)

    return solve

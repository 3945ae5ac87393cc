"""Grid sequencing: few Newton steps on the finest grid, the same root, the same gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.precondition.multigrid import Multigrid
from nksolve.precondition.transfer import VertexDirichlet
from nksolve.problems.bratu import bratu_residual
from nksolve.verbs.grid_sequencing import grid_sequence

LAM = jnp.asarray(6.0)


@functools.cache
def solver():
    multigrid = Multigrid(bratu_residual, VertexDirichlet(), coarsest=60)
    krylov = nks.GMRES(restart=20, preconditioner=multigrid)
    forcing = nks.EisenstatWalker2(eta_0=1e-3)
    return nks.NewtonKrylov(1e-8, 0.0, linear_solver=krylov, forcing=forcing)


def sequence(n, lam=LAM, **keywords):
    y0 = jnp.zeros((n, n))
    return grid_sequence(bratu_residual, solver(), y0, lam, grid=VertexDirichlet(), **keywords)


def check(n, solution):
    stats = solution.stats
    assert int(stats["num_steps"]) <= 2 and len(stats["levels"]) == 3
    assert int(stats["levels"][0]["num_steps"]) > 2
    # The tolerance is that of a solve from y0 itself.
    start = np.linalg.norm(bratu_residual(jnp.zeros((n, n)), LAM))
    achieved = np.linalg.norm(bratu_residual(solution.value, LAM))
    assert achieved <= 1e-8 * start
    np.testing.assert_allclose(stats["start_residual_norm"], start, rtol=1e-12)
    np.testing.assert_allclose(stats["residual_norm"], achieved, rtol=1e-3)
    assert nks.reason_name(stats["reason"]) == "residual_atol"


def test_two_newton_steps_on_the_finest_grid():
    solution = sequence(63)
    check(63, solution)
    direct = nks.root_find(bratu_residual, solver(), jnp.zeros((63, 63)), LAM)
    assert int(direct.stats["num_steps"]) > 2
    np.testing.assert_allclose(solution.value, direct.value, rtol=1e-6)


@pytest.mark.slow
def test_two_newton_steps_on_a_finer_grid():
    check(255, sequence(255))


def test_the_gradient_is_that_of_the_finest_solve():
    loss = lambda lam: jnp.sum(sequence(15, lam, num_levels=2).value)
    direct = lambda lam: jnp.sum(
        nks.root_find(bratu_residual, solver(), jnp.zeros((15, 15)), lam).value
    )
    np.testing.assert_allclose(jax.grad(loss)(LAM), jax.grad(direct)(LAM), rtol=1e-6)


def test_one_level_is_a_plain_solve():
    plain = nks.root_find(bratu_residual, solver(), jnp.zeros((15, 15)), LAM)
    one = sequence(15, num_levels=1)
    np.testing.assert_allclose(one.value, plain.value, rtol=1e-12)
    assert int(one.stats["num_steps"]) == int(plain.stats["num_steps"])


def test_residuals_by_level_fields_and_aux():
    def fn(u, args):
        h = 1 / (u.shape[0] + 1)
        return 2 * u - jnp.pad(u, 1)[2:] - jnp.pad(u, 1)[:-2] - h**2 * args, jnp.max(u)

    source = jnp.asarray(np.sin(np.pi * np.arange(1, 32) / 32))
    newton = nks.NewtonKrylov(1e-10, 0.0)
    out = grid_sequence(
        (fn, fn), newton, jnp.zeros(31), source, grid=VertexDirichlet(), num_levels=2,
        coarsen=lambda f: f[1::2], has_aux=True,
    )  # fmt: skip
    exact = np.sin(np.pi * np.arange(1, 32) / 32) / np.pi**2
    np.testing.assert_allclose(out.value, exact, atol=1e-4)
    np.testing.assert_allclose(out.aux, jnp.max(out.value), rtol=1e-6)


def test_what_is_refused():
    with pytest.raises(ValueError, match="cannot be coarsened further"):
        sequence(31, num_levels=6)
    with pytest.raises(ValueError, match="number of residuals"):
        grid_sequence((bratu_residual,), solver(), jnp.zeros(7), LAM, grid=VertexDirichlet())
    with pytest.raises(TypeError, match="solver"):  # by the type check or by ours
        grid_sequence(bratu_residual, None, jnp.zeros(7), LAM, grid=VertexDirichlet())

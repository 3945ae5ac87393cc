"""Switching: which way it goes on cells of known spectrum, and that either way is right."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from nksolve.accelerate.switching import Switching
from nksolve.krylov.switching import ContractionRule, SwitchingLinear, estimated_cost
from nksolve.verbs.fixed_point import fixed_point
from tests.helpers import Counter

COUNTER = Counter()
N = 24
RULE = ContractionRule(krylov_cost=4.0)


@functools.cache
def cell(low, high, dtype=jnp.float64, lanes=3):
    """z = tanh(W z + b), b small: the eigenvalues of ∂g/∂z lie in about [low, high]."""
    random = np.random.default_rng(1)
    basis = np.linalg.qr(random.standard_normal((N, N)))[0]
    matrix = (basis * np.linspace(low, high, N)) @ basis.T
    shift = np.asarray([0.01, 0.02, 0.001])[:lanes, None] * random.standard_normal((lanes, N))
    return jnp.asarray(matrix, dtype), jnp.asarray(shift, dtype)


def step(z, args):
    matrix, shift = args
    return jnp.tanh(jnp.matmul(z, matrix.T, precision="highest") + shift)


@functools.cache
def solving(rtol, dtype):
    solver = Switching(rtol, 1e-14, linear_solver=SwitchingLinear(rule=RULE))
    counted = lambda z, args: step(COUNTER.tick(z), args)
    weights = jnp.asarray(np.cos(np.arange(3.0 * N)).reshape(3, N), dtype)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(args):
        solution = fixed_point(counted, solver, jnp.zeros((3, N), dtype), args)
        return jnp.vdot(weights, solution.value), (solution.value, solution.stats)

    return loss, np.asarray(weights, np.float64)


def run(low, high, rtol=1e-9, dtype=jnp.float64):
    """(z, stats, gradient, executions), the gradient checked against dense solves."""
    loss, weights = solving(rtol, dtype)
    args = cell(low, high, dtype)
    with COUNTER.measure() as count:
        (_, (z, stats)), (grad, _) = loss(args)
        jax.block_until_ready(grad)
    matrix, shift = (np.asarray(a, np.float64) for a in args)
    wide = np.asarray(z, np.float64)
    assert nks.reason_name(stats["reason"]) == "residual_rtol"
    rest = np.linalg.norm(np.tanh(wide @ matrix.T + shift) - wide)
    assert rest <= 1.2 * rtol * np.linalg.norm(np.tanh(shift))
    expected = np.zeros((N, N))
    for zi, ci in zip(wide, weights, strict=True):
        jacobian = (1 - zi**2)[:, None] * matrix
        multiplier = np.linalg.solve(np.eye(N) - jacobian.T, ci)
        expected += np.outer((1 - zi**2) * multiplier, zi)
    tol = {jnp.float64: 1e-6, jnp.float32: 3e-4}[dtype]
    assert np.linalg.norm(np.asarray(grad) - expected) <= tol * np.linalg.norm(expected)
    return z, stats, count


def test_a_fast_contraction_builds_no_krylov_space():
    _, stats, count = run(-0.5, 0.5)
    assert int(stats["num_plain_steps"]) == int(stats["num_matvecs"]) > 0
    assert 0.3 < float(stats["contraction"]) < 0.51
    assert count.primal == int(stats["num_fn_evals"])
    assert count.tangent == int(stats["num_matvecs"])


def test_a_slow_contraction_is_left_to_the_krylov_method():
    _, stats, _ = run(-0.99, 0.99)
    plain, matvecs = int(stats["num_plain_steps"]), int(stats["num_matvecs"])
    assert 0 < plain < 0.5 * matvecs
    assert float(stats["contraction"]) > 0.8
    # The plain iteration alone would need ln(1e-9)/ln(0.99) of them.
    assert matvecs < 0.1 * np.log(1e-9) / np.log(0.99)


def test_no_contraction_at_all():
    _, stats, _ = run(-1.5, 0.5)
    assert int(stats["num_plain_steps"]) < 12
    _, stats, _ = run(-4.0, 0.9)
    assert int(stats["num_plain_steps"]) <= 2 and float(stats["contraction"]) > 1


def test_float32():
    _, stats, _ = run(-0.9, 0.9, 1e-6, jnp.float32)
    assert np.isfinite(stats["contraction"])


def test_lanes_go_their_own_ways():
    """A lane of each kind, in lockstep as if alone."""
    solver = Switching(1e-9, 1e-14, linear_solver=SwitchingLinear(rule=RULE))
    args = [cell(-0.3, 0.3), cell(-0.97, 0.97), cell(-1.5, 0.5)]
    one = eqx.filter_jit(lambda m, b: fixed_point(step, solver, jnp.zeros(N), (m, b)))
    alone = [one(m, b[0]) for m, b in args]
    stacked = [jnp.stack([a[0] for a in args]), jnp.stack([a[1][0] for a in args])]
    together = eqx.filter_jit(eqx.filter_vmap(one))(*stacked)
    assert len({int(s.stats["num_plain_steps"]) for s in alone}) > 1
    for i, lane in enumerate(alone):
        np.testing.assert_allclose(together.value[i], lane.value, rtol=1e-7, atol=1e-10)
        for name in ("num_steps", "num_fn_evals", "num_matvecs", "num_plain_steps"):
            assert int(together.stats[name][i]) == int(lane.stats[name])


def test_optimistix_takes_it_and_other_residuals():
    args = cell(-0.5, 0.5)
    z = optx.fixed_point(step, Switching(1e-9, 1e-12), jnp.zeros((3, N)), args).value
    np.testing.assert_allclose(step(z, args), z, atol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex128])
def test_as_a_linear_solver(dtype):
    """Forward and transposed against dense solves; the rate of a symmetric matrix."""
    random = np.random.default_rng(2)
    turn = 1j if dtype == jnp.complex128 else 0.0
    gaussian = random.standard_normal((N, N)) + turn * random.standard_normal((N, N))
    basis = np.linalg.qr(gaussian)[0]
    rhs = jnp.asarray(random.standard_normal(N), dtype)

    @jax.jit
    def both(matrix, rhs):
        operator = lx.MatrixLinearOperator(matrix)
        solver = SwitchingLinear(nks.GMRES(1e-10), RULE)
        out = lx.linear_solve(operator, rhs, solver, throw=False)
        back = lx.linear_solve(operator.transpose(), rhs, solver, throw=False)
        return out.value, back.value, out.result._value, out.stats

    for radius in (0.6, 0.98, 3.0):
        values = np.linspace(-radius, 0.8 * min(radius, 1), N)
        matrix = (basis * values) @ basis.conj().T - np.eye(N)
        x, back, result, stats = both(jnp.asarray(matrix, dtype), rhs)
        assert int(result) == 0
        np.testing.assert_allclose(x, np.linalg.solve(matrix, rhs), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(back, np.linalg.solve(matrix.T, rhs), rtol=1e-6, atol=1e-7)
        assert int(stats["num_plain_steps"]) <= int(stats["num_steps"])
        if radius == 0.6:
            assert int(stats["num_steps"]) == int(stats["num_plain_steps"])
            np.testing.assert_allclose(stats["contraction"], 0.6, atol=0.05)
    zero = both(jnp.asarray(-np.eye(N), dtype), 0 * rhs)
    assert int(zero[2]) == 0 and not np.any(zero[0]) and int(zero[3]["num_matvecs"]) == 0
    bad = both(jnp.asarray(-np.eye(N), dtype), rhs.at[0].set(jnp.nan))
    assert int(bad[2]) != 0 and np.all(np.isfinite(bad[0]))
    singular = both(jnp.zeros((N, N), dtype), rhs)
    assert int(singular[2]) != 0 and np.all(np.isfinite(singular[0]))


def test_the_preconditioner_serves_both():
    random = np.random.default_rng(4)
    scales = np.logspace(0, 3, N)
    matrix = jnp.asarray(np.diag(scales) + 0.02 * random.standard_normal((N, N)))
    diagonal = nks.Jacobi(lambda y, args: jnp.asarray(scales))
    krylov = nks.GMRES(1e-10, preconditioner=diagonal)
    rhs = jnp.ones(N)
    out = lx.linear_solve(lx.MatrixLinearOperator(matrix), rhs, SwitchingLinear(krylov, RULE))
    np.testing.assert_allclose(out.value, np.linalg.solve(matrix, rhs), rtol=1e-8)
    assert int(out.stats["num_plain_steps"]) == int(out.stats["num_steps"]) < 20
    applied = int(out.stats["num_preconditioner_applications"])
    assert applied == int(out.stats["num_plain_steps"])


def test_estimated_costs():
    """Of cells whose matvec is dear next to an Arnoldi step, and of one that is not."""
    cost = lambda n: estimated_cost(lambda v: v @ jnp.ones((n, n)), jnp.ones((64, n)))
    assert cost(64) > 2 and 1 < cost(1024) < 1.5
    image, kernel = jnp.ones((1, 8, 32, 32)), jnp.ones((8, 8, 3, 3))
    convolution = lambda v: jax.lax.conv(v, kernel, (1, 1), "SAME")
    assert estimated_cost(convolution, image) < estimated_cost(lambda v: 2 * v, image)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="krylov_cost"):
        ContractionRule(krylov_cost=0.5)
    with pytest.raises(TypeError, match="SwitchingLinear"):
        Switching(1e-6, 0.0, linear_solver=nks.GMRES())  # pyright: ignore

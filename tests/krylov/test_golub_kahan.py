"""The vectors that LSMR keeps: orthonormal, J Z = U B, fewer iterations, lanes, derivatives."""

import functools as ft

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.krylov.base import KrylovState
from nksolve.krylov.lsmr import LSMR

N = 12
RNG = np.random.default_rng(2)
SCALES = RNG.uniform(0.5, 2.0, N)


def conditioned(exponent):
    """Singular values from 1 to 10^−exponent."""
    left = np.linalg.qr(RNG.standard_normal((N, N)))[0]
    right = np.linalg.qr(RNG.standard_normal((N, N)))[0]
    return left @ np.diag(np.logspace(0, -exponent, N)) @ right.T


HARD = conditioned(6)
B = HARD @ RNG.standard_normal(N)


def wrapped(v):
    return {"a": v[:4].reshape(2, 2), "b": v[4:]}


def flat(vector):
    return jnp.concatenate([jnp.ravel(vector["a"]), vector["b"]])


@ft.cache
def solver_of(kept, preconditioned, dtype):
    diagonal = nks.UserPreconditioner(
        lambda j, y, a: lambda v: wrapped(flat(v) / SCALES.astype(dtype))
    )
    solver = LSMR(kept=kept, preconditioner=diagonal) if preconditioned else LSMR(kept=kept)
    real = dtype == np.float64

    @jax.jit
    def solve(matrix, rhs, rtol):
        b = wrapped(rhs)
        mv = lambda v: wrapped(matrix @ flat(v))
        operator = lx.FunctionLinearOperator(mv, jax.eval_shape(lambda: b))
        state = solver.prepare(operator, None, None)
        return solver.run(state, b, tolerance=rtol * jnp.linalg.norm(rhs), real=real)

    return solve


@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
def test_relation(preconditioned, dtype):
    """VᴴV = I, Z = M⁻¹V and A Z = U B with UᴴU = I, where u₁ = b/‖b‖."""
    matrix, rhs = HARD.astype(dtype), B.astype(dtype)
    if dtype == np.complex128:
        d = np.exp(1j * np.arange(N))
        matrix, rhs = d[:, None] * matrix * d.conj() ** 2, d * rhs
    out = solver_of(N, preconditioned, dtype)(matrix, rhs, 1e-10)
    assert bool(out.result == lx.RESULTS.successful)
    np.testing.assert_allclose(matrix @ flat(out.value), rhs, atol=1e-9)
    k = int(out.workspace.record.columns)
    assert k == int(out.num_steps) <= N
    v = np.asarray(jax.vmap(flat)(out.workspace.arnoldi.head(N))).T[:, :k]
    np.testing.assert_allclose(v.conj().T @ v, np.eye(k), atol=1e-12)
    inverse = np.diag(1 / SCALES) if preconditioned else np.eye(N)
    z = inverse @ v
    if preconditioned:
        np.testing.assert_allclose(jax.vmap(flat)(out.workspace.search.head(N))[:k].T, z)
    else:
        assert out.workspace.search is None
    b = np.asarray(out.workspace.record.matrix)
    assert b.shape == (N + 1, N) and not b[:, k:].any()
    b, image = b[: k + 1, :k], matrix @ z
    np.testing.assert_allclose(image.conj().T @ image, b.T @ b, atol=1e-12)
    np.testing.assert_allclose(rhs.conj() @ image / np.linalg.norm(rhs), b[0], atol=1e-12)


def test_fewer_iterations():
    """κ = 10⁶: at most n iterations where all vectors are kept, many more where none is."""
    kept = solver_of(N, False, np.float64)(HARD, B, 1e-10)
    some = solver_of(6, False, np.float64)(HARD, B, 1e-10)
    none = solver_of(0, False, np.float64)(HARD, B, 1e-10)
    assert int(kept.num_steps) <= N < int(none.num_steps)
    assert int(kept.num_steps) <= int(some.num_steps)
    for out in (kept, some):
        assert bool(out.result == lx.RESULTS.successful)
        np.testing.assert_allclose(HARD @ flat(out.value), B, atol=1e-9)
    assert int(some.workspace.record.columns) == 6
    assert none.workspace is None


def test_lanes():
    """Right-hand sides whose solves end at different steps, one of them zero: as if alone."""
    right = np.linalg.svd(HARD)
    sides = np.stack([B, 0 * B, right[0][:, 0], right[0][:, :3] @ np.ones(3)])
    solve = solver_of(N, False, np.float64)
    batch = jax.vmap(lambda b: solve(HARD, b, 1e-10))(sides)
    steps = []
    for i, side in enumerate(sides):
        alone = solve(HARD, side, 1e-10)
        steps.append(int(alone.num_steps))
        assert steps[-1] == int(batch.num_steps[i])
        k = int(alone.workspace.record.columns)
        assert k == int(batch.workspace.record.columns[i])
        np.testing.assert_allclose(
            flat(jax.tree.map(lambda x: x[i], batch.value)), flat(alone.value), rtol=1e-7, atol=1e-9
        )
        record = batch.workspace.record.matrix[i]
        np.testing.assert_allclose(record, alone.workspace.record.matrix, atol=1e-9)
    assert steps[1] == 0 and len(set(steps)) > 2


def test_workspace_is_used_again():
    """A second solve forgets the first; nothing is done, and nothing kept, where none is wanted."""
    solver = LSMR(kept=N)
    matrix = jnp.asarray(HARD)
    operator = lx.FunctionLinearOperator(lambda v: matrix @ v, jax.eval_shape(lambda: matrix[0]))
    state = solver.prepare(operator, None, None)
    assert isinstance(state, KrylovState)
    run = jax.jit(
        lambda b, tolerance, space: solver.run(
            state, b, tolerance=tolerance, real=True, workspace=space
        )
    )
    first = run(jnp.asarray(B), 1e-9, solver.workspace(jnp.asarray(B), real=True))
    again = run(jnp.ones(N), 1e-2, first.workspace)
    fresh = run(jnp.ones(N), 1e-2, solver.workspace(jnp.asarray(B), real=True))
    np.testing.assert_array_equal(again.value, fresh.value)
    np.testing.assert_array_equal(again.workspace.record.matrix, fresh.workspace.record.matrix)
    none = run(jnp.ones(N), jnp.inf, first.workspace)
    assert int(none.num_matvecs) == 0 and int(none.workspace.record.columns) == 0


def test_rectangular_least_squares_and_derivatives():
    """Through `lx.linear_solve`, more vectors than unknowns asked for; jvp and vjp."""
    tall = jnp.asarray(RNG.standard_normal((9, 4)))
    rhs = jnp.asarray(RNG.standard_normal(9))
    solver = LSMR(rtol=1e-12, kept=30)
    solve = jax.jit(
        lambda a, b: lx.linear_solve(lx.MatrixLinearOperator(a), b, solver, throw=False).value
    )
    np.testing.assert_allclose(solve(tall, rhs), np.linalg.lstsq(tall, rhs, rcond=None)[0])
    tangents = jnp.asarray(RNG.standard_normal((9, 4))), jnp.asarray(RNG.standard_normal(9))
    dense = lambda a, b: jnp.linalg.solve(a.T @ a, a.T @ b)
    got = jax.jvp(solve, (tall, rhs), tangents)[1]
    np.testing.assert_allclose(got, jax.jvp(dense, (tall, rhs), tangents)[1], rtol=1e-8)
    w = jnp.arange(4.0)
    got = jax.vjp(lambda b: solve(tall, b), rhs)[1](w)[0]
    np.testing.assert_allclose(got, jax.vjp(lambda b: dense(tall, b), rhs)[1](w)[0], rtol=1e-8)

"""The Hessenberg least-squares problem against `numpy.linalg.lstsq`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nksolve.krylov.hessenberg import Hessenberg

M = 9


def _random(rng, columns, dtype):
    matrix = np.triu(rng.standard_normal((M + 1, M)), -1)
    if np.issubdtype(dtype, np.complexfloating):
        matrix = matrix + 1j * np.triu(rng.standard_normal((M + 1, M)))
    index = np.arange(M)
    matrix[index + 1, index] = np.abs(matrix[index + 1, index].real) + 0.1
    matrix[:, columns:] = 0
    return matrix.astype(dtype)


@jax.jit
def _extend(hessenberg, j, column, below, when=True):
    scale = jnp.sqrt(jnp.sum(jnp.abs(column) ** 2) + below**2)
    return hessenberg.extended(j, column, below, scale, jnp.asarray(when))


def _build(matrix, columns):
    """The class fed column by column, and the estimates that it gave on the way."""
    hessenberg, estimates = Hessenberg.empty(M, matrix.dtype), []
    for j in range(columns):
        column = matrix[:, j].copy()
        column[j + 1] = 0
        below = jnp.asarray(matrix[j + 1, j].real)
        hessenberg = _extend(hessenberg, jnp.int32(j), jnp.asarray(column), below)
        estimates.append(float(hessenberg.residual_norm(jnp.asarray(1.5, below.dtype))))
    return hessenberg, estimates


@pytest.mark.parametrize("columns", [1, 4, M])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128, np.float32])
def test_estimate_and_minimiser(columns, dtype):
    matrix = _random(np.random.default_rng(columns), columns, dtype)
    hessenberg, estimates = _build(matrix, columns)
    wide = matrix.astype(np.result_type(dtype, np.float64))
    rhs = np.zeros(M + 1)
    rhs[0] = 1.5
    tol = 2e-3 if dtype == np.float32 else 1e-9
    for j in range(columns):
        y = np.linalg.lstsq(wide[: j + 2, : j + 1], rhs[: j + 2], rcond=None)[0]
        norm = np.linalg.norm(rhs[: j + 2] - wide[: j + 2, : j + 1] @ y)
        np.testing.assert_allclose(estimates[j], norm, rtol=tol)
    solution = np.asarray(hessenberg.solve(jnp.asarray(1.5, hessenberg.null_square.dtype)))
    assert solution.dtype == dtype
    np.testing.assert_allclose(solution[:columns], y, rtol=tol, atol=tol * np.abs(y).max())
    assert not solution[columns:].any()
    np.testing.assert_allclose(hessenberg.image(jnp.asarray(solution)), wide @ solution, atol=tol)


def test_left_null_vector():
    matrix = _random(np.random.default_rng(0), M, np.complex128)
    hessenberg, _ = _build(matrix, M)
    null = np.asarray(hessenberg.null)
    np.testing.assert_allclose(null.conj() @ matrix, 0, atol=1e-10 * np.linalg.norm(null))
    np.testing.assert_allclose(hessenberg.null_square, np.linalg.norm(null) ** 2, rtol=1e-12)


def test_a_refused_column_leaves_everything():
    hessenberg, _ = _build(_random(np.random.default_rng(1), 3, np.float64), 3)
    bad = jnp.full((M + 1,), jnp.nan)
    same = _extend(hessenberg, jnp.int32(3), bad, jnp.asarray(jnp.nan), when=False)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(hessenberg), strict=True):
        np.testing.assert_array_equal(a, b)


def test_cleared_starts_anew_over_old_columns():
    old, _ = _build(_random(np.random.default_rng(2), M, np.float64), M)
    kept = old.cleared(jnp.array(False))
    assert int(kept.columns) == M and float(kept.null_square) == float(old.null_square)
    matrix = _random(np.random.default_rng(3), 2, np.float64)
    hessenberg = old.cleared(jnp.array(True))
    for j in range(2):
        column = matrix[:, j].copy()
        column[j + 1] = 0
        below = jnp.asarray(matrix[j + 1, j])
        hessenberg = _extend(hessenberg, jnp.int32(j), jnp.asarray(column), below)
    fresh, _ = _build(matrix, 2)
    beta = jnp.asarray(1.0)
    np.testing.assert_allclose(hessenberg.solve(beta), fresh.solve(beta), rtol=1e-14)
    y = fresh.solve(beta)
    np.testing.assert_allclose(hessenberg.image(y), fresh.image(y), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("below", [1e-14, 1e-30, 0.0])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_tiny_subdiagonal_is_a_happy_breakdown(below, dtype):
    """With u already large, ‖u‖² stays finite: in float32 an overflow would throw the cycle away."""
    matrix = _random(np.random.default_rng(4), 3, np.float64)
    matrix[:4, :3] = np.array(
        [[1.0, 1e-3, 0.2], [1e-3, 1.0, 1e-3], [0, 1e-3, 1.0], [0, 0, below]]
    )
    hessenberg, estimates = _build(matrix.astype(dtype), 3)
    assert np.isfinite(float(hessenberg.null_square))
    y = np.asarray(hessenberg.solve(jnp.asarray(1.5, dtype)))[:3]
    exact = np.linalg.solve(matrix[:3, :3], [1.5, 0, 0])
    tol = 1e4 * np.finfo(dtype).eps
    np.testing.assert_allclose(y, exact, rtol=tol, atol=tol)
    assert estimates[-1] <= 10 * np.finfo(dtype).eps


def test_exactly_singular():
    """A zero column, and one in the range of those before it: seen as dependent; solve is finite."""
    matrix = _random(np.random.default_rng(6), 2, np.float64)
    hessenberg, _ = _build(matrix, 2)
    inside = matrix[:, :2] @ np.array([0.3, -2.0])
    outside = inside + np.array([1.0] + [0.0] * M)
    one = jnp.asarray(1.0)
    assert bool(hessenberg.dependent(jnp.zeros(M + 1), jnp.asarray(0.0)))
    assert bool(hessenberg.dependent(jnp.asarray(inside), jnp.asarray(np.linalg.norm(inside))))
    assert not bool(hessenberg.dependent(jnp.asarray(outside), one))
    extended = _extend(hessenberg, jnp.int32(2), jnp.zeros(M + 1), jnp.asarray(0.0))
    assert np.all(np.isfinite(extended.solve(one)))
    np.testing.assert_allclose(extended.residual_norm(one), hessenberg.residual_norm(one))

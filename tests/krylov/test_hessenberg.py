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
def _extend(hessenberg, j, column, below, square):
    scale = jnp.sqrt(jnp.sum(jnp.abs(column) ** 2) + below**2)
    return hessenberg.extended(j, column, below, scale, square)


def _build(matrix, columns, hessenberg=None):
    """(the class fed column by column, ‖u‖², the estimates that it gave on the way for β = 1.5)."""
    hessenberg = Hessenberg.empty(M, matrix.dtype) if hessenberg is None else hessenberg
    estimates, square = [], jnp.ones((), matrix.real.dtype)
    for j in range(columns):
        column = matrix[:, j].copy()
        column[j + 1] = 0
        below = jnp.asarray(matrix[j + 1, j].real)
        hessenberg, added = _extend(hessenberg, jnp.int32(j), jnp.asarray(column), below, square)
        square = square + added.square
        estimates.append(1.5 / np.sqrt(float(square)))
    return hessenberg, square, estimates


def _solve(hessenberg, square, columns, beta=1.5):
    count = jnp.int32(columns)
    filled = jnp.int32(min(columns + 1, M))  # as where another lane has one column more
    return np.asarray(hessenberg.solve(jnp.asarray(beta, square.dtype), square, count, filled))


@pytest.mark.parametrize("columns", [1, 4, M])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128, np.float32])
def test_estimate_and_minimiser(columns, dtype):
    matrix = _random(np.random.default_rng(columns), columns, dtype)
    hessenberg, square, estimates = _build(matrix, columns)
    wide = matrix.astype(np.result_type(dtype, np.float64))
    rhs = np.zeros(M + 1)
    rhs[0] = 1.5
    tol = 2e-3 if dtype == np.float32 else 1e-9
    for j in range(columns):
        y = np.linalg.lstsq(wide[: j + 2, : j + 1], rhs[: j + 2], rcond=None)[0]
        norm = np.linalg.norm(rhs[: j + 2] - wide[: j + 2, : j + 1] @ y)
        np.testing.assert_allclose(estimates[j], norm, rtol=tol)
    solution = _solve(hessenberg, square, columns)
    assert solution.dtype == dtype
    np.testing.assert_allclose(solution[:columns], y, rtol=tol, atol=tol * np.abs(y).max())
    assert not solution[columns:].any()


def test_left_null_vector():
    matrix = _random(np.random.default_rng(0), M, np.complex128)
    hessenberg, square, _ = _build(matrix, M)
    null = np.asarray(hessenberg.null)
    np.testing.assert_allclose(null.conj() @ matrix, 0, atol=1e-10 * np.linalg.norm(null))
    np.testing.assert_allclose(square, np.linalg.norm(null) ** 2, rtol=1e-12)


def test_columns_not_in_use_do_not_matter():
    old, _, _ = _build(_random(np.random.default_rng(2), M, np.float64), M)
    matrix = _random(np.random.default_rng(3), 2, np.float64)
    over, square, _ = _build(matrix, 2, old)
    fresh, fresh_square, _ = _build(matrix, 2)
    np.testing.assert_allclose(square, fresh_square, rtol=1e-14)
    np.testing.assert_allclose(_solve(over, square, 2), _solve(fresh, fresh_square, 2), rtol=1e-14)


@pytest.mark.parametrize("below", [1e-14, 1e-30, 0.0])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_tiny_subdiagonal_is_a_happy_breakdown(below, dtype):
    """With u already large, ‖u‖² stays finite (in float32 it overflowed)."""
    matrix = _random(np.random.default_rng(4), 3, np.float64)
    matrix[:4, :3] = np.array([[1.0, 1e-3, 0.2], [1e-3, 1.0, 1e-3], [0, 1e-3, 1.0], [0, 0, below]])
    hessenberg, square, estimates = _build(matrix.astype(dtype), 3)
    assert np.isfinite(float(square))
    exact = np.linalg.solve(matrix[:3, :3], [1.5, 0, 0])
    tol = 1e4 * np.finfo(dtype).eps
    np.testing.assert_allclose(_solve(hessenberg, square, 3)[:3], exact, rtol=tol, atol=tol)
    assert estimates[-1] <= 10 * np.finfo(dtype).eps


def test_exactly_singular():
    """A zero column, and one in the range of those before it, are seen as dependent."""
    matrix = _random(np.random.default_rng(6), 2, np.float64)
    hessenberg, square, _ = _build(matrix, 2)
    inside = matrix[:, :2] @ np.array([0.3, -2.0])
    outside = inside + np.array([1.0] + [0.0] * M)
    for column, dependent in ((np.zeros(M + 1), True), (inside, True), (outside, False)):
        _, added = _extend(hessenberg, jnp.int32(2), jnp.asarray(column), jnp.asarray(0.0), square)
        assert bool(added.dependent) is dependent
    zero = jnp.zeros(M + 1)
    extended, added = _extend(hessenberg, jnp.int32(2), zero, jnp.asarray(0.0), square)
    assert float(added.square) == 0
    assert np.all(np.isfinite(_solve(extended, square + added.square, 3)))

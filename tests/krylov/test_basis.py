"""The basis against NumPy, in one block and in several."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

from nksolve.krylov import basis as module
from nksolve.krylov.basis import Basis

ROWS = 37  # blocks of 8, 24 and 5


def _vector(rng, dtype):
    """Two leaves of unlike shapes, 9,000 entries: enough for blocks."""

    def leaf(shape):
        x = rng.standard_normal(shape)
        if np.issubdtype(dtype, np.complexfloating):
            x = x + 1j * rng.standard_normal(shape)
        return jnp.asarray(x.astype(dtype))

    return {"field": leaf((80, 100)), "rest": leaf((1000,))}


def _flat(vector):
    return np.concatenate([np.asarray(x).ravel() for x in jtu.tree_leaves(vector)])


@pytest.fixture(
    scope="module", params=[np.float64, np.float32, np.complex128], ids=lambda d: d.__name__
)
def case(request):
    """(vectors, as a matrix, another vector)."""
    rng = np.random.default_rng(1)
    vectors = [_vector(rng, request.param) for _ in range(ROWS)]
    return vectors, np.stack([_flat(v) for v in vectors]), _vector(rng, request.param)


def _filled(vectors, blocked, real=False):
    basis = Basis.allocate(vectors[0], ROWS, real=real)
    if not blocked:  # the same rows in one buffer
        merged = jtu.tree_map(lambda *b: jnp.concatenate(b), *basis.blocks)
        basis = Basis((merged,), real)
    for i, vector in enumerate(vectors):
        basis = _set_row(basis, jnp.int32(i), vector)
    return basis


_set_row = jax.jit(lambda basis, i, vector: basis.set_row(i, vector))
_row = jax.jit(lambda basis, i: basis.row(i))
_dots = jax.jit(lambda basis, vector, filled: basis.dots(vector, filled))
_combine = jax.jit(lambda basis, c, filled: basis.combine(c, filled))


def test_blocks_are_made_for_long_vectors_only():
    long, short = jnp.zeros(module._BLOCKED_FROM), jnp.zeros(module._BLOCKED_FROM - 1)
    assert Basis.allocate(long, ROWS, real=True).sizes == (8, 24, 5)
    assert Basis.allocate(long, 33, real=True).sizes == (8, 24, 1)
    assert Basis.allocate(long, 32, real=True).sizes == (8, 24)
    assert Basis.allocate(long, 8, real=True).sizes == (8,)
    assert Basis.allocate(short, ROWS, real=True).sizes == (ROWS,)


@pytest.mark.parametrize("blocked", [True, False], ids=["blocks", "one"])
def test_rows_dots_and_combinations(case, blocked):
    vectors, matrix, other = case
    basis = _filled(vectors, blocked, real=not np.iscomplexobj(matrix))
    assert len(basis.blocks) == (3 if blocked else 1) and basis.size == ROWS
    for i in range(ROWS):
        np.testing.assert_array_equal(_flat(_row(basis, jnp.int32(i))), matrix[i])
    exact = matrix.conj().astype(np.complex128) @ _flat(other)
    c = np.random.default_rng(2).standard_normal(ROWS).astype(matrix.dtype)
    tol = 1e-4 if matrix.dtype == np.float32 else 1e-11
    for filled in (0, 1, 7, 8, 9, 31, 32, 33, ROWS):
        dots = _dots(basis, other, jnp.int32(filled))
        assert dots.dtype == matrix.dtype
        np.testing.assert_allclose(dots[:filled], exact[:filled], rtol=tol, atol=10 * tol)
        assert not np.any(dots[filled:])
        used = np.where(np.arange(ROWS) < filled, c, 0)
        combination = _flat(_combine(basis, jnp.asarray(used), jnp.int32(filled)))
        np.testing.assert_allclose(combination, used @ matrix, rtol=tol, atol=tol)


def test_replacing_a_row_touches_no_other(case):
    vectors, matrix, other = case
    for i in (0, 7, 8, 15, 16, 20):
        basis = _set_row(_filled(vectors, True), jnp.int32(i), other)
        expected = matrix.copy()
        expected[i] = _flat(other)
        rows = np.stack([_flat(_row(basis, jnp.int32(k))) for k in range(ROWS)])
        np.testing.assert_array_equal(rows, expected)


def test_unfilled_rows_may_hold_anything_finite(case):
    vectors, matrix, other = case
    real = not np.iscomplexobj(matrix)
    some = Basis.allocate(other, ROWS, real=real)
    for i in range(10):
        some = _set_row(some, jnp.int32(i), vectors[i])
    full = _filled(vectors, True, real)
    index = np.arange(ROWS)
    for filled in (3, 9, 10):
        a, b = (_dots(x, other, jnp.int32(filled)) for x in (some, full))
        np.testing.assert_array_equal(a, b)
        ones = jnp.asarray((index < filled).astype(matrix.dtype))
        a, b = (_combine(x, ones, jnp.int32(filled)) for x in (some, full))
        np.testing.assert_array_equal(_flat(a), _flat(b))


def test_complex_leaves_as_a_real_space():
    rng = np.random.default_rng(4)
    vectors = [_vector(rng, np.complex128) for _ in range(ROWS)]
    basis, other = _filled(vectors, True, real=True), vectors[3]
    dots = _dots(basis, other, jnp.int32(ROWS))
    assert dots.dtype == np.float64
    exact = [np.vdot(_flat(v), _flat(other)).real for v in vectors]
    np.testing.assert_allclose(dots, exact, rtol=1e-11, atol=1e-11)


def test_leaves_of_unlike_dtypes():
    vector = {"a": jnp.full((3,), 2.0, jnp.float32), "b": jnp.full((2, 2), 3.0)}
    basis = _set_row(Basis.allocate(vector, 4, real=True), jnp.int32(0), vector)
    dots = _dots(basis, vector, jnp.int32(1))
    assert dots.dtype == np.float64
    np.testing.assert_allclose(dots, [48.0, 0, 0, 0])
    combination = _combine(basis, jnp.array([2.0, 0, 0, 0]), jnp.int32(1))
    assert combination["a"].dtype == np.float32 and combination["b"].dtype == np.float64
    np.testing.assert_allclose(combination["b"], 6.0)

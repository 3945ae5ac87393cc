"""`Dense` inverts any small Jacobian, of arrays and of trees."""

import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks

from .structured import assert_inverts, matrix_operator


def _matrix(n, dtype):
    rng = np.random.default_rng(n)
    matrix = rng.standard_normal((n, n)) + 2 * np.eye(n)
    if np.dtype(dtype).kind == "c":
        matrix = matrix + 1j * rng.standard_normal((n, n))
    return matrix.astype(dtype)


@pytest.mark.parametrize(
    ("n", "dtype"),
    [(1, np.float64), (3, np.float32), (3, np.complex128), (7, np.float64), (16, np.float32)],
)
def test_inverts(n, dtype):
    matrix = _matrix(n, dtype)
    rtol = 1e-4 if dtype == np.float32 else 1e-11
    assert_inverts(nks.Dense(), matrix, jnp.zeros(n, dtype), rtol)
    operator = matrix_operator(matrix, jnp.zeros(n, dtype))
    assert nks.Dense().num_probes(operator, None, None) == n


def test_a_tree_with_numbers_and_two_precisions():
    """x′ of shape (), y′ of shape (2,), in float32 and float64: no line, so no band."""
    matrix = jnp.asarray(_matrix(3, np.float64))

    def fn(v, _):
        flat = jnp.concatenate([v["a"][None].astype(jnp.float64), v["b"]])
        out = matrix @ flat
        return {"a": out[0].astype(jnp.float32), "b": out[1:]}

    y = {"a": jnp.zeros((), jnp.float32), "b": jnp.zeros(2)}
    operator = nks.linearise(fn, y).operator
    b = {"a": jnp.ones((), jnp.float32), "b": jnp.array([2.0, -1.0])}
    x = lx.linear_solve(operator, b, nks.DenseDirect(rtol=1e-6)).value
    expected = np.linalg.solve(np.asarray(matrix), [1.0, 2.0, -1.0])
    np.testing.assert_allclose([x["a"], *x["b"]], expected, rtol=2e-6)
    assert x["a"].dtype == jnp.float32


def test_pivots_and_singular_matrices():
    """[[0, 1], [1, 0]] next to 2 on the diagonal; and a zero row, which is told of."""
    swap = np.zeros((4, 4))
    swap[[0, 1, 2, 3], [1, 0, 3, 2]] = 2.0
    assert_inverts(nks.Dense(), swap, jnp.zeros(4), 1e-13)
    operator = matrix_operator(np.diag([1.0, 2.0, 3.0, 0.0]), jnp.zeros(4))
    out = lx.linear_solve(operator, jnp.ones(4), nks.DenseDirect(), throw=False)
    assert out.result != lx.RESULTS.successful
    assert np.isfinite(out.value).all()


def test_what_it_does_not_take():
    y = {"a": jnp.zeros(2), "b": jnp.zeros(2, jnp.complex128)}
    mixed = nks.linearise(lambda v, _: v, y).operator
    with pytest.raises(ValueError, match="all real or all complex"):
        nks.Dense().init(mixed, y, None)
    wide = nks.linearise(lambda v, _: v[:2], jnp.zeros(3)).operator
    with pytest.raises(ValueError, match="2 × 3"):
        nks.Dense().init(wide, jnp.zeros(3), None)

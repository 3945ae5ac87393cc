"""The Jacobian regulariser against dense Frobenius norms."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.layers.regularisers import jacobian_frobenius
from nksolve.verbs.fixed_point import fixed_point
from tests.helpers import Counter
from tests.helpers.cells import inputs, tanh_cell

D = 12
CASE = tanh_cell("disc", D, 0.9)


def dense(cell, z, x):
    jacobian = jax.jacfwd(cell)(z, x)
    return jnp.sum(jacobian**2) / z.size


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_unbiased_with_the_stated_variance(dtype):
    case = tanh_cell("ginibre", D, 0.5, dtype=dtype)
    cell, z, x = case.cell, case.root, case.x
    one = lambda key: jacobian_frobenius(cell, z, x, key=key)
    samples = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000))
    assert samples.dtype == dtype
    samples = np.asarray(samples, np.float64)
    jacobian = np.asarray(jax.jacfwd(cell)(z, x), np.float64)
    gram = jacobian.T @ jacobian
    variance = 2 * (np.sum(gram**2) - np.sum(np.diag(gram) ** 2)) / D**2
    exact = np.trace(gram) / D
    assert abs(samples.mean() - exact) < 4 * np.sqrt(variance / 4000)
    np.testing.assert_allclose(samples.var(), variance, rtol=0.15)


def test_exact_where_the_gram_matrix_is_diagonal():
    """Signs have no variance there; so normal entries would fail this test."""
    x = jnp.arange(1.0, 5.0)
    out = jacobian_frobenius(lambda z, x: x * z, jnp.ones(4), x, key=jax.random.key(0))
    np.testing.assert_allclose(out, np.mean(np.arange(1, 5) ** 2), rtol=1e-14)


def _mean(cell, z, x, probes):
    return jacobian_frobenius(cell, z, x, key=jax.random.key(5), num_probes=probes)


def test_gradients_are_those_of_the_estimate_and_tend_to_the_dense_one():
    cell, z, x = CASE.cell, CASE.root, CASE.x
    grad = eqx.filter_jit(eqx.filter_grad(lambda a: _mean(*a, 2)))((cell, z, x))

    key = jax.random.split(jax.random.key(5), 2)
    probes = [jax.random.rademacher(jax.random.split(k, 1)[0], (D,), float) for k in key]

    def by_hand(a):
        cell, z, x = a
        images = [jax.jvp(lambda z: cell(z, x), (z,), (v,))[1] for v in probes]
        return sum(jnp.sum(i**2) for i in images) / (2 * D)

    wanted = eqx.filter_grad(by_hand)((cell, z, x))
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)

    many = eqx.filter_jit(eqx.filter_grad(lambda c: _mean(c, z, x, 4000)))(cell).weight
    exact = eqx.filter_grad(dense)(cell, z, x).weight
    assert np.linalg.norm(many - exact) < 0.1 * np.linalg.norm(exact)


def test_through_a_root_the_derivative_in_z_counts():
    """d/dθ of ‖J(z*(θ), θ)‖² by the implicit function theorem, against differences."""
    cell, x, key = CASE.cell, CASE.x, jax.random.key(2)
    solver = nks.NewtonKrylov(1e-13, 1e-13)

    @jax.jit
    def loss(scale):
        scaled = eqx.tree_at(lambda c: c.bias, cell, cell.bias * scale)
        z = fixed_point(scaled, solver, CASE.z0, x).value
        return jacobian_frobenius(scaled, z, x, key=key, num_probes=3)

    step = 1e-5
    differences = (loss(1 + step) - loss(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(1.0), differences, rtol=1e-6)


def test_one_evaluation_serves_all_probes():
    counter = Counter()
    fn = lambda z, x: CASE.cell(counter.tick(z), x)
    with counter.measure() as count:
        jax.jit(lambda z: _mean(fn, z, CASE.x, 5))(CASE.root)
    assert count.primal == 1
    assert count.lanes("tangent") == [5]


def test_a_batch_is_the_mean_of_its_samples():
    x, z = inputs(CASE, [0.5, 0.9])
    together = lambda z, x: jax.vmap(CASE.cell)(z, x)
    out = [
        jacobian_frobenius(together, z, x, key=jax.random.key(i), num_probes=500) for i in range(4)
    ]
    wanted = np.mean([dense(CASE.cell, a, b) for a, b in zip(z, x, strict=True)])
    np.testing.assert_allclose(np.mean(out), wanted, rtol=0.02)


def test_trees_complex_entries_and_bad_input():
    tree = {"u": jnp.ones(3), "v": jnp.ones(2, complex), "w": jnp.ones((), np.float32)}

    def scaled(z, c):
        return jax.tree.map(lambda x: jnp.asarray(c, x.dtype) * x, z)

    key = jax.random.key(0)
    # c times the identity on ℝ³ × ℝ⁴ × ℝ
    np.testing.assert_allclose(jacobian_frobenius(scaled, tree, 3.0, key=key), 9.0, rtol=1e-14)
    assert float(jacobian_frobenius(scaled, (), 3.0, key=key)) == 0
    with pytest.raises(ValueError, match="num_probes"):
        jacobian_frobenius(scaled, tree, 3.0, key=key, num_probes=0)

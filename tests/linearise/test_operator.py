"""The operator is a full citizen of Lineax: thirteen functions, solves, transformations."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest

from nksolve.linearise.linearisation import linearise
from nksolve.linearise.policies import FiniteDifference, Linearise, Recompute, Transposed
from tests.linearise.cases import WITH_ADJOINT

_each_adjoint = pytest.mark.parametrize("policy", WITH_ADJOINT, ids=lambda p: type(p).__name__)

A = np.random.default_rng(5).normal(size=(4, 4)) + 4 * np.eye(4)
Y = jnp.linspace(0.2, 0.8, 4)


def _fn(y, args):
    return args @ jnp.sin(y) + y


def _jacobian(y, args):
    return args * jnp.cos(y)[None, :] + jnp.eye(4)


_STORE = Linearise()


def _operator(tags=(), policy=_STORE, fn=_fn, args=A):
    return linearise(fn, Y, jnp.asarray(args), tags=frozenset(tags), policy=policy).operator


@pytest.mark.parametrize(
    ("tag", "true_of"),
    [
        (lx.symmetric_tag, {"symmetric"}),
        (lx.diagonal_tag, {"symmetric", "diagonal", "tridiagonal", "lower", "upper"}),
        (lx.tridiagonal_tag, {"tridiagonal"}),
        (lx.lower_triangular_tag, {"lower"}),
        (lx.upper_triangular_tag, {"upper"}),
        (lx.unit_diagonal_tag, {"unit"}),
        (lx.positive_semidefinite_tag, {"symmetric", "positive"}),
        (lx.negative_semidefinite_tag, {"symmetric", "negative"}),
        (None, set()),
    ],
)
def test_tags(tag, true_of):
    operator = _operator([] if tag is None else [tag])
    answers = {
        "symmetric": lx.is_symmetric(operator),
        "diagonal": lx.is_diagonal(operator),
        "tridiagonal": lx.is_tridiagonal(operator),
        "lower": lx.is_lower_triangular(operator),
        "upper": lx.is_upper_triangular(operator),
        "unit": lx.has_unit_diagonal(operator),
        "positive": lx.is_positive_semidefinite(operator),
        "negative": lx.is_negative_semidefinite(operator),
    }
    assert {name for name, answer in answers.items() if answer} == true_of
    transposed = operator.transpose()
    assert lx.is_lower_triangular(transposed) == lx.is_upper_triangular(operator)
    assert (transposed is operator) == lx.is_symmetric(operator)


def test_hermitian_is_not_symmetric():
    y = jnp.ones(2, jnp.complex128)
    tags = frozenset({lx.positive_semidefinite_tag})
    assert not lx.is_symmetric(linearise(lambda y, _: 2 * y, y, tags=tags).operator)


@_each_adjoint
def test_dense_functions(policy):
    operator = _operator(policy=policy)
    expected = _jacobian(Y, A)
    assert lx.linearise(operator) is operator
    for dense in (operator.as_matrix(), lx.materialise(operator).as_matrix()):
        np.testing.assert_allclose(dense, expected, rtol=1e-14)
    np.testing.assert_allclose(operator.transpose().as_matrix(), expected.T, rtol=1e-14)
    np.testing.assert_allclose(operator.T.T.as_matrix(), expected, rtol=1e-14)
    np.testing.assert_allclose(lx.diagonal(operator), np.diag(expected), rtol=1e-14)
    for band, offset in zip(lx.tridiagonal(operator), (0, -1, 1), strict=True):
        np.testing.assert_allclose(band, np.diag(expected, offset), rtol=1e-14)


def test_conj():
    y = jnp.array([1.0 + 2.0j, 0.5 - 1.0j])
    matrix = jnp.array([[1.0 + 1.0j, 2.0j], [3.0 + 0.0j, 1.0 - 2.0j]])
    operator = linearise(lambda y, a: a @ (y * y), y, matrix).operator
    expected = matrix * (2 * y)[None, :]
    np.testing.assert_allclose(operator.as_matrix(), expected, rtol=1e-14)
    np.testing.assert_allclose(lx.conj(operator).as_matrix(), expected.conj(), rtol=1e-14)
    hermitian = lx.conj(operator.transpose()).as_matrix()
    np.testing.assert_allclose(hermitian, expected.conj().T, rtol=1e-14)
    np.testing.assert_allclose(lx.conj(operator).T.as_matrix(), expected.conj().T, rtol=1e-14)


@_each_adjoint
@pytest.mark.parametrize("solver", [lx.LU(), lx.GMRES(1e-12, 1e-12)], ids=["LU", "GMRES"])
def test_linear_solve_and_its_gradient(solver, policy):
    """The operator's arrays carry the dependence on y and args through a solve."""
    b = jnp.linspace(1.0, 2.0, 4)

    @eqx.filter_jit
    def solve(y, args):
        operator = linearise(_fn, y, args, policy=policy).operator
        return lx.linear_solve(operator, b, solver).value

    def reference(y, args):
        return jnp.linalg.solve(_jacobian(y, args), b)

    args = jnp.asarray(A)
    np.testing.assert_allclose(solve(Y, args), reference(Y, args), rtol=1e-10)
    weigh = lambda f: lambda *a: jnp.sum(f(*a) ** 2)
    actual = jax.grad(weigh(solve), argnums=(0, 1))(Y, args)
    expected = jax.grad(weigh(reference), argnums=(0, 1))(Y, args)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-8, atol=1e-10)


def test_solve_on_trees_of_unlike_dtypes():
    def fn(y, _):
        wide = y["lo"].astype(jnp.float64)
        return {"lo": 3 * y["lo"] + y["hi"].astype(jnp.float32), "hi": 2 * y["hi"] - wide}

    y = {"lo": jnp.ones(2, jnp.float32), "hi": jnp.ones(2)}
    operator = linearise(fn, y).operator
    assert operator.in_structure() == jax.eval_shape(lambda: y)
    assert operator.in_size() == operator.out_size() == 4
    assert operator.mv(y)["lo"].dtype == jnp.float32
    np.testing.assert_allclose(operator.mv(y)["hi"], [1.0, 1.0])


def test_arithmetic_of_operators():
    operator = _operator()
    shifted = lx.IdentityLinearOperator(operator.in_structure()) - 0.1 * operator
    np.testing.assert_allclose(shifted.mv(Y), Y - 0.1 * (_jacobian(Y, A) @ Y), rtol=1e-14)
    product = operator @ operator.transpose()
    np.testing.assert_allclose(product.mv(Y), _jacobian(Y, A) @ (_jacobian(Y, A).T @ Y), rtol=1e-14)


@_each_adjoint
def test_across_jit_and_vmap(policy):
    args = jnp.asarray(A)
    operator = eqx.filter_jit(lambda y: linearise(_fn, y, args, policy=policy).operator)(Y)
    mv = eqx.filter_jit(lambda operator, v: operator.mv(v))
    np.testing.assert_allclose(mv(operator, Y), _jacobian(Y, args) @ Y, rtol=1e-14)
    points = jnp.stack([Y, 2 * Y, -Y])

    def both(y):
        operator = linearise(_fn, y, args, policy=policy).operator
        return operator.mv(Y), operator.transpose().mv(Y)

    forward, reverse = jax.jit(jax.vmap(both))(points)
    for y, f, r in zip(points, forward, reverse, strict=True):
        np.testing.assert_allclose(f, _jacobian(y, args) @ Y, rtol=1e-13)
        np.testing.assert_allclose(r, _jacobian(y, args).T @ Y, rtol=1e-13)
    vectors = jax.vmap(operator.mv)(points)
    np.testing.assert_allclose(vectors, points @ _jacobian(Y, args).T, rtol=1e-13)


def test_batched_operator():
    """An operator made under `vmap` is a batch of operators: its arrays carry the batch."""
    points = jnp.stack([Y, 2 * Y, -Y])
    batch = eqx.filter_vmap(lambda y: linearise(_fn, y, jnp.asarray(A)).operator)(points)
    out = eqx.filter_vmap(lambda operator, v: operator.mv(v))(batch, points)
    for y, v in zip(points, out, strict=True):
        np.testing.assert_allclose(v, _jacobian(y, A) @ y, rtol=1e-13)


@_each_adjoint
def test_second_derivative(policy):
    """d/dy (J(y) v), by reverse over the linearisation."""

    def directional(y):
        return jnp.sum(linearise(_fn, y, jnp.asarray(A), policy=policy).operator.mv(Y) ** 2)

    expected = jax.grad(lambda y: jnp.sum((_jacobian(y, A) @ Y) ** 2))(Y)
    np.testing.assert_allclose(jax.grad(directional)(Y), expected, rtol=1e-12)


def test_jvp_through_finite_differences_has_no_reverse_solve():
    operator = _operator(policy=FiniteDifference())
    b = jnp.ones(4)
    x = lx.linear_solve(operator, b, lx.LU()).value
    np.testing.assert_allclose(x, np.linalg.solve(_jacobian(Y, A), b), rtol=1e-6)
    solve = lambda b: jnp.sum(lx.linear_solve(operator, b, lx.GMRES(1e-6, 1e-6)).value)
    with pytest.raises(NotImplementedError, match="no transpose"):
        jax.grad(solve)(b)


@pytest.mark.parametrize("policy", [Linearise(), Recompute(), Transposed()], ids=str)
def test_every_array_is_a_leaf(policy):
    """Nothing hides in a closure: the leaves, replaced by zeros, take the map with them."""
    operator = _operator(policy=policy, fn=lambda y, args: args @ jnp.sin(y))
    arrays, static = eqx.partition(operator, eqx.is_array)
    zeroed = eqx.combine(jtu.tree_map(jnp.zeros_like, arrays), static)
    assert np.any(operator.mv(Y)) and not np.any(zeroed.mv(Y))

"""Sums, products and field splits against dense formulas; through Newton, batches, gradients."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.linearise.probing import ravel, unravel
from nksolve.precondition.composite import Additive, Multiplicative
from nksolve.precondition.field_split import FieldSplit, TriangularFieldSplit
from nksolve.precondition.lagged import Lagged
from tests.helpers import Counter

N = 7


class Fields(NamedTuple):
    u: jax.Array
    v: dict


STRUCTURE = Fields(
    jax.ShapeDtypeStruct((2,), jnp.float64),
    {"a": jax.ShapeDtypeStruct((3,), jnp.float64), "b": jax.ShapeDtypeStruct((2,), jnp.float64)},
)


def _random(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((N, N)) / 4 + np.diag(np.arange(2.0, N + 2))
    if np.issubdtype(dtype, np.complexfloating):
        a = a + 0.3j * rng.standard_normal((N, N))
    return a.astype(dtype)


def _cast(structure, dtype):
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), structure)


def _operator(matrix, structure=STRUCTURE, counter=None):
    structure = _cast(structure, matrix.dtype)

    def fn(y, m):
        flat = ravel(y) if counter is None else counter.tick(ravel(y))
        return unravel(m @ flat, structure)

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), structure)
    return nks.linearise(fn, zeros, jnp.asarray(matrix)).operator


def _fixed(matrix, structure=STRUCTURE):
    """A preconditioner M⁻¹ = matrix."""
    return nks.UserPreconditioner(lambda *_: _operator(matrix, structure))


def _matrices(operators):
    """Of operators on `STRUCTURE`s, with their transposes, by one program."""

    def columns(operator):
        structure = operator.in_structure()
        dtype = jax.tree.leaves(structure)[0].dtype
        eye = jnp.eye(sum(s.size for s in jax.tree.leaves(structure)), dtype=dtype)
        return jax.vmap(lambda e: ravel(operator.mv(unravel(e, structure))))(eye).T

    both = eqx.filter_jit(lambda ops: [(columns(op), columns(op.transpose())) for op in ops])
    return [[np.asarray(m) for m in pair] for pair in both(operators)]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex128])
def test_sum_and_product_are_the_dense_ones(dtype):
    a, m1, m2, m3 = (_random(i, dtype) for i in range(4))
    m1, m2, m3 = (np.linalg.inv(m) for m in (m1, m2, m3))
    parts = [_fixed(m) for m in (m1, m2, m3)]
    made = []
    for kind in (Additive, Multiplicative):
        state = kind(parts).init(_operator(a), None, None)
        made.append(kind(parts).as_operator(state))
    made.append(lx.conj(made[1]))
    (total, total_t), (product, product_t), (conj, conj_t) = _matrices(made)
    eye = np.eye(N)
    # I − M⁻¹A = (I − M₃A)(I − M₂A)(I − M₁A)
    error = (eye - m3 @ a) @ (eye - m2 @ a) @ (eye - m1 @ a)
    exact = (eye - error) @ np.linalg.inv(a)
    tol = 1e-4 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(total, m1 + m2 + m3, rtol=tol, atol=tol)
    np.testing.assert_allclose(total_t, (m1 + m2 + m3).T, rtol=tol, atol=tol)
    np.testing.assert_allclose(product, exact, rtol=tol, atol=tol)
    np.testing.assert_allclose(product_t, exact.T, rtol=tol, atol=tol)
    np.testing.assert_allclose(conj, exact.conj(), rtol=tol, atol=tol)
    np.testing.assert_allclose(conj_t, exact.conj().T, rtol=tol, atol=tol)
    assert product.dtype == dtype


def test_a_product_with_an_exact_part_is_exact():
    a = _random(5)
    parts = [_fixed(_random(6)), _fixed(np.linalg.inv(a))]
    made = [Multiplicative(order) for order in (parts, parts[::-1])]
    made = [p.as_operator(p.init(_operator(a), None, None)) for p in made]
    for m, mt in _matrices(made):
        np.testing.assert_allclose(m, np.linalg.inv(a), atol=1e-11)
        np.testing.assert_allclose(mt, np.linalg.inv(a).T, atol=1e-11)


_INVERSE = nks.UserPreconditioner(lambda operator, *_: lx.linearise(_dense_inverse(operator)))


def _dense_inverse(operator):
    """The exact inverse of a small operator."""
    structure = operator.in_structure()
    dtype = jax.tree.leaves(structure)[0].dtype
    eye = jnp.eye(sum(s.size for s in jax.tree.leaves(structure)), dtype=dtype)
    a = jax.vmap(lambda e: ravel(operator.mv(unravel(e, structure))))(eye).T
    inverse = jnp.linalg.inv(a)
    return lx.FunctionLinearOperator(lambda v: unravel(inverse @ ravel(v), structure), structure)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_field_splits_invert_their_blocks(dtype):
    """Against the inverses of the block diagonal and of the block lower triangle."""
    a = _random(9, dtype)
    a[:2, 2:] += 1.0
    u, va, vb = [0, 1], [2, 3, 4], [5, 6]
    cases = [
        ({"u": _INVERSE, "v": _INVERSE}, [u, va + vb]),
        ({"v": _INVERSE, 0: _INVERSE}, [va + vb, u]),
        ({lambda y: y.v["b"]: _INVERSE, lambda y: (y.u, y.v["a"]): _INVERSE}, [vb, u + va]),
        (
            {lambda y: y.v["a"]: _INVERSE, "u": _INVERSE, lambda y: y.v["b"]: _INVERSE},
            [va, u, vb],
        ),
        ({("u", "v"): _INVERSE}, [u + va + vb]),
    ]
    made, exact = [], []
    for fields, blocks in cases:
        order = np.argsort(np.concatenate(blocks))
        ends = np.repeat(np.arange(len(blocks)), [len(b) for b in blocks])[order]
        for kind, keep in (
            (FieldSplit, ends[:, None] == ends[None, :]),
            (TriangularFieldSplit, ends[:, None] >= ends[None, :]),
        ):
            preconditioner = kind(fields)
            made.append(preconditioner.as_operator(preconditioner.init(_operator(a), None, None)))
            exact.append(np.linalg.inv(np.where(keep, a, 0)))
    for (m, mt), inverse in zip(_matrices(made), exact, strict=True):
        np.testing.assert_allclose(m, inverse, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(mt, inverse.T, rtol=1e-10, atol=1e-12)


def test_blocks_inherit_the_tags_that_hold_for_them():
    matrix = _random(1) + _random(1).T
    seen = []
    spy = nks.UserPreconditioner(lambda operator, *_: seen.append(operator) or (lambda v: v))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), STRUCTURE)
    tags = frozenset({lx.positive_semidefinite_tag, lx.tridiagonal_tag})
    fn = lambda y, _: unravel(jnp.asarray(matrix) @ ravel(y), STRUCTURE)
    operator = nks.linearise(fn, zeros, tags=tags).operator
    FieldSplit({"u": spy, "v": spy}).init(operator, None, None)
    assert all(lx.is_positive_semidefinite(op) and lx.is_symmetric(op) for op in seen)
    assert not any(lx.is_tridiagonal(op) for op in seen)


def test_matvecs_inside_an_application_are_as_stated():
    counter = Counter()
    operator = _operator(_random(1), counter=counter)
    eye = _fixed(np.eye(N))
    for preconditioner, matvecs in (
        (Additive([eye] * 3), 0),
        (Multiplicative([eye] * 3), 2),
        (Multiplicative([eye]), 0),
        (Multiplicative([Multiplicative([eye] * 2), eye]), 2),
        (FieldSplit({"u": nks.Identity(), "v": nks.Identity()}), 0),
        (TriangularFieldSplit({"u": nks.Identity(), "v": nks.Identity()}), 1),
    ):
        assert preconditioner.matvecs_per_application(operator) == matvecs
        inverse = preconditioner.as_operator(preconditioner.init(operator, None, None))
        ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), operator.in_structure())
        with counter.measure() as count:
            inverse.mv(ones)
        assert count.tangent == matvecs
        with counter.measure() as count:
            inverse.transpose().mv(ones)
        assert count.transposed == matvecs
        assert not preconditioner.is_variable and preconditioner.is_rebuilt


# u feels v weakly, v feels u strongly: the triangular split is nearly exact.
def _coupled(y, k):
    u, v = y["u"], y["v"]
    return {"u": 3 * u + u**3 - 0.1 * jnp.sin(v) - k, "v": 2 * v + v**3 - 4 * u[::-1]}


_U = nks.Jacobi(lambda y, k: 3 + 3 * y["u"] ** 2)
_V = nks.Jacobi(lambda y, k: 2 + 3 * y["v"] ** 2)


def _solve(preconditioner, method=nks.GMRES, rtol=1e-10):
    krylov = method(rtol=1e-12, preconditioner=preconditioner)
    solver = nks.NewtonKrylov(rtol=rtol, atol=1e-12, linear_solver=krylov)
    start = {"u": jnp.zeros(5), "v": jnp.ones(5)}

    def solve(k):
        solution = nks.root_find(_coupled, solver, start, k)
        return ravel(solution.value), solution.stats

    return solve


@pytest.mark.parametrize(
    "preconditioner",
    [
        TriangularFieldSplit({"u": _U, "v": _V}),
        # Parts that are carried, the linearisation among what is carried.
        Lagged(TriangularFieldSplit({"u": _U, "v": _V}), max_age=2),
        TriangularFieldSplit({"u": Lagged(_U, max_age=2), "v": _V}),
    ],
    ids=["triangular", "lagged", "lagged-part"],
)
def test_through_newton(preconditioner):
    """The root, its derivative by differences, lanes, and counters."""
    solve = jax.jit(_solve(preconditioner))
    ks = jnp.linspace(0.5, 1.5, 15).reshape(3, 5)
    y, stats = solve(ks[0])
    residual = _coupled({"u": y[:5], "v": y[5:]}, ks[0])
    assert max(float(jnp.max(jnp.abs(r))) for r in residual.values()) < 1e-9
    assert int(stats["num_preconditioner_applications"]) > 0
    both = jax.jit(lambda k, w: jax.vjp(lambda k: solve(k)[0], k)[1](w)[0])
    gradient = both(ks[0], jnp.ones(10))
    step = 1e-6 * jnp.ones(5)
    slope = jnp.sum(solve(ks[0] + step)[0] - solve(ks[0] - step)[0]) / 2e-6
    np.testing.assert_allclose(jnp.sum(gradient), slope, rtol=1e-6)
    values, batch = jax.jit(jax.vmap(solve))(ks)
    for lane in range(3):
        np.testing.assert_allclose(values[lane], solve(ks[lane])[0], rtol=1e-8, atol=1e-9)
    if preconditioner.is_rebuilt:
        assert int(batch["num_matvecs"][0]) == int(stats["num_matvecs"])
        assert int(stats["num_preconditioner_updates"]) == int(stats["num_steps"])
    elif isinstance(preconditioner, Lagged):
        assert int(stats["num_preconditioner_updates"]) == -(-int(stats["num_steps"]) // 2)


def test_the_triangular_split_takes_fewer_iterations():
    k = jnp.linspace(0.5, 1.5, 5)
    splits = [kind({"u": _U, "v": _V}) for kind in (FieldSplit, TriangularFieldSplit)]
    results = jax.jit(lambda k: [_solve(split)(k) for split in splits])(k)
    (y, diagonal), (z, triangular) = results
    np.testing.assert_allclose(y, z, rtol=1e-8)
    assert int(triangular["num_matvecs"]) < int(diagonal["num_matvecs"])


def test_what_does_not_fit_is_refused():
    operator = _operator(_random(0))
    eye = nks.Identity()
    with pytest.raises(TypeError):
        Additive([lambda v: v])  # pyright: ignore
    with pytest.raises(TypeError, match="one or more"):
        Multiplicative([])
    with pytest.raises(ValueError, match=r"in none: .*\.v"):
        FieldSplit({"u": eye}).init(operator, None, None)
    with pytest.raises(ValueError, match=r"in several: \['\.u'\]"):
        FieldSplit({"u": eye, ("u", "v"): eye}).init(operator, None, None)
    with pytest.raises(ValueError, match="field 'w'"):
        FieldSplit({"w": eye}).init(operator, None, None)
    with pytest.raises(ValueError, match="field 7"):
        FieldSplit({7: eye}).init(operator, None, None)


def test_modules_split_by_attribute():
    class Model(eqx.Module):
        w: jax.Array
        name: str
        b: jax.Array

    y = Model(jnp.ones(3), "net", jnp.ones(2))
    fn = lambda m, _: Model(2 * m.w + jnp.sum(m.b), None, 5 * m.b)
    lin = nks.linearise(lambda m, _: eqx.filter(fn(m, None), eqx.is_array), y)
    split = TriangularFieldSplit({"b": _INVERSE, "w": _INVERSE})
    inverse = split.as_operator(split.init(lin.operator, y, None))
    r = lin.operator.mv(jax.tree.map(jnp.ones_like, eqx.filter(y, eqx.is_array)))
    for leaf in jax.tree.leaves(inverse.mv(r)):
        np.testing.assert_allclose(leaf, 1.0)

"""Patterns: found, coloured, and values read off that equal the dense Jacobian."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.sparse as sp

import nksolve as nks
from nksolve.linearise import sparsity
from nksolve.linearise.sparsity import Pattern, find_pattern
from nksolve.problems import registry


def _two_leaves(y, c):
    """Two fields of different dtypes that diffuse and react."""
    u, v = y["u"], y["v"].astype(y["u"].dtype)
    lap = lambda w: jnp.pad(w, 1)[2:] - 2.0 * w + jnp.pad(w, 1)[:-2]
    f = lap(u) + c * u**2 * v
    g = lap(v) - c * u**2 * v + v
    return {"u": f, "v": g.astype(y["v"].dtype)}


def _complex(y, c):
    return c * y**2 + 1j * jnp.roll(y, 1) - 3.0 * y


def _from_registry(name, **sizes):
    problem = registry.get(name, **sizes)
    return problem.fn, problem.y0, problem.args


CASES = {
    "bratu-1d": lambda: _from_registry("bratu-1d", n=13),
    "bratu": lambda: _from_registry("bratu", n=5),
    "food-web": lambda: _from_registry("food-web", mx=3),
    "broyden-tridiagonal": lambda: _from_registry("broyden-tridiagonal", n=11),
    "broyden-banded": lambda: _from_registry("broyden-banded", n=17),
    "two-leaves": lambda: (
        _two_leaves,
        {"u": jnp.ones(7), "v": jnp.ones(7, jnp.float32)},
        jnp.asarray(0.3),
    ),
    "complex": lambda: (_complex, jnp.ones(9, complex), jnp.asarray(2.0 - 1j)),
    "one": lambda: (lambda y, a: y**3 - a, jnp.ones(1), jnp.asarray(2.0)),
    "scalar": lambda: (lambda y, a: y**3 - a, jnp.asarray(1.0), jnp.asarray(2.0)),
}


def _moved(y):
    rng = np.random.default_rng(3)
    noise = lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape)).astype(x.dtype)
    return jax.tree.map(noise, y)


def _dense(operator):
    """J by unit vectors, leaf after leaf."""
    leaves, treedef = jax.tree.flatten(operator.in_structure())
    sizes = [leaf.size for leaf in leaves]
    columns = []
    for k in range(sum(sizes)):
        unit = np.zeros(sum(sizes))
        unit[k] = 1.0
        parts = np.split(unit, np.cumsum(sizes)[:-1])
        vector = [
            jnp.asarray(p).reshape(x.shape).astype(x.dtype)
            for p, x in zip(parts, leaves, strict=True)
        ]
        out = operator.mv(jax.tree.unflatten(treedef, vector))
        columns.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(out)]))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_dense_jacobian(name):
    fn, y, args = CASES[name]()
    y = _moved(y)
    operator = nks.linearise(fn, y, args).operator
    pattern = find_pattern(operator)
    dense = _dense(operator)
    assert pattern.n == len(dense)
    assert pattern.colours.shape == (pattern.n,)
    # A colouring: no two columns of a colour share a row.
    seen = np.zeros((pattern.n, pattern.num_colours), int)
    np.add.at(seen, (pattern.rows, pattern.colours[pattern.cols]), 1)
    assert seen.max() == 1
    assert pattern.colours.max() + 1 == pattern.num_colours
    found = np.zeros_like(dense)
    found[pattern.rows, pattern.cols] = pattern.values(operator)
    np.testing.assert_array_equal(found, dense)


def test_pattern_is_that_of_every_point():
    """At y = 0 the derivative of y² is zero by accident."""
    lin = nks.linearise(lambda y, _: y**2 + jnp.roll(y, 1) ** 3, jnp.zeros(5))
    assert not lin.operator.mv(jnp.ones(5)).any()
    assert find_pattern(lin.operator).nnz == 10


def test_same_object_wherever_it_is_traced(monkeypatch):
    detections = []
    detect = sparsity._detect
    monkeypatch.setattr(sparsity, "_detect", lambda *a: detections.append(a) or detect(*a))
    problem = registry.get("bratu", n=6)
    patterns = []

    def step(y):
        lin = nks.linearise(problem.fn, y, problem.args)
        patterns.append(find_pattern(lin.operator))
        return y - 0.1 * lin.value

    step(problem.y0)
    jax.jit(lambda y: jax.lax.fori_loop(0, 2, lambda _, y: step(y), y))(problem.y0)
    jax.jit(jax.vmap(lambda y: jax.lax.while_loop(lambda y: y[0, 0] > 9, step, y)))(
        problem.y0[None]
    )
    assert len(patterns) >= 3
    assert all(pattern is patterns[0] for pattern in patterns)
    assert len(detections) <= 1


def test_attributes_of_known_patterns():
    n = 12
    tridiagonal = find_pattern(nks.linearise(*_at("bratu-1d", n=n)).operator)
    assert (tridiagonal.nnz, tridiagonal.bandwidth, tridiagonal.num_colours) == (
        3 * n - 2,
        (1, 1),
        3,
    )
    assert tridiagonal.density == (3 * n - 2) / n**2
    banded = find_pattern(nks.linearise(*_at("broyden-banded", n=n)).operator)
    assert (banded.bandwidth, banded.num_colours) == ((5, 1), 7)
    grid = find_pattern(nks.linearise(*_at("bratu", n=6)).operator)
    assert (grid.nnz, grid.bandwidth) == (5 * 36 - 4 * 6, (6, 6))
    assert 5 <= grid.num_colours <= 8  # five entries in a row, far fewer than the band's 13


def _at(name, **sizes):
    problem = registry.get(name, **sizes)
    return problem.fn, problem.y0, problem.args


def test_transposed_operator_has_the_transposed_pattern():
    operator = nks.linearise(*_at("broyden-banded", n=9)).operator
    pattern, transposed = find_pattern(operator), find_pattern(operator.transpose())
    assert transposed == pattern.transpose() != pattern
    found = np.zeros((9, 9))
    found[transposed.rows, transposed.cols] = transposed.values(operator.transpose())
    np.testing.assert_array_equal(found, _dense(operator).T)


def test_given_patterns():
    pattern = Pattern.from_coo([2, 0, 2, 1], [1, 0, 1, 2], 3)
    np.testing.assert_array_equal(pattern.rows, [0, 1, 2])
    np.testing.assert_array_equal(pattern.cols, [0, 2, 1])
    same = Pattern.from_scipy(sp.csr_matrix(([1.0, 2.0, 3.0], ([0, 1, 2], [0, 2, 1])), (3, 3)))
    assert pattern == same
    assert hash(pattern) == hash(same)
    assert pattern != Pattern.from_coo([0, 1, 2], [0, 2, 1], 4)
    assert pattern != Pattern.from_coo([0, 1], [0, 2], 3)
    assert pattern != "pattern"
    assert "nnz=3" in repr(pattern)
    with pytest.raises(AttributeError):
        pattern.n = 4
    with pytest.raises(ValueError, match="read-only"):
        pattern.rows[0] = 1
    assert (Pattern([], [], 0).num_colours, Pattern([], [], 0).nnz) == (0, 0)
    empty = Pattern([], [], 2)
    assert empty.values(nks.linearise(lambda y, _: 0 * y, jnp.ones(2)).operator).shape == (0,)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Pattern.from_coo([0, 1], [0], 2), "as many row indices"),
        (lambda: Pattern.from_coo([0, 2], [0, 0], 2), "from 0 to 1; got some from 0 to 2"),
        (lambda: Pattern.from_coo([-1], [0], 2), "got some from -1"),
        (lambda: Pattern.from_scipy(sp.csr_matrix((2, 3))), r"shape \(2, 3\)"),
    ],
)
def test_bad_patterns_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def _lineax(fn, *shape):
    return lx.FunctionLinearOperator(fn, jax.ShapeDtypeStruct(shape, jnp.float64))


def test_what_cannot_be_found_is_said():
    with pytest.raises(ValueError, match="square operator; this one is 2 x 3"):
        find_pattern(_lineax(lambda v: v[:2], 3))
    with pytest.raises(ValueError, match=r"could not follow.*from_coo"):
        find_pattern(_lineax(lambda v: jnp.fft.irfft(jnp.fft.rfft(v), 8), 8))
    with pytest.raises(ValueError, match=r"each of the unknowns.*outside of `jit`"):
        find_pattern(_lineax(lambda v: v + jnp.sum(v), 300))
    assert find_pattern(_lineax(lambda v: v + jnp.sum(v), 20)).nnz == 400  # small: as it is
    with pytest.raises(ValueError, match="of 3 unknowns, but the operator is 4 x 4"):
        Pattern.from_coo([0], [0], 3).values(_lineax(lambda v: v, 4))


def test_index_arrays_count_by_their_values_where_these_are_known():
    n = 300
    neighbour = jnp.asarray(np.random.default_rng(0).permutation(n))

    def operator(index):
        return nks.linearise(lambda y, _: y**2 + y[index], jnp.ones(n)).operator

    pattern = find_pattern(operator(neighbour))
    assert pattern.nnz == 2 * n - int(np.sum(np.asarray(neighbour) == np.arange(n)))
    other = find_pattern(operator(neighbour[::-1]))  # the same text, other constants
    assert other != pattern
    with pytest.raises(ValueError, match="give the pattern"):
        jax.jit(lambda index: find_pattern(operator(index)).n)(neighbour)
    values = jax.jit(lambda index: pattern.values(operator(index)))(neighbour)
    found = np.zeros((n, n))
    found[pattern.rows, pattern.cols] = values
    dense = 2.0 * np.eye(n)
    dense[np.arange(n), np.asarray(neighbour)] += 1.0
    np.testing.assert_array_equal(found, dense)


def test_without_asdex(monkeypatch):
    monkeypatch.setitem(sys.modules, "asdex", None)
    sparsity._asdex.cache_clear()
    try:
        band = Pattern.from_scipy(sp.diags([1.0, 1, 1], [-1, 0, 1], (9, 9)))
        assert band.num_colours == 3
        corner = Pattern.from_coo([*range(9), 0], [*range(9), 8], 9)
        for use in (
            lambda: corner.num_colours,
            lambda: find_pattern(_lineax(lambda v: v * jnp.cos(jnp.arange(9.0)), 9)),
        ):
            with pytest.raises(ImportError, match="nksolve\\[sparse\\]"):
                use()
    finally:
        sparsity._asdex.cache_clear()


def test_static_value_for_jit():
    traces = []

    @eqx.filter_jit
    def values(pattern, y):
        traces.append(pattern)
        return pattern.values(nks.linearise(lambda y, _: y**2, y).operator)

    for n in (4, 4):
        out = values(Pattern.from_coo(range(n), range(n), n), jnp.arange(1.0, 1 + n))
        np.testing.assert_array_equal(out, 2 * np.arange(1.0, 1 + n))
    assert len(traces) == 1

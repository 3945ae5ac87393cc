"""`SparseLU` against dense inverses: dtypes, trees, transposes, lanes, singular matrices."""

import functools as ft
import subprocess
import sys

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.linearise.sparsity import Pattern
from nksolve.precondition import sparse_lu
from nksolve.precondition.sparse_lu import SparseLU

N = 29
_rng = np.random.default_rng(11)
# Two bands and a far-off coupling without symmetry; row 3 has no diagonal entry.
_MASK = np.eye(N, dtype=bool) | np.eye(N, k=1, dtype=bool) | np.eye(N, k=-3, dtype=bool)
_MASK[0, N - 1] = True
_MASK[3, 3] = False
_REAL = np.where(_MASK, _rng.standard_normal((N, N)) + 3 * np.eye(N), 0.0)
_IMAG = np.where(_MASK, _rng.standard_normal((N, N)), 0.0)
_OTHER = np.where(_MASK, 0.3 * _rng.standard_normal((N, N)), 0.0)
PATTERN = Pattern.from_coo(*np.nonzero(_MASK), N)
B = _rng.standard_normal(N)
W = _rng.standard_normal(N)


def _split(v):
    return {"a": v[:8].reshape(2, 4), "b": v[8:]}


def _join(v):
    return jnp.concatenate([v["a"].ravel(), v["b"]])


def _operator(dtype, tree=False):
    """Operators of a matrix; `real-linear` is z → A z + C conj(z)."""
    if dtype == "real-linear":
        a, c = jnp.asarray(_REAL + 1j * _IMAG), jnp.asarray(_OTHER, complex)
        fn = lambda z: a @ z + c @ jnp.conj(z)
        like = jax.ShapeDtypeStruct((N,), jnp.complex128)
    else:
        a = _REAL + 1j * _IMAG if np.issubdtype(dtype, np.complexfloating) else _REAL
        a = jnp.asarray(a, dtype)
        fn = lambda v: a @ v
        like = jax.ShapeDtypeStruct((N,), dtype)
    if tree:
        return lx.FunctionLinearOperator(
            lambda v: _split(fn(_join(v))), jax.eval_shape(_split, like)
        )
    return lx.FunctionLinearOperator(fn, like)


def _real_matrix(operator):
    """An operator on (Re, Im), or on Re alone, by unit vectors."""
    like = operator.in_structure()
    units = np.eye(N).astype(like.dtype)
    parts = [units, 1j * units] if np.iscomplexobj(units) else [units]
    apply = jax.jit(jax.vmap(operator.mv))
    columns = [np.asarray(apply(jnp.asarray(part))).T for part in parts]
    columns = np.concatenate(columns, axis=1)
    rows = [columns.real, columns.imag] if np.iscomplexobj(columns) else [columns]
    return np.concatenate(rows, axis=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (np.float64, 1e-12),
        (np.float32, 2e-5),
        (np.complex128, 1e-11),
        (np.complex64, 2e-5),
        ("real-linear", 1e-11),
    ],
    ids=str,
)
def test_inverse_and_transposes_are_those_of_the_dense_matrix(dtype, tolerance):
    operator = _operator(dtype)
    inverse = SparseLU(PATTERN).init(operator, None, None)
    assert inverse.in_structure() == operator.out_structure()
    dense = _real_matrix(operator)
    close = ft.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    close(_real_matrix(inverse) @ dense, np.eye(len(dense)), atol=50 * tolerance)
    # JAX's transpose pairs by Re(w v): that of parts, with the imaginary ones counted negative.
    flip = np.ones(len(dense))
    flip[N:] = -1
    close(_real_matrix(inverse.transpose()), flip[:, None] * _real_matrix(inverse).T * flip)
    transposed = jax.linear_transpose(operator.mv, operator.in_structure())
    w = jnp.asarray(W).astype(operator.in_structure().dtype)
    close(transposed(inverse.transpose().mv(w))[0], w, atol=50 * tolerance)
    conjugated = lx.conj(inverse).mv(w)
    close(conjugated, jnp.conj(inverse.mv(jnp.conj(w))))


@pytest.mark.parametrize("dtype", [np.float64, "real-linear"], ids=str)
def test_pattern_is_found_on_trees(dtype):
    operator = _operator(dtype, tree=True)
    rhs = operator.mv(
        _split(jnp.asarray(B).astype(jtu.tree_leaves(operator.in_structure())[0].dtype))
    )
    solver = SparseLU(PATTERN)
    out = solver.as_operator(solver.init(operator, None, None)).mv(rhs)
    np.testing.assert_allclose(_join(out), B, rtol=1e-10)
    # A matrix in the program is dense to asdex, which cannot know that its zeros stay.
    found = SparseLU().init(operator, None, None).mv(rhs)
    np.testing.assert_allclose(_join(found), B, rtol=1e-10)
    factor = 2 if dtype == "real-linear" else 1
    assert solver.num_probes(operator, None, None) == factor * PATTERN.num_colours
    assert SparseLU().num_probes(operator, None, None) == factor * N


def test_dot_test():
    inverse = SparseLU(PATTERN).init(_operator(np.float64), None, None)
    v, w = jnp.asarray(B), jnp.asarray(W)
    left, right = inverse.mv(v) @ w, v @ inverse.transpose().mv(w)
    np.testing.assert_allclose(left, right, rtol=1e-12)


@ft.cache
def _solve_full(n):
    """Of a batch of n × n matrices, all of whose entries are in the pattern."""
    rows, cols = np.indices((n, n)).reshape(2, -1)
    pattern = Pattern(rows, cols, n)

    def solve(matrix, rhs):
        operator = lx.FunctionLinearOperator(
            lambda v: matrix @ v, jax.ShapeDtypeStruct((n,), matrix.dtype)
        )
        inverse = SparseLU(pattern).init(operator, None, None)
        return inverse.mv(rhs), inverse.transpose().mv(rhs)

    return jax.jit(jax.vmap(solve))


def test_singular_matrices_neither_raise_nor_look_solved():
    """KLU raises for each of these; beside them a lane that is solved must not suffer."""
    rng = np.random.default_rng(5)
    n = 5
    matrices = [np.zeros((n, n)), np.ones((n, n)), np.diag([1.0, 1, 0, 1, 1])]
    matrices.append(np.diag(np.ones(n - 1), 1))
    laplacian = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    laplacian[0, 0] = laplacian[-1, -1] = 1.0
    matrices.append(laplacian)
    for _ in range(200):
        rank = rng.integers(1, n)
        left, right = rng.integers(-3, 4, (n, rank)), rng.integers(-3, 4, (rank, n))
        matrices.append(left @ right)
    regular = rng.standard_normal((n, n)) + 3 * np.eye(n)
    rhs = rng.standard_normal(n)
    batch = jnp.asarray(np.stack([*matrices, regular]).astype(float))
    both = _solve_full(n)(batch, jnp.broadcast_to(rhs, (len(batch), n)))
    for x, a in zip(both, (regular, regular.T), strict=True):
        np.testing.assert_allclose(x[-1], np.linalg.solve(a, rhs), rtol=1e-12)
        exact = np.isnan(x[:-1]).all(axis=1)
        assert exact[:5].all()
        assert exact.mean() > 0.2  # pivots that vanish exactly; the others are rounding
        left = batch[:-1] if a is regular else jnp.swapaxes(batch[:-1], 1, 2)
        residual = np.linalg.norm(np.einsum("kij,kj->ki", left, x[:-1]) - rhs, axis=1)
        assert not (residual < 1e-3 * np.linalg.norm(rhs)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_entries_that_are_not_finite_give_nan(bad):
    rng = np.random.default_rng(6)
    matrices = rng.standard_normal((2, 5, 5)) + 3 * np.eye(5)
    broken = matrices.copy()
    broken[0, 2, 1] = bad
    rhs = jnp.asarray(rng.standard_normal((2, 5)))
    x, _ = _solve_full(5)(jnp.asarray(broken), rhs)
    assert np.isnan(x[0]).all()
    np.testing.assert_allclose(x[1], np.linalg.solve(matrices[1], rhs[1]), rtol=1e-12)


def test_complex_singular_matrices():
    """The entries are shaken by a few units of round-off: an exact zero pivot is no rule then."""
    a = np.array([[1.0, 2j, 0], [2.0, 4j, 0], [0, 0, 1]])
    rows, cols = np.indices((3, 3)).reshape(2, -1)
    operator = lx.FunctionLinearOperator(
        lambda v: jnp.asarray(a) @ v, jax.ShapeDtypeStruct((3,), jnp.complex128)
    )
    x = SparseLU(Pattern(rows, cols, 3)).init(operator, None, None).mv(jnp.ones(3, complex))
    assert not np.linalg.norm(a @ x - 1) < 1e-3


def test_state_is_arrays_that_replay():
    """An old state solves as it did, whatever was factored since; nothing else is remembered."""

    @jax.jit
    def run(scales, b):
        def operator(scale):
            a = jnp.asarray(_REAL) * scale
            return lx.FunctionLinearOperator(
                lambda v: a @ v, jax.ShapeDtypeStruct((N,), jnp.float64)
            )

        solver = SparseLU(PATTERN)
        first = solver.init(operator(scales[0]), None, None)
        before = first.mv(b)
        second = solver.update(first, operator(scales[1]), None, None)
        return first, before, second.mv(b), first.mv(b)

    first, before, between, after = run(jnp.asarray([1.0, 2.0]), jnp.asarray(B))
    np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(between, before / 2, rtol=1e-12)
    leaves = jtu.tree_leaves(first)
    assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [((PATTERN.nnz,), np.float64)]


def test_as_preconditioner_of_gmres_in_newton():
    """One iteration a step, the probes counted, the transposed factorisation in the adjoint."""
    scale = jnp.asarray(np.linspace(1.0, 3.0, 40))

    def fn(y, c):
        return 4 * y + scale * y**3 - jnp.roll(y, 1) - 0.3 * jnp.roll(y, -2) - c

    solver = nks.NewtonKrylov(
        rtol=1e-12,
        atol=1e-12,
        linear_solver=nks.GMRES(preconditioner=SparseLU()),
        forcing=nks.ConstantForcing(1e-10),
    )

    @jax.jit
    def solve(c):
        solution = nks.root_find(fn, solver, jnp.zeros(40), c)
        return solution.value.sum(), (solution.value, solution.stats)

    (_, (y, stats)), gradient = jax.value_and_grad(solve, has_aux=True)(jnp.ones(40))
    assert np.linalg.norm(fn(y, jnp.ones(40))) < 1e-11
    steps = int(stats["num_steps"])
    assert steps <= 6
    assert int(stats["num_matvecs"]) == steps
    assert int(stats["num_probes"]) == 4 * int(stats["num_preconditioner_updates"]) == 4 * steps
    jacobian = np.asarray(jax.jacfwd(fn)(y, jnp.ones(40)))
    np.testing.assert_allclose(gradient, np.linalg.solve(jacobian.T, np.ones(40)), rtol=1e-9)


def test_empty_unknown():
    operator = nks.linearise(lambda y, _: y, jnp.zeros(0)).operator
    assert SparseLU().init(operator, None, None).mv(jnp.zeros(0)).shape == (0,)


class TestErrors:
    def _init(self, solver=None, operator=None):
        solver = SparseLU(PATTERN) if solver is None else solver
        return solver.init(_operator(np.float64) if operator is None else operator, None, None)

    def test_device(self, monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        with pytest.raises(RuntimeError, match=r"backend is gpu.*JAX_PLATFORMS=cpu"):
            self._init()

    def test_float64_switched_off(self):
        with jax.enable_x64(False):
            operator = lx.FunctionLinearOperator(
                lambda v: 2 * v, jax.ShapeDtypeStruct((N,), jnp.float32)
            )
            with pytest.raises(RuntimeError, match="jax_enable_x64"):
                self._init(operator=operator)

    def test_klujax_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "klujax", None)
        sparse_lu._klujax.cache_clear()
        try:
            with pytest.raises(ImportError, match="nksolve\\[sparse\\]"):
                self._init()
        finally:
            sparse_lu._klujax.cache_clear()

    def test_pattern(self):
        with pytest.raises(TypeError, match="Pattern"):
            SparseLU(np.eye(3))  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="of 3 unknowns, but the operator is 29 x 29"):
            self._init(SparseLU(Pattern([0], [0], 3)))

    def test_mixed_unknown(self):
        y = {"a": jnp.ones(2), "b": jnp.ones(2, complex)}
        operator = nks.linearise(lambda y, _: y, y).operator
        with pytest.raises(ValueError, match="all real or all complex"):
            self._init(SparseLU(), operator)


@pytest.mark.slow
def test_klujax_changes_no_setting():
    """Importing klujax alone would choose float64 and the CPU."""
    code = """
import os
for name in ("JAX_ENABLE_X64", "JAX_PLATFORMS"):
    os.environ.pop(name, None)
import jax, sys
from nksolve.precondition.sparse_lu import _klujax
names = ("jax_enable_x64", "jax_platform_name")
before = [jax.config.values[name] for name in names]
_klujax()
assert "klujax" in sys.modules
assert [jax.config.values[name] for name in names] == before != [True, "cpu"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)

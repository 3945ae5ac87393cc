"""Broyden's methods: the updates against dense ones, SciPy's problems, and what a solver owes."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from scipy.optimize import _nonlin as scipy_nonlin

import nksolve as nks
from nksolve import tree
from nksolve.accelerate.broyden import BadBroyden, Broyden
from nksolve.accelerate.low_rank import (
    DropOldest,
    LowRankInverse,
    RankReduction,
    Restart,
    reduce_rank,
)
from nksolve.verbs.fixed_point import fixed_point
from tests.helpers import Counter

BOTH = pytest.mark.parametrize("method", [Broyden, BadBroyden], ids=lambda c: c.__name__)
COUNTER = Counter()


def name(solution):
    return nks.reason_name(solution.stats["reason"])


# SciPy's test functions, from their definitions.


def cubic(x, xp):
    return -xp.asarray([3, 2, 1.5, 1, 0.5]) * x - 0.01 * xp.vdot(x, x) * x


def identity(x, xp):
    return x


def tridiagonal(x, xp):
    matrix = xp.asarray([[-2.0, 1.0, 0.0], [1.0, -2.0, 1.0], [0.0, 1.0, -2.0]])
    return matrix @ x - xp.asarray([1.0, 2.0, 3.0])


def powell(x, xp):
    return xp.stack([1e4 * x[0] * x[1] - 1, xp.exp(-x[0]) + xp.exp(-x[1]) - 1.0001])


def pipes(x, xp):
    pressure = 0.5 * x**2
    return xp.concatenate([pressure[1:] - pressure[0], (xp.sum(x) - 4).reshape(1)])


def scaled_pair(x, xp):
    slope = xp.asarray([[-4.256, 14.7], [0.8394989, 0.59964207]])
    value = xp.stack([(x[0] + 3) * (x[1] ** 5 - 7) + 18, xp.sin(x[1] * xp.exp(x[0]) - 1)])
    return -xp.linalg.inv(slope) @ value


SCIPY = {
    cubic: [1.0] * 5,
    identity: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    tridiagonal: [1.0, 2.0, 3.0],
    powell: [-1.0, -2.0],
    pipes: [2.0, 0.0, 2.0, 0.0],
    scaled_pair: [-0.5, 1.4],
}
SCIPY_TOL = np.finfo(float).eps ** (1 / 3)


@functools.cache
def scipys(fn, method):
    peer = {Broyden: scipy_nonlin.broyden1, BadBroyden: scipy_nonlin.broyden2}[method]
    count = 0

    def counted(x):
        nonlocal count
        count += 1
        return fn(x, np)

    with np.errstate(all="ignore"):
        peer(counted, np.asarray(SCIPY[fn]), f_tol=SCIPY_TOL, maxiter=500)
    return count


@BOTH
@pytest.mark.parametrize("fn", SCIPY, ids=lambda f: f.__name__)
def test_no_more_evaluations_than_scipy(fn, method):
    solver = method(0.0, SCIPY_TOL, norm=tree.max_norm)
    solution = nks.root_find(lambda y, _: fn(y, jnp), solver, jnp.asarray(SCIPY[fn]))
    assert np.max(np.abs(fn(np.asarray(solution.value), np))) <= SCIPY_TOL
    assert int(solution.stats["num_fn_evals"]) <= scipys(fn, method)


# The updates.


def dense(inverse, n):
    return np.asarray(jax.vmap(inverse.mv)(jnp.eye(n))).T


@functools.cache
def stepping(method, **keywords):
    """(memory after each step) of a solve of a small non-linear system."""
    matrix = np.random.default_rng(0).standard_normal((6, 6)) * 0.25
    fn = lambda y, _: (jnp.tanh(jnp.asarray(matrix) @ y + 0.3) - y, None)
    solver = method(0.0, 1e-13, growth=float("inf"), **keywords)
    y = jnp.zeros(6)
    structures = tree.structure(y), None, frozenset()
    state = solver.init(fn, y, None, {}, *structures)
    step = eqx.filter_jit(lambda y, s: solver.step(fn, y, None, {}, s, frozenset())[:2])
    memories = []
    for _ in range(9):
        y, state = step(y, state)
        memories.append(state.memory)
    return memories


def update(method, h, s, d):
    w = h.T @ s if method is Broyden else d
    return h + np.outer(s - h @ d, w) / (w @ d)


@BOTH
@pytest.mark.parametrize("forgetting", [Restart(), DropOldest(), RankReduction(keep=2)])
def test_updates_are_the_dense_ones_and_the_secant_equation_holds(method, forgetting):
    memories = stepping(method, rank=4, forgetting=forgetting)
    h = -np.eye(6)
    terms = []
    for k, (before, after) in enumerate(itertools.pairwise(memories)):
        s = np.asarray(after.point - before.point)
        d = np.asarray(after.value - before.value)
        if k >= 4 and isinstance(forgetting, Restart) and k % 4 == 0:
            h = -np.eye(6)
        if k >= 4 and isinstance(forgetting, DropOldest):
            h = h - terms[k - 4]
        if k >= 4 and isinstance(forgetting, RankReduction) and k % 2 == 0:
            u, sigma, vh = np.linalg.svd(h + np.eye(6))
            h = -np.eye(6) + (u[:, :2] * sigma[:2]) @ vh[:2]
        updated = update(method, h, s, d)
        terms.append(updated - h)
        h = updated
        np.testing.assert_allclose(dense(after.inverse, 6), h, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(after.inverse.mv(jnp.asarray(d)), s, rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(after.applied, h @ np.asarray(after.value), atol=1e-8)


def test_finite_termination_on_linear_equations():
    random = np.random.default_rng(3)
    for n in (3, 6):
        matrix = -np.eye(n) + 0.6 * random.standard_normal((n, n)) / np.sqrt(n)
        rhs = random.standard_normal(n)
        fn = lambda y, a: a[0] @ y - a[1]
        solver = Broyden(1e-9, 0.0, growth=float("inf"), rank=2 * n)
        args = (jnp.asarray(matrix), jnp.asarray(rhs))
        solution = nks.root_find(fn, solver, jnp.zeros(n), args)
        assert int(solution.stats["num_steps"]) <= 2 * n + 1
        np.testing.assert_allclose(solution.value, np.linalg.solve(matrix, rhs), rtol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.complex128])
def test_products_of_the_inverse(dtype, key):
    """⟨w, H v⟩ = ⟨Hᵀw, v⟩, real parts for complex vectors, and the transpose is that of JAX."""
    like = {"a": jnp.zeros((2, 3), dtype), "b": jnp.zeros(4, dtype)}
    inverse = LowRankInverse.allocate(like, 3, 0.7)
    keys = iter(jax.random.split(key, 20))
    random = lambda: jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape, x.dtype), like)
    for i in range(3):
        inverse = inverse.learning(jnp.asarray(i), random(), random(), jnp.asarray(i != 1))
    inverse = eqx.tree_at(lambda h: h.written, inverse, jnp.asarray(3))
    v, w = random(), random()
    pairing = lambda a, b: tree.vdot(tree.conj(a), b).real
    tol = 1e-4 if dtype == jnp.float32 else 1e-12
    forth, back = pairing(w, inverse.mv(v)), pairing(inverse.transpose_mv(w), v)
    np.testing.assert_allclose(forth, back, rtol=tol)
    (transposed,) = jax.linear_transpose(inverse.mv, like)(w)
    ours = jax.tree.leaves(inverse.transpose_mv(w))
    for x, y in zip(jax.tree.leaves(transposed), ours, strict=True):
        np.testing.assert_allclose(x, y, rtol=tol, atol=tol)


def test_rank_reduction_is_the_truncated_svd():
    random = np.random.default_rng(5)
    rows = random.standard_normal((2, 6, 30)) * np.logspace(0, -5, 6)[None, :, None]
    rows[1, 3] = rows[1, 2] + 1e-3 * rows[1, 3]  # almost dependent
    inverse = LowRankInverse.allocate(jnp.zeros(30), 6, 1.0)
    inverse = eqx.tree_at(
        lambda h: (h.left.blocks, h.right.blocks, h.live, h.written),
        inverse,
        (
            (jnp.asarray(rows[0]),),
            (jnp.asarray(rows[1]),),
            jnp.asarray([True] * 4 + [False, True]),
            jnp.asarray(6),
        ),
    )
    reduced = dense(reduce_rank(inverse, 3), 30) + np.eye(30)
    u, sigma, vh = np.linalg.svd(dense(inverse, 30) + np.eye(30))
    np.testing.assert_allclose(reduced, (u[:, :3] * sigma[:3]) @ vh[:3], atol=1e-9 * sigma[0])


# Cells: z = tanh(W z + b), W near-symmetric.


@functools.cache
def cell(radius, dtype, n=24, lanes=3):
    random = np.random.default_rng(0)
    gaussian = random.standard_normal((n, n)) / np.sqrt(n)
    matrix = (gaussian + gaussian.T) / 2 + 0.1 * (gaussian - gaussian.T) / 2
    matrix *= radius / np.max(np.abs(np.linalg.eigvals(matrix)))
    shift = np.asarray([0.0, 0.02, 0.3])[:lanes, None] * random.standard_normal((lanes, n))
    return jnp.asarray(matrix, dtype), jnp.asarray(shift, dtype)


def step(z, args):
    matrix, shift = args
    return jnp.tanh(jnp.matmul(z, matrix.T, precision="highest") + shift)


@functools.cache
def solving(method, rtol):
    return eqx.filter_jit(
        lambda z, args: fixed_point(step, method(rtol, 1e-12), z, args, max_steps=150)
    )


@BOTH
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float64, 1e-10), (jnp.float32, 1e-6)])
def test_cells(method, dtype, rtol):
    evaluations = []
    for radius in (0.5, 0.9, 0.99):
        args = cell(radius, dtype)
        z0 = jnp.full((3, 24), 0.1, dtype)
        solution = solving(method, rtol)(z0, args)
        assert name(solution) == "residual_rtol" and solution.value.dtype == dtype
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), args)
        z = np.asarray(solution.value, np.float64)
        start = np.asarray(z0, np.float64)
        residual = lambda z: np.linalg.norm(np.tanh(z @ wide[0].T + wide[1]) - z)
        assert residual(z) <= 1.1 * rtol * residual(start)
        evaluations.append(int(solution.stats["num_fn_evals"]))
    assert evaluations[0] <= 25 and evaluations[2] <= 75


@BOTH
@pytest.mark.parametrize(
    "forgetting",
    [Restart(), pytest.param(RankReduction(), marks=pytest.mark.slow)],
    ids=["restart", "reduce"],
)
def test_lanes_are_as_if_alone(method, forgetting):
    matrix, shift = cell(0.9, jnp.float64)
    solver = method(1e-9, 1e-12, rank=6, forgetting=forgetting)
    solve = lambda b: fixed_point(step, solver, jnp.full(24, 0.1), (matrix, b))
    together = jax.jit(jax.vmap(solve))(shift)
    once = jax.jit(solve)
    alone = [once(b) for b in shift]
    assert len({int(s.stats["num_steps"]) for s in alone}) > 1
    for i, one in enumerate(alone):
        lane = jax.tree.map(lambda x: x[i], together.stats)
        np.testing.assert_allclose(together.value[i], one.value, rtol=1e-9, atol=1e-11)
        for counter in ("num_steps", "num_fn_evals"):
            assert int(lane[counter]) == int(one.stats[counter])
        ours, theirs = (h["inverse"] for h in (lane, one.stats))
        np.testing.assert_array_equal(ours.live, theirs.live)
        v = jnp.sin(jnp.arange(24.0))
        np.testing.assert_allclose(ours.mv(v), theirs.mv(v), rtol=1e-4, atol=1e-5)


@BOTH
def test_gradient_and_counters(method):
    matrix, shift = cell(0.9, jnp.float64)
    counted = lambda z, args: step(COUNTER.tick(z), args)
    solver = method(1e-11, 0.0)
    z0, weights = jnp.zeros((3, 24)), jnp.cos(jnp.arange(72.0)).reshape(3, 24)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(args):
        solution = fixed_point(counted, solver, z0, args)
        return jnp.vdot(weights, solution.value), (solution.value, solution.stats)

    with COUNTER.measure() as count:
        (_, (z, stats)), (grad, _) = loss((matrix, shift))
        stats = {k: int(stats[k]) for k in stats if k.startswith("num_")}
    assert count.primal == stats["num_fn_evals"] + 1  # one to linearise at the root
    assert stats["num_fn_evals"] == 1 + stats["num_steps"] + stats["num_rejected_steps"]
    assert stats["num_matvecs"] == 0
    expected = np.zeros((24, 24))
    for zi, ci in zip(np.asarray(z), np.asarray(weights), strict=True):
        jacobian = (1 - zi**2)[:, None] * np.asarray(matrix)
        multiplier = np.linalg.solve(np.eye(24) - jacobian.T, ci)
        expected += np.outer((1 - zi**2) * multiplier, zi)
    np.testing.assert_allclose(grad, expected, rtol=1e-7, atol=1e-9)


def test_optimistix_takes_it():
    args = cell(0.5, jnp.float64)
    z = optx.fixed_point(step, BadBroyden(1e-9, 1e-12), jnp.zeros((3, 24)), args).value
    np.testing.assert_allclose(step(z, args), z, atol=1e-7)


@BOTH
def test_complex_trees_count_as_real_spaces(method):
    def fn(z, _):  # not holomorphic
        return {"a": 0.5 * jnp.conj(z["a"]) + 0.3j * z["b"] + 1, "b": 0.4 * jnp.sin(z["a"]) + 1j}

    z0 = {"a": jnp.zeros(3, jnp.complex128), "b": jnp.zeros(3, jnp.complex128)}
    solution = fixed_point(fn, method(1e-10, 0.0), z0)
    image = fn(solution.value, None)
    for x, y in zip(jax.tree.leaves(solution.value), jax.tree.leaves(image), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-8)


@BOTH
def test_warm_start(method):
    matrix, shift = cell(0.99, jnp.float64)
    z0 = jnp.zeros((3, 24))
    solver = method(0.0, 1e-7, rank=80)
    first = fixed_point(step, solver, z0, (matrix, shift))
    moved = (matrix * 0.999, shift)
    cold = fixed_point(step, solver, first.value, moved)
    warm = fixed_point(step, solver.starting_from(first.stats["inverse"]), first.value, moved)
    share = {Broyden: 0.85, BadBroyden: 0.6}[method]
    assert int(warm.stats["num_fn_evals"]) < share * int(cold.stats["num_fn_evals"])
    np.testing.assert_allclose(warm.value, cold.value, atol=1e-5)  # 1e-7 / (1 − 0.99)
    other = solver.starting_from(first.stats["inverse"])
    with pytest.raises(ValueError, match="needs 80"):
        fixed_point(step, other, jnp.zeros((2, 24)), (matrix, shift[:2]))


def bad_case(y, case):
    """No root and no slope; no root; the root; out of the domain at the full step; NaN."""
    cases = (
        lambda y: jnp.ones_like(y) + 0 * y,
        lambda y: jnp.exp(-y) + 1,
        lambda y: -y,
        lambda y: -3 * jnp.log(y),
        lambda y: y * jnp.nan,
    )
    return jax.lax.switch(case, cases, y)


@BOTH
def test_bad_cases_end_with_the_right_reason(method):
    solver = method(1e-8, 1e-10)
    starts = (0.0, 1.0, 0.0, 8.0, 1.0)
    out = [
        nks.root_find(bad_case, solver, jnp.full(1, y0), jnp.asarray(case), throw=False)
        for case, y0 in enumerate(starts)
    ]
    assert all(np.all(np.isfinite(s.value)) for s in out)
    assert all(np.all(np.isfinite(dense(s.stats["inverse"], 1))) for s in out)
    assert name(out[0]) == "stagnated"
    assert name(out[1]) not in ("residual_rtol", "residual_atol")
    assert name(out[2]) == "residual_atol" and int(out[2].stats["num_fn_evals"]) == 1
    # The first step leaves the domain of the logarithm: it is halved.
    assert name(out[3]) in ("residual_rtol", "residual_atol")
    np.testing.assert_allclose(out[3].value, 1.0, rtol=1e-7)
    assert int(out[3].stats["num_rejected_steps"]) > 0
    assert name(out[4]) == "nonfinite"


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="`rank`"):
        Broyden(1e-6, 0.0, rank=0)
    with pytest.raises(ValueError, match="`growth`"):
        BadBroyden(1e-6, 0.0, growth=0.5)
    with pytest.raises(ValueError, match="at least 1"):
        RankReduction(keep=0)
    solver = Broyden(1e-6, 0.0, rank=2, forgetting=RankReduction(keep=2))
    with pytest.raises(ValueError, match="leaves no room"):
        fixed_point(lambda y, _: 0.5 * y, solver, jnp.ones(2))

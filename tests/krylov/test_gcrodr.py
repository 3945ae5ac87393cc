"""GCRO-DR: what it recycles is what it says, and it pays."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest
import scipy.linalg as sl
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import nksolve as nks
from nksolve.krylov.basis import Basis
from nksolve.krylov.gcrodr import GCRODR
from nksolve.krylov.recycling import (
    Directions,
    RecycledSpace,
    Space,
    _projected,
    _singular,
    carried_over,
    renewed,
)
from nksolve.problems.bratu import bratu
from nksolve.problems.convection_diffusion import (
    ConvectionArgs,
    convection_diffusion_linear_residual,
)
from tests.helpers import GALLERY, selects_at_least
from tests.helpers.gallery import N
from tests.krylov.reference import contraction

SUCCESSFUL = lx.RESULTS.successful
SMALL = GCRODR(rtol=1e-8, restart=8, recycle=3, max_steps=60)


def _empty(vector, k):
    """A space with nothing in it, so that one program serves the first solve and the others."""
    rows = jtu.tree_map(lambda x: jnp.zeros((k, *x.shape), x.dtype), vector)
    dtype = jnp.result_type(*jtu.tree_leaves(vector))
    return RecycledSpace(rows, rows, jnp.zeros((k, k), dtype), jnp.zeros((k,), bool))


def _flat(rows):
    return np.concatenate(
        [np.asarray(x).reshape(x.shape[0], -1) for x in jtu.tree_leaves(rows)], axis=1
    )


@eqx.filter_jit
def _matrix_solve(matrix, rhs, solver, **options):
    return lx.linear_solve(
        lx.MatrixLinearOperator(matrix), rhs, solver, options=options, throw=False
    )


# What it saves.


@ft.cache
def _convection(n):
    zero = jnp.zeros((n, n))

    @eqx.filter_jit
    def solve(solver, strength, b):
        residual = convection_diffusion_linear_residual
        operator = nks.linearise(residual, zero, ConvectionArgs(strength, zero)).operator
        solution = lx.linear_solve(operator, b, solver, throw=False)
        return solution, jnp.linalg.norm(b - operator.mv(solution.value)) / jnp.linalg.norm(b)

    return solve


def test_a_sequence_of_nearby_problems_takes_a_third_less():
    """Ten operators and right-hand sides that change slowly; GMRES has the same memory."""
    n, restart, k = 32, 15, 5
    solve, rng = _convection(n), np.random.default_rng(0)
    b0, b1 = jnp.asarray(rng.standard_normal((2, n, n)))
    method, space = GCRODR(restart=restart, recycle=k), _empty(b0, k)
    recycling, restarting = [], []
    for i in range(10):
        strength, b = jnp.asarray(5.0 + 0.5 * i), b0 + 0.1 * i * b1
        one, residual = solve(method.starting_from(space), strength, b)
        assert bool(one.result == SUCCESSFUL) and residual <= 1.0001e-6
        recycling.append(int(one.stats["num_matvecs"]))
        space = one.stats["recycled"]
        other, residual = solve(nks.GMRES(restart=restart + 2 * k), strength, b)
        assert bool(other.result == SUCCESSFUL) and residual <= 1.0001e-6
        restarting.append(int(other.stats["num_matvecs"]))
    assert sum(recycling) <= 2 / 3 * sum(restarting), (recycling, restarting)
    assert recycling[-1] < 0.8 * recycling[0]  # the space of the last solve serves the next


def _newton(solver, problem):
    newton = nks.NewtonKrylov(1e-8, 0.0, linear_solver=solver)
    return nks.root_find(problem.fn, newton, problem.y0, problem.args)


def test_newton_steps_take_a_third_less():
    problem = bratu(24, 6.5)
    mine = _newton(GCRODR(restart=15, recycle=5), problem)
    other = _newton(nks.GMRES(restart=25), problem)
    saved = int(mine.stats["num_matvecs"]) / int(other.stats["num_matvecs"])
    assert saved <= 2 / 3
    np.testing.assert_allclose(mine.value, other.value, rtol=1e-6)


# What it is.


def test_the_relation_of_a_cycle_and_its_harmonic_ritz_vectors():
    """A [U V] = [C V] G by hand, and the next space from the dense eigenproblem."""
    n, k, steps = 60, 4, 9
    rng = np.random.default_rng(3)
    matrix = contraction(rng, n, 0.9) + np.diag(np.linspace(0, 5, n))
    a = jnp.asarray(matrix)
    empty = Directions(jnp.asarray(rng.standard_normal((k, n))), jnp.zeros((k, n)), None)
    started = Directions(empty.search, empty.image, Space(jnp.zeros((k, k)), jnp.ones(k, bool)))
    new, matvecs = jax.jit(lambda d: carried_over(lambda v: a @ v, d, jnp.array(True), True))(
        started
    )
    assert int(matvecs) == k
    u, c = np.asarray(new.search), np.asarray(new.image)
    np.testing.assert_allclose(c @ c.T, np.eye(k), atol=1e-14)
    np.testing.assert_allclose(u @ matrix.T, c, atol=1e-13)
    assert sl.subspace_angles(u.T, np.asarray(empty.search).T).max() < 1e-7

    append = jax.jit(nks.CGS2().append)
    start = jnp.asarray(rng.standard_normal(n))
    basis = Basis.allocate(start, k + steps + 3, real=True).with_head(new.image)  # two rows spare
    basis = append(basis, start, jnp.int32(k)).basis
    hessenberg, coupling = np.zeros((steps + 3, steps + 2)), np.zeros((k, steps + 2))
    for j in range(steps):
        out = append(basis, a @ basis.row(jnp.int32(k + j)), jnp.int32(k + j + 1))
        coupling[:, j] = out.coefficients[:k]
        hessenberg[: j + 1, j] = out.coefficients[k : k + j + 1]
        hessenberg[j + 1, j] = out.norm
        basis = out.basis
    rows = np.stack([basis.row(jnp.int32(i)) for i in range(k + steps + 1)])
    small = jnp.asarray(hessenberg), jnp.asarray(coupling), jnp.int32(steps)
    g = np.asarray(_projected(new.space, *small)[0])[: k + steps + 1, : k + steps]
    v = np.concatenate([u, rows[k:-1]])
    np.testing.assert_allclose(matrix @ v.T, rows.T @ g, atol=1e-13)

    search = Basis.allocate(start, k, real=True).with_head(new.search)
    make = jax.jit(ft.partial(renewed, flexible=False))
    left = make(basis, search, new.space, *small, jnp.array(True))
    u, c = np.asarray(left.search), np.asarray(left.image)
    np.testing.assert_allclose(c @ c.T, np.eye(k), atol=1e-13)
    np.testing.assert_allclose(u @ matrix.T, c, atol=1e-12)
    theta, z = sl.eig(g.T @ g, g.T @ rows @ v.T)
    order = np.argsort(np.abs(theta))
    assert abs(theta[order[k - 1]] - theta[order[k]].conj()) > 1e-6  # no pair is cut
    z = z[:, order[:k]]
    ritz = v.T @ np.concatenate([z.real, z.imag], 1)
    ritz = np.linalg.svd(ritz, full_matrices=False)[0][:, :k]
    assert sl.subspace_angles(ritz, u.T).max() < 1e-7
    # Where it is not wanted, nothing moves.
    same = make(basis, search, new.space, *small, jnp.array(False))
    np.testing.assert_array_equal(same.search, new.search)


def test_the_singular_vectors_that_stand_in_without_an_eigensolver():
    rng = np.random.default_rng(2)
    t = rng.standard_normal((9, 8))
    vectors, values = _singular(3, jnp.zeros((8, 8)), jnp.asarray(t))
    np.testing.assert_allclose(np.linalg.norm(t @ vectors, axis=0), values, rtol=1e-12)
    np.testing.assert_allclose(values, np.linalg.svd(t)[1][:3], rtol=1e-12)


def test_without_a_space_it_is_gmres():
    rng = np.random.default_rng(7)
    matrix, rhs = contraction(rng, 80, 0.9), jnp.asarray(rng.standard_normal(80))
    one = _matrix_solve(jnp.asarray(matrix), rhs, GCRODR(rtol=1e-9, restart=70, recycle=3))
    other = _matrix_solve(jnp.asarray(matrix), rhs, nks.GMRES(rtol=1e-9, restart=70))
    assert int(other.stats["num_steps"]) > 30
    for name in ("num_steps", "num_matvecs", "num_restarts"):
        assert int(one.stats[name]) == int(other.stats[name])
    np.testing.assert_allclose(one.value, other.value, rtol=1e-10)
    columns = int(one.stats["arnoldi"].columns)
    np.testing.assert_allclose(
        one.stats["arnoldi"].matrix[:, :columns],
        other.stats["arnoldi"].matrix[:, :columns],
        atol=1e-9,
    )
    # With recycling off, over several cycles.
    one = _matrix_solve(jnp.asarray(matrix), rhs, GCRODR(rtol=1e-9, restart=9, recycle=0))
    other = _matrix_solve(jnp.asarray(matrix), rhs, nks.GMRES(rtol=1e-9, restart=9))
    assert int(other.stats["num_restarts"]) > 2 and one.stats["recycled"] is None
    assert int(one.stats["num_matvecs"]) == int(other.stats["num_matvecs"])
    np.testing.assert_allclose(one.value, other.value, rtol=1e-10)


# Every kind of vector.


@pytest.mark.parametrize(
    "kind",
    [
        "float32",
        "complex128",
        "preconditioned",
        pytest.param("float64", marks=pytest.mark.slow),  # as most of the other tests
        pytest.param("blocks", marks=pytest.mark.slow),
    ],
)
def test_solves_and_leaves_an_orthonormal_image(kind):
    rng = np.random.default_rng(4)
    n = 64
    matrix, rhs = contraction(rng, n, 0.97), rng.standard_normal(n)
    method = GCRODR(rtol=1e-9, restart=12, recycle=4)
    dtype = jnp.float64
    if kind == "float32":
        dtype, method = jnp.float32, GCRODR(rtol=1e-5, restart=12, recycle=4)
    if kind == "complex128":
        dtype = jnp.complex128
        matrix, rhs = matrix + 0.3j * np.diag(np.linspace(-1, 1, n)), rhs * (1 - 2j)
    if kind == "preconditioned":
        scaling = 1 + rng.random(n)
        inverse = nks.UserPreconditioner(lambda *_: lambda v: jnp.asarray(1 / scaling) * v)
        matrix = matrix @ np.diag(scaling)
        method = GCRODR(rtol=1e-9, restart=12, recycle=4, preconditioner=inverse)
    if kind == "blocks":  # U, C and V over several buffers
        matrix = sl.block_diag(matrix, np.eye(8192))[: 8192 + n, : 8192 + n]
        d = jnp.asarray(matrix[:n, :n])
        operator = lx.FunctionLinearOperator(
            lambda v: jnp.concatenate([d @ v[:n], v[n:]]), jax.ShapeDtypeStruct((8192 + n,), dtype)
        )
        rhs = np.concatenate([rhs, rng.standard_normal(8192)])
        solve = eqx.filter_jit(lambda b, s: lx.linear_solve(operator, b, s, throw=False))
    else:
        solve = lambda b, s: _matrix_solve(jnp.asarray(matrix, dtype), b, s)
    b = jnp.asarray(rhs, dtype)
    first = solve(b, method.starting_from(_empty(b, 4)))
    assert bool(first.result == SUCCESSFUL) and int(first.stats["num_restarts"]) >= 1
    again = solve(b, method.starting_from(first.stats["recycled"]))
    assert bool(again.result == SUCCESSFUL)
    assert int(again.stats["num_matvecs"]) < int(first.stats["num_matvecs"])
    for solution in (first, again):
        x = np.asarray(solution.value)
        assert np.linalg.norm(rhs - matrix @ x) <= 1.01 * method.rtol * np.linalg.norm(rhs)
        space = solution.stats["recycled"]
        u, c = np.asarray(space.search), np.asarray(space.image)
        assert bool(space.alive.all())
        eps = 50 * float(jnp.finfo(dtype).eps)
        assert np.abs(c @ c.conj().T - np.eye(4)).max() < eps
        assert np.abs(u @ matrix.T - c).max() < 10 * eps * max(1, np.abs(u).max())


def test_pytree_and_complex_as_real():
    """ℂⁿ as ℝ²ⁿ, for a map that is only real-linear, in a tree of two leaves."""
    rng = np.random.default_rng(9)
    m = contraction(rng, 24, 0.95)
    split = lambda v: {"a": v[:16].reshape(4, 4), "b": v[16:]}
    join = lambda t: jnp.concatenate([t["a"].ravel(), t["b"]])

    def fn(y, args):
        v = join(y)
        return split(jnp.asarray(m, v.dtype) @ v + 0.3 * v.conj() - args)

    b = jnp.asarray(rng.standard_normal(24) + 1j * rng.standard_normal(24))
    newton = nks.NewtonKrylov(1e-10, 0.0, linear_solver=GCRODR(restart=10, recycle=3))
    solution = nks.root_find(fn, newton, split(jnp.zeros_like(b)), b)
    x = np.asarray(join(solution.value))
    assert np.linalg.norm(m @ x + 0.3 * x.conj() - b) <= 1e-9 * np.linalg.norm(b)
    space = solution.stats["recycled"]
    u, c = _flat(space.search), _flat(space.image)
    np.testing.assert_allclose((c.conj() @ c.T).real, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(u @ m.T + 0.3 * u.conj(), c, atol=1e-12)


# Bad input.


def test_what_does_not_fit_is_refused():
    for recycle in (30, 31, -1):
        with pytest.raises(ValueError, match="`recycle` must be at least 0 and less than"):
            GCRODR(restart=30, recycle=recycle)
    b = jnp.ones(20)
    operator = lx.MatrixLinearOperator(jnp.eye(20))
    for space in (_empty(b, 4), _empty(jnp.ones(19), 3)):
        with pytest.raises(ValueError, match="`recycled` does not fit"):
            lx.linear_solve(operator, b, GCRODR(restart=9, recycle=3, recycled=space))


def test_hopeless_cases_end_honestly():
    rng = np.random.default_rng(0)
    k, method = 3, SMALL
    good = GALLERY["nonsymmetric"]
    space = _matrix_solve(
        jnp.asarray(good.matrix), jnp.asarray(good.rhs), method.starting_from(_empty(good.rhs, k))
    ).stats["recycled"]
    nan = good.matrix.copy()
    nan[2, 3] = np.nan
    nan_rhs = good.rhs.copy()
    nan_rhs[1] = np.nan
    cases = {
        "zero rhs": (good.matrix, 0 * good.rhs, True),
        "nan": (nan, good.rhs, False),
        "nan rhs": (good.matrix, nan_rhs, False),
        "zero matrix": (0 * good.matrix, good.rhs, False),
        "inconsistent": (
            GALLERY["singular_inconsistent"].matrix,
            GALLERY["singular_inconsistent"].rhs,
            False,
        ),
        "rank one": (np.outer(good.rhs, rng.standard_normal(N)), good.rhs, True),
        "good": (good.matrix, good.rhs, True),
    }
    for name, (matrix, rhs, solvable) in cases.items():
        for start in (_empty(good.rhs, k), space):
            solution = _matrix_solve(
                jnp.asarray(matrix), jnp.asarray(rhs), method.starting_from(start)
            )
            assert bool(solution.result == SUCCESSFUL) == solvable, name
            x = np.asarray(solution.value)
            assert np.all(np.isfinite(x)), name
            if solvable:
                assert np.linalg.norm(rhs - matrix @ x) <= 1.01e-8 * np.linalg.norm(rhs), name
            if name == "zero rhs":
                assert int(solution.stats["num_matvecs"]) == 0 and not x.any()
            left = solution.stats["recycled"]
            assert all(np.all(np.isfinite(leaf)) for leaf in jtu.tree_leaves(left)), name
    one = lx.linear_solve(lx.MatrixLinearOperator(jnp.eye(1) * 2), jnp.ones(1), GCRODR())
    np.testing.assert_allclose(one.value, 0.5)


def test_directions_that_depend_on_each_other_are_dropped():
    n = 20
    rng = np.random.default_rng(1)
    matrix = contraction(rng, n, 0.5)
    u = rng.standard_normal((4, n))
    u[2], u[3] = u[0] - 2 * u[1], 0.0
    start = Directions(jnp.asarray(u), jnp.zeros((4, n)), Space(jnp.eye(4), jnp.ones(4, bool)))
    a = jnp.asarray(matrix)
    new, _ = carried_over(lambda v: a @ v, start, jnp.array(True), True)
    assert int(new.space.alive.sum()) == 2
    c = np.asarray(new.image)
    np.testing.assert_allclose(c @ c.T, np.diag(new.space.alive.astype(float)), atol=1e-13)
    np.testing.assert_allclose(np.asarray(new.search) @ matrix.T, c, atol=1e-13)


# Transformations.


def test_lanes_are_as_if_alone_and_select_over_no_basis():
    names = ["zero_rhs", "nonsymmetric", "symmetric_indefinite", "hilbert"]
    matrices = [GALLERY[name].matrix for name in names] + [np.eye(N)]
    rhs = [GALLERY[name].rhs for name in names] + [np.ones(N)]
    matrices.append(np.where(np.eye(N) > 0, np.nan, matrices[1]))
    rhs.append(rhs[1])
    space = _empty(jnp.ones(N), 3)

    def alone(matrix, b, space):
        s = _matrix_solve(matrix, b, SMALL.starting_from(space))
        return s.value, s.result == SUCCESSFUL, s.stats

    batched = jax.jit(jax.vmap(alone))
    a, b = jnp.asarray(np.stack(matrices)), jnp.asarray(np.stack(rhs))
    spaces = jtu.tree_map(lambda x: jnp.stack([x] * len(b)), space)
    for _ in range(2):  # the second solve begins with the spaces of the first
        values, good, stats = batched(a, b, spaces)
        steps = set()
        for lane in range(len(b)):
            own = jtu.tree_map(lambda x, i=lane: x[i], spaces)
            value, well, counters = alone(a[lane], b[lane], own)
            assert bool(good[lane]) == bool(well), lane
            for name in ("num_steps", "num_matvecs", "num_restarts"):
                assert int(stats[name][lane]) == int(counters[name]), (lane, name)
            if bool(well):
                np.testing.assert_allclose(values[lane], value, rtol=1e-5, atol=1e-6)
            assert int(stats["arnoldi"].columns[lane]) == int(counters["arnoldi"].columns)
            steps.add(int(counters["num_steps"]))
        assert len(steps) >= 3
        spaces = stats["recycled"]
    lanes, n = 4, 512
    d = jnp.linspace(1.0, 3.0, n)

    def solve(scale, b):
        operator = lx.FunctionLinearOperator(
            lambda v: scale * d * v + jnp.roll(v, 1), jax.eval_shape(lambda: b)
        )
        return lx.linear_solve(operator, b, GCRODR(restart=20, recycle=4), throw=False).value

    text = jax.jit(jax.vmap(solve)).lower(jnp.ones(lanes), jnp.ones((lanes, n))).as_text()
    assert selects_at_least(text, lanes * n)
    assert selects_at_least(text, 20 * n) == []


def test_sharded():
    devices, n = 8, 1024
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} devices")
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("x",)), P("x"))
    d, b = 1 + jnp.linspace(0.0, 9.0, n), jnp.cos(jnp.linspace(0.0, 0.7 * n, n))

    @jax.jit
    def solve(d, b):
        operator = lx.FunctionLinearOperator(
            lambda v: d * v + 2 * jnp.mean(v), jax.eval_shape(lambda: b)
        )
        solution = lx.linear_solve(
            operator, b, GCRODR(rtol=1e-9, restart=9, recycle=3), throw=False
        )
        return solution.value, solution.stats

    x, stats = solve(*jax.device_put((d, b), sharding))
    expected = np.linalg.solve(np.diag(d) + 2 / n * np.ones((n, n)), b)
    np.testing.assert_allclose(np.asarray(x), expected, rtol=1e-7, atol=1e-8)
    assert not x.sharding.is_fully_replicated
    assert not stats["recycled"].search.sharding.is_fully_replicated


def test_jvp_and_vjp():
    rng = np.random.default_rng(6)
    case = GALLERY["nonsymmetric"]
    a, b = jnp.asarray(case.matrix), jnp.asarray(case.rhs)
    da, db, w = jnp.asarray(rng.standard_normal((N, N))), b[::-1], jnp.cos(b)
    method = GCRODR(rtol=1e-11, restart=12, recycle=4)
    space = _matrix_solve(a, b, method.starting_from(_empty(b, 4))).stats["recycled"]

    @jax.jit
    def both(space, da, db, w):
        solve = lambda a, b: (
            lx.linear_solve(lx.MatrixLinearOperator(a), b, method.starting_from(space)).value
        )
        return jax.jvp(solve, (a, b), (da, db))[1], jax.vjp(solve, a, b)[1](w)

    tangent, (bar_a, bar_b) = both(space, da, db, w)
    x, adjoint = np.linalg.solve(a, b), np.linalg.solve(a.T, w)
    np.testing.assert_allclose(tangent, np.linalg.solve(a, db - da @ x), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(bar_b, adjoint, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(bar_a, -np.outer(adjoint, x), rtol=1e-6, atol=1e-8)


def test_the_adjoint_starts_from_the_space_of_the_solve():
    """Fewer applications of Jᵀ than a solve without it takes; the right gradient."""
    problem = bratu(24, 6.0)
    method = GCRODR(restart=15, recycle=5)
    newton = nks.NewtonKrylov(1e-9, 0.0, linear_solver=method)

    def value(args):
        solution = nks.root_find(problem.fn, newton, problem.y0, args)
        return jnp.sum(solution.value**2), solution

    both = jax.jit(jax.value_and_grad(value, has_aux=True))
    (_, solution), gradient = both(problem.args)
    h = 1e-4
    up, down = both(problem.args + h)[0][0], both(problem.args - h)[0][0]
    np.testing.assert_allclose(gradient, (up - down) / (2 * h), rtol=1e-5)

    space = solution.stats["recycled"]
    linear = nks.KrylovAdjoint().resolved(newton, problem.args, frozenset(), throw=True)
    assert linear.recycled is None and linear.continuing({}).recycled is None
    np.testing.assert_array_equal(
        linear.continuing({"recycled": space}).recycled.search, space.search
    )
    transposed = nks.linearise(problem.fn, solution.value, problem.args).operator.transpose()
    solve = eqx.filter_jit(
        lambda s: lx.linear_solve(transposed, solution.value, method.starting_from(s)).stats
    )
    with_space = int(solve(space.transpose())["num_matvecs"])
    without = int(solve(_empty(problem.y0, 5))["num_matvecs"])
    assert with_space < 0.85 * without


def test_a_preconditioner_given_to_the_solve():
    rng = np.random.default_rng(8)
    n = 50
    scaling = 10.0 ** rng.uniform(-2, 2, n)
    matrix = contraction(rng, n, 0.9) @ np.diag(scaling)
    operator = lx.MatrixLinearOperator(jnp.diag(jnp.asarray(1 / scaling)))
    b = jnp.asarray(rng.standard_normal(n))
    solution = _matrix_solve(
        jnp.asarray(matrix), b, GCRODR(rtol=1e-9, restart=9, recycle=3), preconditioner=operator
    )
    assert bool(solution.result == SUCCESSFUL)
    assert np.linalg.norm(b - matrix @ np.asarray(solution.value)) < 1.01e-9 * np.linalg.norm(b)
    assert int(solution.stats["num_preconditioner_applications"]) == int(
        solution.stats["num_steps"]
    )
    u, c = np.asarray(solution.stats["recycled"].search), solution.stats["recycled"].image
    assert np.abs(u @ matrix.T - c).max() < 1e-11

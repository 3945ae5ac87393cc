"""Algebraic multigrid against SciPy products, dense transposes, and published behaviour."""

import functools
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.sparse as sp

import nksolve as nks
from nksolve.linearise.sparsity import Pattern, find_pattern
from nksolve.precondition import coarsening as coarsening_module
from nksolve.precondition.algebraic_multigrid import AlgebraicMultigrid
from nksolve.precondition.coarsening import RugeStuben, SmoothedAggregation
from nksolve.precondition.cycle import FCycle, VCycle, WCycle, dense
from nksolve.precondition.multigrid import PseudoInverse
from nksolve.precondition.smoothers import JacobiSmoother
from nksolve.precondition.sparse_levels import Columns, Segments, layout
from nksolve.problems.bratu import bratu_residual
from nksolve.problems.brusselator import brusselator
from nksolve.problems.stencils import central_difference, neighbour_sum

LAM = jnp.asarray(6.0)
_rng = np.random.default_rng(5)


def convection(u, args):
    """−Δu + 5 u_x − 7 u_y + a u², times h²: J is not symmetric."""
    h = 1 / (u.shape[0] + 1)
    slope = 5 * central_difference(u, 0) - 7 * central_difference(u, 1)
    return 4 * u - neighbour_sum(u) + h / 2 * slope + h**2 * (args * u**2 - 1)


def two_leaves(y, args):
    """Two diffusing species, one of which reacts with the other; a tree."""
    a, b = y["a"], y["b"]
    first = 4 * a - neighbour_sum(a) + 0.05 * a * b
    return {"a": first, "b": 4 * b - neighbour_sum(b) - 0.02 * a**2 + args * 0.01 * b}


Y = {
    "scalar": jnp.asarray(0.3 * _rng.standard_normal((11, 11))),
    "tree": {
        "a": jnp.asarray(0.3 * _rng.standard_normal((8, 8))),
        "b": jnp.asarray(0.3 * _rng.standard_normal((8, 8))),
    },
}
FNS = {"scalar": convection, "tree": two_leaves}
ARGS = jnp.asarray(2.0)


def jacobian(fn, y, args):
    return nks.linearise(fn, y, args).operator


@functools.cache
def made(name, **options):
    return AlgebraicMultigrid.from_jacobian(FNS[name], Y[name], ARGS, **options)


@eqx.filter_jit
def state_of(amg, fn, y, args):
    return amg.init(jacobian(fn, y, args), y, args)


def scipy_matrix(operator):
    pattern = find_pattern(operator)
    values = np.asarray(pattern.values(operator))
    return sp.csr_matrix((values, (pattern.rows, pattern.cols)), shape=(pattern.n,) * 2)


def as_scipy(fixed, num_cols):
    """A `Fixed` as a matrix, by unit vectors."""
    return np.asarray(jax.vmap(fixed.mv)(jnp.eye(num_cols))).T


@pytest.mark.parametrize("coarsening", [SmoothedAggregation(), RugeStuben()], ids=["sa", "rs"])
def test_coarse_matrices_are_galerkin_products_at_another_point(coarsening):
    amg = made("scalar", coarsening=coarsening, coarsest=20)
    assert len(amg.sizes) == 3 if isinstance(coarsening, SmoothedAggregation) else 4
    elsewhere = -2.0 * Y["scalar"] + 1.0
    hierarchy = state_of(amg, convection, elsewhere, ARGS).linear_map.flat.hierarchy
    wanted = scipy_matrix(jacobian(convection, elsewhere, ARGS)).toarray()
    both = lambda a: (dense(a), dense(a.transpose()))
    matrices = eqx.filter_jit(lambda h: [both(level.operator) for level in h.levels])(hierarchy)
    for depth, (level, (got, transposed)) in enumerate(
        zip(hierarchy.levels, matrices, strict=True)
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-13)
        np.testing.assert_allclose(transposed, wanted.T, atol=1e-13)
        diagonal = level.inverse.inverse * np.diag(wanted)  # scaled by one number
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-12)
        n, m = amg.sizes[depth : depth + 2]
        p, r = as_scipy(level.bridge.prolongation, m), as_scipy(level.bridge.restriction, n)
        np.testing.assert_array_equal(as_scipy(level.bridge.transpose().prolongation, m), r.T)
        np.testing.assert_array_equal(as_scipy(level.bridge.transpose().restriction, n), p.T)
        wanted = r @ wanted @ p
    np.testing.assert_allclose(np.linalg.inv(hierarchy.coarsest), wanted, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"cycle": FCycle(1, 2), "coarsest": 15},
        {"cycle": WCycle(), "coarsest": 15, "smoother": JacobiSmoother(0.7, 2)},
        {"coarsening": RugeStuben(), "coarsest": 30, "cycle": VCycle(2, 1)},
    ],
    ids=["F", "W-jacobi", "rs-V21"],
)
def test_the_transpose_is_exact_where_j_is_not_symmetric(options):
    state = state_of(made("scalar", **options), convection, -Y["scalar"], ARGS)
    forward, backward = eqx.filter_jit(lambda s: (dense(s), dense(s.transpose())))(state)
    scale = np.abs(forward).max()
    assert np.abs(forward - forward.T).max() > 1e-2 * scale
    np.testing.assert_allclose(backward, forward.T, atol=1e-13 * scale)
    error = np.eye(121) - forward @ np.asarray(dense(jacobian(convection, -Y["scalar"], ARGS)))
    assert max(abs(np.linalg.eigvals(error))) < 0.4


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_tree_of_one_species_a_leaf(dtype):
    amg = made("tree", coarsest=30)
    assert len(amg.sizes) == 2
    y = jax.tree.map(lambda x: (2 * x).astype(dtype), Y["tree"])
    operator = jacobian(two_leaves, y, ARGS.astype(dtype))
    inverse = amg.as_operator(state_of(amg, two_leaves, y, ARGS.astype(dtype)))
    assert inverse.in_structure() == inverse.out_structure() == operator.in_structure()
    v = jax.tree.map(lambda x: jnp.cos(3 * x), y)
    mv, mtv = eqx.filter_jit(lambda m, v: (m.mv(v), m.transpose().mv(v)))(inverse, v)
    left = sum(float(jnp.vdot(mv[k], y[k])) for k in y)
    mty = inverse.transpose().mv(y)
    right = sum(float(jnp.vdot(v[k], mty[k])) for k in y)
    assert mtv["a"].dtype == dtype
    np.testing.assert_allclose(left, right, rtol=1e-12 if dtype == np.float64 else 1e-4)
    if dtype == np.float64:
        matrix = np.asarray(eqx.filter_jit(dense)(inverse))
        error = np.eye(128) - matrix @ np.asarray(dense(operator))
        assert max(abs(np.linalg.eigvals(error))) < 0.3
        # No interpolation from one species to the other.
        p = as_scipy(amg.levels[0].bridge.prolongation, amg.sizes[1])
        assert not np.any(np.any(p[:64] != 0, axis=0) & np.any(p[64:] != 0, axis=0))


def test_complex_linear():
    """J + 0.3i: levels from the real part, numbers complex."""
    matrix = scipy_matrix(jacobian(convection, Y["scalar"], ARGS)) + 0.3j * sp.eye(121)
    amg = AlgebraicMultigrid.from_matrix(matrix, coarsest=20)
    a = jnp.asarray(matrix.toarray())
    operator = lx.FunctionLinearOperator(lambda v: a @ v, jax.ShapeDtypeStruct((121,), a.dtype))
    inverse = eqx.filter_jit(lambda amg: amg.init(operator, None, None))(amg)
    both = eqx.filter_jit(lambda m: (dense(m), dense(m.transpose())))
    forward, backward = map(np.asarray, both(inverse))
    np.testing.assert_allclose(backward, forward.T, atol=1e-13)
    assert max(abs(np.linalg.eigvals(np.eye(121) - forward @ np.asarray(a)))) < 0.4


def ring_matrix(n):
    eye = np.eye(n)
    return 2 * eye - np.roll(eye, 1, 0) - np.roll(eye, -1, 0)


@eqx.filter_jit
def num_steps(amg, fn, y, args, b, method):
    solver = method(rtol=1e-8, atol=0.0, preconditioner=amg)
    solution = lx.linear_solve(jacobian(fn, y, args), b, solver, throw=False)
    return solution.value, solution.stats["num_steps"]


def steps(fn, y, args, seed=1, at=None, **options):
    """GMRES steps for J(y) x = b with the levels of J(at)."""
    amg = AlgebraicMultigrid.from_jacobian(fn, y if at is None else at, args, **options)
    b = jnp.asarray(np.random.default_rng(seed).standard_normal(y.shape))
    x, count = num_steps(amg, fn, y, args, b, nks.GMRES)
    residual = np.linalg.norm(b - jacobian(fn, y, args).mv(x))
    assert residual <= 1e-7 * np.linalg.norm(b)
    return int(count)


@pytest.mark.parametrize(
    "sizes", [(15, 31), pytest.param((31, 63, 127), marks=pytest.mark.slow)], ids=str
)
def test_steps_do_not_grow_with_the_mesh(sizes):
    """Levels from the start, J at a bump."""
    counts = []
    for n in sizes:
        x = np.linspace(0, 1, n + 2)[1:-1]
        bump = jnp.asarray(16 * np.outer(x * (1 - x), x * (1 - x)))
        counts.append(steps(bratu_residual, bump, LAM, at=jnp.zeros((n, n)), coarsest=60))
    assert max(counts) <= 12 and counts[-1] <= counts[0] + 4, counts


def diffusion(u, k):
    """−∇·(k∇u) with coefficients on the faces."""
    p = jnp.pad(u, 1)
    down = k[0] * (p[1:, 1:-1] - p[:-1, 1:-1])
    right = k[1] * (p[1:-1, 1:] - p[1:-1, :-1])
    return -(down[1:] - down[:-1]) - (right[:, 1:] - right[:, :-1])


def test_anisotropy_is_found():
    """Couplings 1 : 100, which point smoothers on regularly coarsened grids cannot deal with."""
    n = 31
    k = jnp.ones((n + 1, n)), 100 * jnp.ones((n, n + 1))
    assert steps(diffusion, jnp.zeros((n, n)), k) <= 10
    assert steps(diffusion, jnp.zeros((n, n)), k, coarsening=SmoothedAggregation(0.0)) > 20


def test_brusselator_by_components():
    problem = brusselator(16)
    count = steps(problem.fn, problem.y0, problem.args, components=2, coarsest=60)
    assert count <= 14, count


def test_newton_its_gradient_and_lanes():
    """Steps of Newton and the gradient against differences; lanes as if alone."""
    fn = lambda y, lam: bratu_residual(y, lam)
    y0 = jnp.zeros((15, 15))
    amg = AlgebraicMultigrid.from_jacobian(fn, y0, LAM, coarsest=50)
    assert len(amg.sizes) == 2

    @jax.jit
    def solve(amg, lam):
        solver = nks.NewtonKrylov(
            rtol=1e-12,
            atol=1e-12,
            linear_solver=nks.GMRES(preconditioner=amg),
            forcing=nks.ConstantForcing(1e-10),
        )
        solution = nks.root_find(fn, solver, y0, lam, throw=False)
        return jnp.sum(solution.value), solution.stats

    one = jax.jit(jax.value_and_grad(solve, argnums=1, has_aux=True))
    (value, stats), slope = one(amg, LAM)
    eps = 1e-4
    wanted = (solve(amg, LAM + eps)[0] - solve(amg, LAM - eps)[0]) / (2 * eps)
    np.testing.assert_allclose(slope, wanted, rtol=1e-5)
    assert int(stats["num_steps"]) <= 8
    per_solve = float(stats["num_preconditioner_applications"]) / float(stats["num_steps"])
    assert per_solve <= 15
    assert stats["num_probes"] == amg.pattern.num_colours * stats["num_preconditioner_updates"]

    lams = jnp.asarray([1.0, 6.0])
    values, many = jax.jit(jax.vmap(solve, in_axes=(None, 0)))(amg, lams)
    np.testing.assert_allclose(values[1], value, rtol=1e-10)
    np.testing.assert_allclose(values[0], solve(amg, lams[0])[0], rtol=1e-10)
    assert many["num_steps"][1] == stats["num_steps"]
    assert many["num_preconditioner_applications"][1] == stats["num_preconditioner_applications"]


def test_symmetric_where_j_is():
    amg = AlgebraicMultigrid.from_jacobian(bratu_residual, jnp.zeros((11, 11)), LAM, coarsest=20)
    state = state_of(amg, bratu_residual, Y["scalar"], LAM)
    inverse = np.asarray(eqx.filter_jit(dense)(state))
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-13 * np.abs(inverse).max())
    assert np.linalg.eigvalsh(inverse)[0] > 0


def test_no_levels_is_the_inverse():
    matrix = scipy_matrix(jacobian(convection, Y["scalar"], ARGS))
    amg = AlgebraicMultigrid.from_matrix(matrix)
    assert amg.sizes == (121,)
    assert amg.matvecs_per_application(jacobian(convection, Y["scalar"], ARGS)) == 0
    inverse = eqx.filter_jit(dense)(state_of(amg, convection, Y["scalar"], ARGS))
    np.testing.assert_allclose(inverse @ matrix.toarray(), np.eye(121), atol=1e-11)


def test_a_null_space_and_no_unknowns():
    ring = lambda u, args: 2 * u - jnp.roll(u, 1) - jnp.roll(u, -1)
    amg = AlgebraicMultigrid.from_jacobian(
        ring, jnp.zeros(64), coarsest=10, coarse_solver=PseudoInverse()
    )
    matrix = eqx.filter_jit(lambda y: dense(state_of(amg, ring, y, None)))(jnp.zeros(64))
    modes = np.sort(abs(np.linalg.eigvals(np.eye(64) - matrix @ ring_matrix(64))))
    assert modes[-1] == pytest.approx(1) and modes[-2] < 0.5  # the constant is left alone
    empty = AlgebraicMultigrid.from_operator(jacobian(lambda y, args: y, {}, None))
    assert empty.init(jacobian(lambda y, args: y, {}, None), None, None).mv({}) == {}


def test_zeros_on_the_diagonal_and_numbers_that_are_not_finite():
    amg = made("scalar", coarsest=20)
    bad = state_of(amg, convection, Y["scalar"].at[3, 3].set(jnp.nan), ARGS)
    assert np.isnan(bad.mv(Y["scalar"])).any()
    level = amg.levels[0]
    values = np.array(amg.pattern.values(jacobian(convection, Y["scalar"], ARGS)))
    values[np.asarray(level.diagonal)[4]] = 0.0
    inverse, bound = level.scaling(jnp.asarray(values))
    assert inverse[4] == 1 and np.isfinite(bound)


def test_layouts_are_products():
    matrix = sp.random(40, 30, 0.1, random_state=3, format="coo")
    ragged = sp.vstack([matrix, sp.csr_matrix(np.ones((1, 30)))]).tocoo()
    x = jnp.asarray(_rng.standard_normal(30))
    for a, kind in ((matrix, Columns), (ragged, Segments)):
        order = _rng.permutation(a.nnz)
        places = layout(a.row[order], a.col[order], a.shape[0])
        assert type(places) is kind
        got = places.mv(places.arrange(jnp.asarray(a.data[order])), x)
        np.testing.assert_allclose(got, a @ np.asarray(x), rtol=1e-12, atol=1e-14)


def test_levels_and_random_numbers_are_the_same_each_time():
    np.random.seed(4)  # noqa: NPY002
    first = np.random.random()  # noqa: NPY002
    np.random.seed(4)  # noqa: NPY002
    one, two = (
        AlgebraicMultigrid.from_jacobian(convection, Y["scalar"], ARGS, coarsest=20)
        for _ in range(2)
    )
    assert np.random.random() == first  # noqa: NPY002
    assert eqx.tree_equal(one, two)


def test_rigid_motions_by_near_nullspace():
    """Plane elasticity: with its rotation the coarse space is better than without."""
    from pyamg.gallery import linear_elasticity

    matrix, motions = linear_elasticity((14, 14), format="bsr")
    a = matrix.tocsr()
    like = jax.ShapeDtypeStruct((a.shape[0],), jnp.float64)
    dense_a = jnp.asarray(a.toarray())
    operator = lx.FunctionLinearOperator(lambda v: dense_a @ v, like)
    radii = []
    for near in (motions, list(motions.T), np.tile(np.eye(2), (196, 1))):
        amg = AlgebraicMultigrid.from_matrix(a, components=2, near_nullspace=near, coarsest=50)
        inverse = eqx.filter_jit(lambda amg: dense(amg.init(operator, None, None)))(amg)
        radii.append(max(abs(np.linalg.eigvals(np.eye(392) - inverse @ dense_a))))
    assert radii[0] == pytest.approx(radii[1], abs=1e-10)
    assert radii[0] < 0.4 < 0.5 < radii[2] < 1, radii


def test_refusals(monkeypatch):
    matrix = scipy_matrix(jacobian(convection, Y["scalar"], ARGS))
    make = AlgebraicMultigrid.from_matrix
    with pytest.raises(TypeError, match="csr_matrix"):
        make(matrix.toarray())
    with pytest.raises(ValueError, match="square"):
        make(matrix[:5])
    with pytest.raises(ValueError, match="it is dense"):
        make(sp.csr_matrix(np.ones((300, 300))))
    with pytest.raises(ValueError, match="does not divide"):
        make(matrix, components=2)
    with pytest.raises(ValueError, match="`coarsest` must"):
        make(matrix, coarsest=0)
    with pytest.raises(ValueError, match="shape"):
        make(matrix, near_nullspace=np.ones((3, 1)), coarsest=20)
    with pytest.raises(ValueError, match="constants only"):
        make(matrix, near_nullspace=np.ones((121, 1)), coarsening=RugeStuben(), coarsest=20)
    with pytest.raises(ValueError, match="not finite"):
        make(matrix * np.nan, coarsest=20)
    with pytest.raises(ValueError, match="stopped at 4000 unknowns"):
        make(sp.eye(4000, format="csr"), coarsening=SmoothedAggregation(0.5))
    with pytest.raises(ValueError, match="outside"):
        jax.jit(lambda y: AlgebraicMultigrid.from_jacobian(convection, y, ARGS))(Y["scalar"])
    with pytest.raises(ValueError, match="121 unknowns"):
        make(matrix).init(jacobian(convection, jnp.ones((3, 3)), ARGS), None, None)
    with pytest.raises(ValueError, match="is of 1 unknowns"):
        AlgebraicMultigrid.from_operator(
            jacobian(convection, Y["scalar"], ARGS), pattern=Pattern([0], [0], 1)
        )
    coarsening_module.pyamg.cache_clear()
    monkeypatch.setitem(sys.modules, "pyamg", None)
    with pytest.raises(ImportError, match=r"nksolve\[sparse\]"):
        make(matrix)

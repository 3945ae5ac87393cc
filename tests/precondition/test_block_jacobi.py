"""`BlockJacobi` inverts the block diagonal of J; `Jacobi` its diagonal: from few matvecs."""

import functools
import types

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.precondition.block_jacobi import BlockJacobi
from nksolve.precondition.block_tridiagonal import BlockTridiagonal
from nksolve.precondition.jacobi import Jacobi
from nksolve.precondition.probes import ColouredProbes, Hutchinson
from nksolve.precondition.stencil import Box, Star
from nksolve.problems import get

from .structured import apply, assert_inverts, flat, matrix_operator


def grid_matrix(shape, b, near, dtype=np.float64, seed=0):
    """A random matrix on the nodes of a grid, b unknowns a node, whose nodes couple where
    `near(offsets)` holds of the distances along the axes."""
    rng = np.random.default_rng(seed)
    index = np.indices(shape).reshape(len(shape), -1)
    apart = np.abs(index[:, :, None] - index[:, None, :])
    n = index.shape[1] * b
    a = rng.standard_normal((n, n)) + 4 * np.eye(n)
    if np.issubdtype(dtype, np.complexfloating):
        a = a + 1j * rng.standard_normal((n, n))
    return np.where(np.kron(near(apart), np.ones((b, b))), a, 0).astype(dtype)


def star(apart):
    return apart.sum(axis=0) <= 1


def box(apart):
    return apart.max(axis=0) <= 1


def diagonal_blocks(matrix, b):
    return np.where(np.kron(np.eye(len(matrix) // b), np.ones((b, b))), matrix, 0)


def probes_of(preconditioner, matrix, like):
    return preconditioner.num_probes(matrix_operator(matrix, like), None, None)


@pytest.mark.parametrize(
    ("shape", "b", "near", "dtype", "coupling", "colours"),
    [
        ((5, 4), 3, star, np.float64, Star(), 2),
        ((5, 4), 2, box, np.float32, 1, 4),
        ((4, 3), 2, box, np.complex128, (1, 1), 4),
        ((6,), 4, star, np.float64, Box((1,)), 2),
        ((2, 3), 7, star, np.float64, Star(), 2),
    ],
)
def test_inverts_the_last_axis(shape, b, near, dtype, coupling, colours):
    matrix = grid_matrix(shape, b, near, dtype)
    preconditioner = BlockJacobi(coupling=coupling)
    like = jnp.zeros((*shape, b), dtype)
    rtol = 1e-4 if dtype == np.float32 else 1e-11
    assert_inverts(preconditioner, matrix, like, rtol, part=diagonal_blocks(matrix, b))
    assert probes_of(preconditioner, matrix, like) == colours * b


@pytest.mark.parametrize(("length", "stencil"), [(7, Box(1, periodic=True)), (8, Star(2, True))])
def test_periodic_grids(length, stencil):
    """Nodes of one colour are further apart than the half-width around the ring too."""
    colours, count = stencil.colours((length,))
    colours = np.asarray(colours)
    assert colours.max() < count
    for i in range(length):
        for k in range(1, stencil.half_width + 1):
            assert colours[i] != colours[(i + k) % length]
    plane, count = Star(1, periodic=True).colours((5, 4))
    plane = np.asarray(plane)
    assert count == 3 and plane.max() < count
    for axis in (0, 1):
        assert np.all(plane != np.roll(plane, 1, axis))


def test_blocks_across_leaves_and_runs():
    m = 4
    matrix = grid_matrix((m, m), 2, star)
    order = np.arange(2 * m * m).reshape(m, m, 2)
    leaf_order = np.concatenate([order[..., 0].ravel(), order[..., 1].ravel()])
    turn = np.ix_(leaf_order, leaf_order)
    like = {"u": jnp.zeros((m, m)), "v": jnp.zeros((m, m))}
    part = diagonal_blocks(matrix, 2)
    across = BlockJacobi(node_axes=2, coupling=Star())
    assert_inverts(across, matrix[turn], like, 1e-11, part=part[turn])
    line = grid_matrix((8,), 3, star)
    runs = BlockJacobi(3, coupling=1)
    assert_inverts(runs, line, jnp.zeros(24), 1e-11, part=diagonal_blocks(line, 3))


def test_leaves_of_their_own():
    """Blocks by leaf: leaves may couple in any way, and a scalar leaf is a block of one."""
    sizes, rng = (6, 1, 4), np.random.default_rng(5)
    matrix = rng.standard_normal((11, 11)) + 5 * np.eye(11)
    like = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(()), "c": jnp.zeros(4)}
    part, start = np.zeros((11, 11)), 0
    for size in sizes:
        part[start : start + size, start : start + size] = 1
        start += size
    part[:6, :6] = np.kron(np.eye(3), np.ones((2, 2)))
    part = part * matrix
    matrix[:6, :6] = part[:6, :6]  # the nodes of "a" do not couple
    assert_inverts(BlockJacobi(coupling=0), matrix, like, 1e-11, part=part)


def test_given_and_singular_blocks():
    matrix = grid_matrix((3,), 2, star)
    blocks = jnp.asarray(np.stack([matrix[i : i + 2, i : i + 2] for i in (0, 2, 4)]))
    blocks = blocks.at[1].set(jnp.ones((2, 2)))
    v = jnp.arange(6.0).reshape(3, 2)
    given = BlockJacobi(blocks=lambda y, args: args)
    x, _ = apply(given, matrix, v, v, args=blocks)
    np.testing.assert_allclose(x[1], v[1])  # singular: left as it is
    np.testing.assert_allclose(x[2], np.linalg.solve(blocks[2], v[2]), rtol=1e-12)
    assert probes_of(given, matrix, v) == 0


def test_small_blocks_of_any_scale():
    matrix = (grid_matrix((3,), 3, star) * 1e-25).astype(np.float32)
    part = diagonal_blocks(matrix, 3)
    v = jnp.ones((3, 3), jnp.float32)
    x, _ = apply(BlockJacobi(coupling=1), matrix, 1e-25 * v, v)
    exact = np.linalg.solve(part.astype(float) * 1e25, np.ones(9))
    np.testing.assert_allclose(flat(x), exact, rtol=1e-3)


def test_jacobi_by_probes():
    matrix = grid_matrix((5, 4), 1, star)
    part, like = np.diag(np.diag(matrix)), jnp.zeros((5, 4))
    pattern = types.SimpleNamespace(colors=np.arange(20))
    for probes, number in (
        (Star(), 2),
        (1, 4),
        ((1, 1), 4),
        (ColouredProbes(np.indices((5, 4)).sum(axis=0).ravel() % 2), 2),
        (pattern, 20),
    ):
        assert_inverts(Jacobi(probes=probes), matrix, like, 1e-12, part=part)
        assert probes_of(Jacobi(probes=probes), matrix, like) == number


def test_jacobi_by_signs():
    """Hutchinson's estimate: exact for a diagonal J, else within its standard error."""
    rng = np.random.default_rng(4)
    dominant = 0.05 * rng.standard_normal((40, 40)) + np.diag(rng.uniform(1, 2, 40))
    like = {"a": jnp.zeros(10), "b": jnp.zeros((5, 6))}
    exact = np.diag(np.diag(dominant))
    assert_inverts(Jacobi(probes=Hutchinson(1)), exact, like, 1e-12)
    ones = jax.tree.map(jnp.ones_like, like)
    errors = []
    for k in (4, 64):
        estimate = 1 / flat(apply(Jacobi(probes=Hutchinson(k)), dominant, ones, ones)[0])
        deviation = np.sqrt(np.sum((dominant - exact) ** 2, axis=1) / k)
        errors.append(np.sqrt(np.mean(((estimate - np.diag(dominant)) / deviation) ** 2)))
    assert all(0.5 < error < 1.6 for error in errors)
    assert probes_of(Jacobi(probes=Hutchinson(4)), dominant, like) == 4


def test_batched_and_transposed_solves():
    """Lanes that stop at different steps are as alone; the gradient uses M⁻ᵀ."""
    matrix = jnp.asarray(grid_matrix((4, 3), 2, star))
    solver = nks.GMRES(rtol=1e-9, preconditioner=BlockJacobi(coupling=Star()))

    def solve(b, matrix):
        solution = lx.linear_solve(matrix_operator(matrix, b), b, solver)
        return solution.value, solution.stats["num_steps"]

    @jax.jit
    def batch(rhs, matrices):
        x, steps = jax.vmap(solve)(rhs, matrices)
        _, pull = jax.vjp(lambda b: jax.vmap(solve)(b, matrices)[0], rhs)
        return x, steps, pull(rhs)[0]

    rhs = jnp.asarray(np.random.default_rng(2).standard_normal((3, 4, 3, 2)))
    rhs = rhs.at[2].set(0)
    part = jnp.asarray(diagonal_blocks(np.asarray(matrix), 2))
    matrices = jnp.stack([part, matrix, matrix])
    x, steps, cotangent = batch(rhs, matrices)
    assert int(steps[0]) == 1 and int(steps[1]) > 4 and int(steps[2]) == 0
    for k in range(3):
        b = np.ravel(rhs[k])
        np.testing.assert_allclose(np.ravel(x[k]), np.linalg.solve(matrices[k], b), atol=1e-7)
        exact = np.linalg.solve(matrices[k].T, b)
        # The adjoint is solved to the same tolerance.
        np.testing.assert_allclose(np.ravel(cotangent[k]), exact, atol=1e-6)


# KINSOL's food web --------------------------------------------------------------------------------

WEB = get("food-web")


def interactions(y, args):
    """The Jacobian of the reactions at each node, without diffusion: KINSOL's preconditioner."""
    x = jnp.arange(y.shape[0], dtype=y.dtype) / (y.shape[0] - 1.0)

    def rates(y, richness):
        c = y / args.scale
        return args.scale * c * (args.growth * richness + args.interaction @ c)

    return jax.vmap(jax.vmap(jax.jacfwd(rates)))(y, 1.0 + x[:, None] * x[None, :])


def lines(y, args):
    """J in block rows of one grid line each, written down: reactions and diffusion."""
    m = y.shape[0]
    second = np.diag(np.ones(m - 1), 1) + np.diag(np.ones(m - 1), -1)
    second[0, 1] = second[-1, -2] = 2  # reflection
    second = jnp.asarray((m - 1.0) ** 2 * second)
    diffusion = jnp.diag(args.diffusion)
    along = jnp.kron(second - 4 * (m - 1.0) ** 2 * jnp.eye(m), diffusion)
    reactions = jax.vmap(lambda b: jax.scipy.linalg.block_diag(*b))(interactions(y, args))
    across = jnp.kron(jnp.eye(m), diffusion)
    before = jnp.append(jnp.diagonal(second, -1), 0.0)
    before = jnp.concatenate([jnp.zeros(1), before[:-1]])[:, None, None] * across[None]
    after = jnp.append(jnp.diagonal(second, 1), 0.0)[:, None, None] * across[None]
    return before, reactions + along[None], after


@functools.cache
def food_web(preconditioner, forcing):
    solver = nks.NewtonKrylov(
        rtol=0.0,
        atol=1e-7,
        norm=lambda f: jnp.max(jnp.abs(f)),
        forcing=forcing,
        linear_solver=nks.GMRES(restart=60, preconditioner=preconditioner),
    )
    solution = nks.root_find(WEB.fn, solver, WEB.y0, WEB.args)
    assert np.max(np.abs(WEB.fn(solution.value, WEB.args))) <= 1e-7
    c = np.asarray(solution.value) / np.asarray(WEB.args.scale)
    np.testing.assert_allclose(c[0, 0, [0, 3]], WEB.published["bottom_left"], rtol=3e-6)
    np.testing.assert_allclose(c[-1, -1, [0, 3]], WEB.published["top_right"], rtol=3e-6)
    return {k: int(v) for k, v in solution.stats.items() if k.startswith("num_")}


def test_food_web_by_interactions():
    """KINSOL takes 9 Newton steps and 338 products with the same preconditioner."""
    counts = food_web(BlockJacobi(blocks=interactions), nks.EisenstatWalker2())
    assert counts["num_steps"] <= 5 and counts["num_probes"] == 0
    assert counts["num_matvecs"] <= 110


def test_food_web_with_diffusion_from_two_colours():
    """The probed blocks hold diffusion too: fewer matvecs, even with the probes."""
    counts = food_web(BlockJacobi(coupling=Star()), nks.EisenstatWalker2())
    assert counts["num_probes"] == 12 * counts["num_preconditioner_updates"]
    assert counts["num_steps"] <= 5
    assert counts["num_matvecs"] <= 80 and counts["num_matvecs"] + counts["num_probes"] <= 150


def test_food_web_by_lines():
    """J is block tridiagonal in grid lines: one iteration a Newton step, without a probe."""
    counts = food_web(BlockTridiagonal(blocks=lines), nks.EisenstatWalker2())
    assert counts["num_steps"] <= 5 and counts["num_probes"] == 0
    assert counts["num_matvecs"] <= 30


def test_the_sum_over_neighbours_is_the_interaction():
    """Zero-flux diffusion maps constants to zero, so that `coupling=0` leaves the reactions."""
    y = WEB.y0 * jnp.linspace(1, 2, WEB.y0.size).reshape(WEB.y0.shape)

    @jax.jit
    def both(y):
        operator = nks.linearise(WEB.fn, y, WEB.args).operator
        out = []
        for preconditioner in (BlockJacobi(coupling=0), BlockJacobi(blocks=interactions)):
            state = preconditioner.init(operator, y, WEB.args)
            out.append(preconditioner.as_operator(state).mv(jnp.ones_like(y)))
        return out

    lumped, given = both(y)
    np.testing.assert_allclose(lumped, given, rtol=1e-8)


def test_bad_input():
    with pytest.raises(ValueError, match=r"coupling=nks.Star\(\)"):
        BlockJacobi()
    with pytest.raises(ValueError, match="exclude one another"):
        BlockJacobi(2, node_axes=1, coupling=0)
    with pytest.raises(TypeError, match="half-width"):
        BlockJacobi(coupling=0.5)
    with pytest.raises(ValueError, match="must not be negative"):
        Box(-1)
    with pytest.raises(ValueError, match="Hutchinson"):
        Jacobi()
    with pytest.raises(ValueError, match="Hutchinson"):
        Jacobi(lambda y, args: y, probes=Star())
    line = nks.linearise(lambda y, _: y, jnp.zeros(1000)).operator
    for preconditioner, text in (
        (BlockJacobi(7, coupling=1), "do not divide"),
        (BlockJacobi(coupling=1), "one dense matrix"),
        (BlockJacobi(10, coupling=(1, 1)), "names 2 axes"),
        (BlockJacobi(10, blocks=lambda *_: jnp.zeros((100, 2, 2))), r"\(100, 10, 10\)"),
        (BlockJacobi(10, blocks=lambda *_: ()), "returned 0 arrays"),
        (Jacobi(probes=ColouredProbes([0, 1])), "1000 entries"),
    ):
        with pytest.raises(ValueError, match=text):
            preconditioner.init(line, jnp.zeros(1000), None)
    empty = nks.linearise(lambda y, _: y, jnp.zeros((0, 2))).operator
    inverse = BlockJacobi(coupling=1).init(empty, None, None)
    assert inverse.mv(jnp.zeros((0, 2))).shape == (0, 2)

"""Multigrid: linear, transposed exactly, symmetric where it should be, and mesh-independent."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.precondition.cycle import FCycle, VCycle, WCycle, dense
from nksolve.precondition.multigrid import Multigrid, PseudoInverse
from nksolve.precondition.nodes import NodeBlocks, NodeDiagonal, inverted, probed
from nksolve.precondition.smoothers import ChebyshevSmoother, JacobiSmoother
from nksolve.precondition.transfer import (
    CellConstant,
    CellDirichlet,
    CellNeumann,
    CellPeriodic,
    VertexDirichlet,
    VertexNatural,
    VertexNeumann,
    VertexPeriodic,
)
from nksolve.problems.bratu import bratu_residual
from nksolve.problems.stencils import central_difference, neighbour_sum

LAM = jnp.asarray(6.0)
_rng = np.random.default_rng(3)


def physical(u, lam):
    """Bratu's residual, not multiplied by h²."""
    return bratu_residual(u, lam) * (u.shape[0] + 1) ** 2


def convection(u, args):
    """−Δu + 5 u_x − 7 u_y + u², times h²: far from symmetric."""
    h = 1 / (u.shape[0] + 1)
    slope = 5 * central_difference(u, 0) - 7 * central_difference(u, 1)
    return 4 * u - neighbour_sum(u) + h / 2 * slope + h**2 * (u**2 - 1)


def coupled(y, args):
    """Two species in two leaves, one of them with two components: diffusion, convection and a
    reaction between all three at a node that is as large as the diffusion; times h²."""
    h = 1 / (y["a"].shape[0] + 1)
    stack = jnp.concatenate([y["a"][..., None], y["b"]], axis=-1)
    mixing = jnp.asarray([[2.0, 1.0, 0.0], [-1.0, 1.0, 3.0], [0.5, -3.0, 2.0]], stack.dtype)
    around = jnp.stack([neighbour_sum(stack[..., i]) for i in range(3)], axis=-1)
    out = 4 * stack - around + h**2 * 300 * (stack @ mixing.T) + h**2 * stack**3
    return {"a": out[..., 0], "b": out[..., 1:]}


def jacobian(fn, y, args=None):
    return nks.linearise(fn, y, args).operator


def draw(structure, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(s):
        x = rng.standard_normal(s.shape)
        if np.issubdtype(s.dtype, np.complexfloating):
            x = x + 1j * rng.standard_normal(s.shape)
        return jnp.asarray(x.astype(s.dtype))

    return jax.tree.map(leaf, structure)


def cycle_matrix(multigrid, fn, y, args=None):
    """M⁻¹ and M⁻ᵀ as matrices."""

    @jax.jit
    def both(y):
        inverse = multigrid.as_operator(multigrid.init(jacobian(fn, y, args), y, args))
        return dense(inverse), dense(inverse.transpose())

    return jax.tree.map(np.asarray, both(y))


Y2 = {
    "scalar": jnp.asarray(0.3 * _rng.standard_normal((15, 15))),
    "coupled": {
        "a": jnp.asarray(0.3 * _rng.standard_normal((15, 15))),
        "b": jnp.asarray(0.3 * _rng.standard_normal((15, 15, 2))),
    },
}
PLANE = (VertexDirichlet(), VertexDirichlet())
CYCLES = {
    "V": Multigrid(convection, PLANE, coarsest=9),
    "V21-jacobi": Multigrid(
        convection, PLANE, coarsest=9, cycle=VCycle(2, 1), smoother=JacobiSmoother()
    ),
    "V01": Multigrid(convection, PLANE, coarsest=9, cycle=VCycle(0, 1)),
    "W": Multigrid(convection, PLANE, coarsest=9, cycle=WCycle()),
    "F": Multigrid(convection, PLANE, coarsest=9, cycle=FCycle(1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", CYCLES)
def test_the_transpose_is_exact_where_j_is_not_symmetric(name):
    forward, backward = cycle_matrix(CYCLES[name], convection, Y2["scalar"])
    scale = np.abs(forward).max()
    assert np.abs(forward - forward.T).max() > 1e-2 * scale
    np.testing.assert_allclose(backward, forward.T, atol=1e-13 * scale)
    operator = jacobian(convection, Y2["scalar"])
    error = np.eye(225) - forward @ np.asarray(dense(operator))
    assert max(abs(np.linalg.eigvals(error))) < (0.75 if name in ("V01", "V21-jacobi") else 0.5)


@pytest.mark.parametrize("nodes", [NodeBlocks(), NodeDiagonal()], ids=["blocks", "diagonal"])
def test_a_coupled_system_on_a_pytree(nodes):
    multigrid = Multigrid(coupled, PLANE, coarsest=30, smoother=ChebyshevSmoother(nodes=nodes))
    forward, backward = cycle_matrix(multigrid, coupled, Y2["coupled"])
    np.testing.assert_allclose(backward, forward.T, atol=1e-13 * np.abs(forward).max())
    error = np.eye(675) - forward @ np.asarray(dense(jacobian(coupled, Y2["coupled"])))
    assert max(abs(np.linalg.eigvals(error))) < (0.25 if nodes == NodeBlocks() else 0.6)


@pytest.mark.parametrize("cycle", [VCycle(), WCycle()], ids=["V", "W"])
def test_symmetric_where_j_is(cycle):
    """So that conjugate gradients may use it: symmetric and positive definite."""
    multigrid = Multigrid(bratu_residual, VertexDirichlet(), coarsest=9, cycle=cycle)
    forward, _ = cycle_matrix(multigrid, bratu_residual, Y2["scalar"], LAM)
    np.testing.assert_allclose(forward, forward.T, atol=1e-13 * np.abs(forward).max())
    assert np.linalg.eigvalsh(forward).min() > 0


@pytest.mark.parametrize("order", [2, 0])
def test_order_scales_the_restricted_residual(order):
    fn = bratu_residual if order == 2 else physical
    right = Multigrid(fn, VertexDirichlet(), coarsest=9, order=order)
    wrong = Multigrid(fn, VertexDirichlet(), coarsest=9, order=2 - order)
    matrix = np.asarray(dense(jacobian(fn, Y2["scalar"], LAM)))
    rates = []
    for multigrid in (right, wrong):
        forward, _ = cycle_matrix(multigrid, fn, Y2["scalar"], LAM)
        rates.append(max(abs(np.linalg.eigvals(np.eye(225) - forward @ matrix))))
    assert rates[0] < 0.2 and rates[1] > 0.5


def on_cells(edge):
    """Δ on cells in one dimension, the value beyond a face being `edge` times that before it."""

    def fn(u, args):
        beyond = edge * u[:1], edge * u[-1:]
        wide = jnp.concatenate([beyond[0], u, beyond[1]])
        return 2 * u - wide[2:] - wide[:-2] + 1.0 / u.shape[0] ** 2 * u

    return fn


def periodic(u, args):
    return 2 * u - jnp.roll(u, 1) - jnp.roll(u, -1) + 1.0 / u.shape[0] ** 2 * u


def mirrored(u, args):
    wide = jnp.concatenate([u[1:2], u, u[-2:-1]])
    return 2 * u - wide[2:] - wide[:-2] + 1.0 / (u.shape[0] - 1) ** 2 * u


def natural(u, args):
    weights = jnp.ones(u.shape).at[jnp.asarray([0, -1])].set(0.5)
    return weights * mirrored(u, args)


BOUNDARIES = {
    "cell-dirichlet": (CellDirichlet(), on_cells(-1.0), 32, 0.15),
    "cell-neumann": (CellNeumann(), on_cells(1.0), 32, 0.15),
    "cell-periodic": (CellPeriodic(), periodic, 32, 0.15),
    "cell-constant": (CellConstant(), on_cells(-1.0), 32, 0.2),
    "vertex-periodic": (VertexPeriodic(), periodic, 32, 0.15),
    "vertex-neumann": (VertexNeumann(), mirrored, 33, 0.15),
    "vertex-natural": (VertexNatural(), natural, 33, 0.15),
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_every_boundary(name):
    """The rate of −u″ + u in one dimension; the transpose too."""
    transfer, fn, n, rate = BOUNDARIES[name]
    multigrid = Multigrid(fn, transfer, coarsest=5)
    forward, backward = cycle_matrix(multigrid, fn, jnp.zeros(n))
    np.testing.assert_allclose(backward, forward.T, atol=1e-12 * np.abs(forward).max())
    error = np.eye(n) - forward @ np.asarray(dense(jacobian(fn, jnp.zeros(n))))
    assert max(abs(np.linalg.eigvals(error))) < rate


@functools.cache
def solver(n, ndim):
    multigrid = Multigrid(bratu_residual, VertexDirichlet(), coarsest=60)
    krylov = nks.GMRES(restart=20, preconditioner=multigrid)
    return nks.NewtonKrylov(rtol=1e-8, atol=0.0, linear_solver=krylov)


def bratu_matvecs(n, ndim):
    y0 = jnp.zeros((n,) * ndim)
    return int(nks.root_find(bratu_residual, solver(n, ndim), y0, LAM).stats["num_matvecs"])


def test_iterations_do_not_depend_on_the_mesh():
    counts = [bratu_matvecs(n, 2) for n in (31, 127)]
    assert max(counts) <= 12 and abs(counts[0] - counts[1]) <= 2
    assert abs(bratu_matvecs(15, 3) - counts[0]) <= 2


@pytest.mark.slow
def test_iterations_do_not_depend_on_the_mesh_finer():
    counts = [bratu_matvecs(n, 2) for n in (63, 255, 511)] + [bratu_matvecs(31, 3)]
    assert max(counts) - min(counts) <= 2


def test_the_adjoint_takes_as_many_iterations_as_gmres_on_the_matrices():
    n = 31
    y = nks.root_find(bratu_residual, solver(n, 2), jnp.zeros((n, n)), LAM).value
    multigrid = solver(n, 2).linear_solver.preconditioner

    @jax.jit
    def parts(y, b):
        operator = jacobian(bratu_residual, y, LAM)
        state = multigrid.init(operator, y, LAM)
        out = lx.linear_solve(operator.transpose(), b, adjoint_solver(multigrid.as_operator(state)))
        inverse = multigrid.as_operator(state).transpose()
        return dense(operator), dense(inverse), out.value, out.stats["num_steps"]

    matrix, inverse, value, steps = parts(y, jnp.ones((n, n)))
    matrix, inverse = np.asarray(matrix).T, np.asarray(inverse)
    np.testing.assert_allclose(np.ravel(value), np.linalg.solve(matrix, np.ones(n * n)), rtol=1e-6)
    # Residuals of GMRES on A M⁻¹, from an orthonormal basis of its Krylov spaces.
    b, basis, reference = np.ones(n * n), [], 0
    product = matrix @ inverse
    v = b
    while True:
        q = np.linalg.qr(np.array([*basis, v]).T)[0]
        basis = list(q.T)
        image = product @ q
        residual = b - image @ np.linalg.lstsq(image, b, rcond=None)[0]
        reference += 1
        if np.linalg.norm(residual) <= 1e-8 * np.linalg.norm(b):
            break
        v = image[:, -1]
    assert abs(int(steps) - reference) <= 1

    loss = lambda lam: jnp.sum(
        nks.root_find(bratu_residual, solver(n, 2), jnp.zeros((n, n)), lam).value
    )
    gradient = jax.grad(loss)(LAM)
    h = 1 / (n + 1)
    wanted = np.linalg.solve(matrix.T, h**2 * np.exp(np.ravel(y))).sum()
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5)


def adjoint_solver(operator):
    fixed = nks.UserPreconditioner(lambda *_: operator.transpose())
    return nks.GMRES(rtol=1e-8, restart=20, preconditioner=fixed)


def test_levels_and_coarsen():
    """Explicit residuals, and args that hold a field."""

    def fn(u, args):
        return 4 * u - neighbour_sum(u) + args["c"] * u - 1.0 / (u.shape[0] + 1) ** 2

    def coarsen(args):
        return {"c": 4 * args["c"][1:-1:2, 1:-1:2]}

    c = jnp.asarray(_rng.uniform(0, 0.05, (15, 15)))
    one = Multigrid(fn, PLANE, coarsen=coarsen, coarsest=9)
    two = Multigrid(levels=(fn, fn), grid=PLANE, coarsen=coarsen)
    matrices = [cycle_matrix(m, fn, Y2["scalar"], {"c": c})[0] for m in (one, two)]
    np.testing.assert_array_equal(*matrices)
    error = np.eye(225) - matrices[0] @ np.asarray(dense(jacobian(fn, Y2["scalar"], {"c": c})))
    assert max(abs(np.linalg.eigvals(error))) < 0.2


@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
def test_dtypes(dtype):
    """A float32 operator with y and args in float64; a complex one."""
    y = jnp.zeros((15, 15), dtype)
    factor = 1 + 20j if dtype == np.complex128 else 1.0

    def fn(u, lam):  # Bratu, its reaction complex
        wide, h = jnp.pad(u, 1), 1 / (u.shape[0] + 1)
        around = wide[2:, 1:-1] + wide[:-2, 1:-1] + wide[1:-1, 2:] + wide[1:-1, :-2]
        return 4 * u - around - h**2 * factor * lam * jnp.exp(u)

    multigrid = Multigrid(fn, VertexDirichlet(), coarsest=9)

    @jax.jit
    def solve(b):
        lam = LAM.astype(dtype)
        operator = jacobian(fn, y, lam)
        point, args = (y.astype(np.float64), LAM) if dtype == np.float32 else (y, lam)
        inverse = multigrid.as_operator(multigrid.init(operator, point, args))
        dots = [jnp.sum(inverse.mv(b) * b[::-1]), jnp.sum(b * inverse.transpose().mv(b[::-1]))]
        x = inverse.mv(b)
        for _ in range(8):
            x = x + inverse.mv(b - operator.mv(x))
        return x, operator.mv(x), dots

    b = draw(jax.ShapeDtypeStruct((15, 15), dtype))
    x, image, dots = solve(b)
    assert x.dtype == dtype
    tol = 1e-5 if dtype == np.float32 else 1e-6
    np.testing.assert_allclose(image, b, atol=tol * 5)
    np.testing.assert_allclose(dots[0], dots[1], rtol=1e-4 if dtype == np.float32 else 1e-12)


def test_a_null_space():
    """Fluxes prescribed all round: singular J, consistent right-hand side."""
    fn = lambda u, args: 2 * u - jnp.concatenate([u[1:], u[-1:]]) - jnp.concatenate([u[:1], u[:-1]])
    multigrid = Multigrid(fn, CellNeumann(), coarsest=5, coarse_solver=PseudoInverse())
    operator = jacobian(fn, jnp.zeros(64))
    b = _rng.standard_normal(64)
    b = jnp.asarray(b - b.mean())
    out = lx.linear_solve(operator, b, nks.GMRES(rtol=1e-10, preconditioner=multigrid))
    np.testing.assert_allclose(operator.mv(out.value), b, atol=1e-8)
    assert int(out.stats["num_steps"]) <= 12


def test_lanes_of_a_batch_are_as_alone():
    n = 15
    run = lambda lam: nks.root_find(bratu_residual, solver(n, 2), jnp.zeros((n, n)), lam)
    batch = jnp.asarray([0.5, 6.7])
    both = lambda solution: (solution.value, solution.stats["num_matvecs"])
    stats = jax.vmap(lambda lam: both(run(lam)))(batch)
    for i, lam in enumerate(batch):
        alone = run(lam)
        np.testing.assert_allclose(stats[0][i], alone.value, rtol=1e-9)
        assert int(stats[1][i]) == int(alone.stats["num_matvecs"])
    assert int(stats[1][0]) < int(stats[1][1])


def test_probes_are_the_entries():
    operator = jacobian(coupled, Y2["coupled"])
    blocks, others = probed(operator, 2, 1)
    matrix = np.asarray(dense(operator))
    index = np.concatenate([np.arange(225)[:, None], 225 + np.arange(450).reshape(225, 2)], axis=1)
    wanted = matrix[index[:, :, None], index[:, None, :]]
    np.testing.assert_allclose(blocks.reshape(225, 3, 3), wanted, rtol=1e-14)
    for p in range(3):
        rest = np.abs(matrix[index[:, p]]).sum(axis=1) - np.abs(wanted[:, p]).sum(axis=1)
        np.testing.assert_allclose(others[..., p, :].sum(-1).ravel(), rest, atol=1e-12)
    matrices = _rng.standard_normal((7, 4, 4))
    matrices[0, 0, 0] = 0
    np.testing.assert_allclose(inverted(jnp.asarray(matrices)), np.linalg.inv(matrices), rtol=1e-9)


def test_what_is_refused():
    with pytest.raises(ValueError, match="either `fn`"):
        Multigrid(grid=VertexDirichlet())
    with pytest.raises(ValueError, match="needs `grid`"):
        Multigrid(bratu_residual)
    with pytest.raises(ValueError, match="smooths at least once"):
        VCycle(0, 0)
    operator = lambda shape: lx.IdentityLinearOperator(jax.ShapeDtypeStruct(shape, np.float64))
    plane = Multigrid(bratu_residual, VertexDirichlet())
    with pytest.raises(ValueError, match=r"\(64, 64\), has 4096 unknowns"):
        plane.init(operator((64, 64)), None, None)
    with pytest.raises(ValueError, match="cannot be coarsened further"):
        Multigrid(levels=(bratu_residual,) * 4, grid=PLANE).init(operator((7, 7)), None, None)
    with pytest.raises(ValueError, match="leading axes"):
        Multigrid(bratu_residual, PLANE).init(operator((63,)), None, None)
    fixed = Multigrid(lambda u, args: u[:3, :3], PLANE)
    with pytest.raises(ValueError, match="on a coarser grid the residual is"):
        fixed.init(operator((63, 63)), jnp.zeros((63, 63)), None)


def test_one_grid_only_is_a_direct_solve():
    y = Y2["scalar"][:3, :3]
    multigrid = Multigrid(bratu_residual, VertexDirichlet())
    forward, backward = cycle_matrix(multigrid, bratu_residual, y, LAM)
    matrix = np.asarray(dense(jacobian(bratu_residual, y, LAM)))
    np.testing.assert_allclose(forward @ matrix, np.eye(9), atol=1e-13)
    np.testing.assert_allclose(backward, forward.T, atol=1e-15)
    assert multigrid.num_probes(jacobian(bratu_residual, y, LAM), y, LAM) == 9

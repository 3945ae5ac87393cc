"""`compacted_root_find`: every sample as if alone, at the work that the samples need."""

import functools
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from nksolve.accelerate.picard import Picard
from nksolve.adjoint.approximate import OneStep
from nksolve.adjoint.krylov import KrylovAdjoint
from nksolve.newton.compacting import bucket_sizes, unfinished_rows
from nksolve.results import reason_name
from nksolve.verbs.compacted import compacted_root_find
from tests.helpers.cells import inputs, tanh_cell
from tests.helpers.counting import Counter, weighted

SIZE, BATCH, HARD = 32, 21, 13
FRACTIONS = (1, 1 / 8)
SOLVER = nks.NewtonKrylov(1e-12, 1e-13, linear_solver=nks.GMRES())
ADJOINT = KrylovAdjoint(rtol=1e-12)
COUNTER = Counter()


def residual(z, args):
    cell, x = args
    return cell(COUNTER.tick(z), x) - z


def compacted(solver, z0, cell, x, adjoint=ADJOINT, **keywords):
    keywords = {"fractions": FRACTIONS, "throw": False, "adjoint": adjoint, **keywords}
    return compacted_root_find(residual, solver, z0, (cell, x), in_axes=(None, 0), **keywords)


def pulled_back(solve, cell, x, cotangent):
    """(solution, gradients with respect to cell and x)."""

    def loss(parameters):
        solution = solve(*parameters)
        return jnp.sum(solution.value * cotangent), solution

    gradient, solution = eqx.filter_grad(loss, has_aux=True)((cell, x))
    return solution, gradient


@functools.cache
def problem():
    case = tanh_cell("near_symmetric", SIZE, 0.99)
    rhos = np.linspace(0.05, 0.4, BATCH)
    rhos[HARD] = 0.99
    x, roots = inputs(case, list(rhos))
    cotangent = jnp.asarray(np.random.default_rng(0).standard_normal(x.shape))
    return case.cell, x, roots, cotangent


@functools.cache
def newton():
    def run(cell, x, z0, cotangent):
        return pulled_back(lambda c, x: compacted(SOLVER, z0, c, x), cell, x, cotangent)

    return eqx.filter_jit(run)


@functools.cache
def alone():
    def run(cell, x, z0, cotangent):
        def solve(c, x):
            return nks.root_find(residual, SOLVER, z0, (c, x), throw=False, adjoint=ADJOINT)

        return pulled_back(solve, cell, x, cotangent)

    return eqx.filter_jit(run)


def dense(cell, z, cotangent):
    """(dL/dcell, dL/dx) at the roots by dense linear algebra, sample by sample."""
    w, u = np.asarray(cell.weight), np.asarray(cell.injection)
    grads = [np.zeros_like(w), np.zeros_like(u), np.zeros(len(w))]
    x_grads = []
    for zi, ct in zip(np.asarray(z), np.asarray(cotangent), strict=True):
        slope = 1 - zi**2
        lam = -np.linalg.solve((slope[:, None] * w - np.eye(len(w))).T, ct) * slope
        x_grads.append(u.T @ lam)
        grads[0] += np.outer(lam, zi)
        grads[2] += lam
    return grads, np.array(x_grads)


def name_of(reason, i=()):
    return reason_name(int(reason._value[i]))


def check_gradients(gradient, cell, x, z, cotangent, rows):
    """Against the dense adjoint over these rows; the other rows of x have none."""
    d_cell, d_x = gradient
    expected, x_expected = dense(cell, z[rows], cotangent[rows])
    outer = np.einsum("ij,bj,bk->ik", cell.injection, x_expected, x[rows])
    scale = np.abs(expected[0]).max()
    np.testing.assert_allclose(d_cell.weight, expected[0], atol=1e-9 * scale)
    np.testing.assert_allclose(d_cell.injection, outer, atol=1e-9 * scale)
    np.testing.assert_allclose(d_cell.bias, expected[2], atol=1e-9 * scale)
    np.testing.assert_allclose(d_x[rows], x_expected, atol=1e-9 * scale)
    others = np.setdiff1d(np.arange(len(x)), rows)
    assert np.all(np.asarray(d_x)[others] == 0)


def test_each_sample_has_the_root_and_the_gradient_of_the_sample_alone():
    cell, x, roots, cotangent = problem()
    solution, gradient = newton()(cell, x, jnp.zeros_like(x), cotangent)
    stats, stages = solution.stats, solution.stats["stages"]
    np.testing.assert_allclose(solution.value, roots, atol=1e-9)
    assert bool(jnp.all(solution.result == optx.RESULTS.successful))
    check_gradients(gradient, cell, x, roots, cotangent, np.arange(BATCH))
    for i in (0, HARD, BATCH - 1):
        one, (_, dx) = alone()(cell, x[i], jnp.zeros(SIZE), cotangent[i])
        np.testing.assert_allclose(solution.value[i], one.value, atol=1e-9)
        np.testing.assert_allclose(gradient[1][i], dx, atol=1e-9 * float(jnp.abs(dx).max()))
        assert name_of(one.stats["reason"]) == name_of(stats["reason"], i)
    assert stages.size.tolist() == [21, 3]
    assert stages.num_steps[-1] > 0  # the hard ones went on among themselves
    assert len(np.unique(stats["num_steps"])) > 1
    assert stats["residual_norm"].shape == stats["num_matvecs"].shape == (BATCH,)


def test_counters_are_of_what_was_executed():
    cell, x, _, cotangent = problem()
    newton()(cell, x, jnp.zeros_like(x), cotangent)
    with COUNTER.measure() as count:
        solution, _ = newton()(cell, x, jnp.zeros_like(x), cotangent)
    stages = solution.stats["stages"]
    assert weighted(count, "primal") == stages.num_lane_evals.sum() + BATCH  # that of the gradient
    assert weighted(count, "tangent") == stages.num_lane_matvecs.sum()
    assert max(count.lanes("tangent")) == BATCH and min(count.lanes("tangent")) == 3
    assert max(count.lanes("transposed")) >= BATCH and min(count.lanes("transposed")) == 3


@pytest.mark.parametrize("where", ["input", "start", "everywhere"])
def test_nan_harms_no_other_sample(where):
    cell, x, roots, cotangent = problem()
    z0 = jnp.zeros_like(x)
    bad = np.arange(BATCH) if where == "everywhere" else np.array([0, 4])
    rows = np.setdiff1d(np.arange(BATCH), bad)
    if where == "start":
        z0 = z0.at[bad, 3].set(jnp.nan)
    else:
        x = x.at[bad, 1].set(jnp.nan)
    solution, gradient = newton()(cell, x, z0, cotangent)
    for i in range(BATCH):
        name = name_of(solution.stats["reason"], i)
        assert name == "nonfinite" if i in bad else name.startswith("residual")
    np.testing.assert_array_equal(solution.value[bad], z0[bad])
    np.testing.assert_allclose(solution.value[rows], roots[rows], atol=1e-9)
    if where == "everywhere":
        assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient))
    else:
        check_gradients(gradient, cell, x, roots, cotangent, rows)


def test_a_plain_iteration_steps_each_sample_exactly_as_alone():
    cell, x, roots, _ = problem()
    solver = Picard(1e-9, 1e-10)
    run = eqx.filter_jit(
        lambda cell, x: compacted(
            solver, jnp.zeros_like(x), cell, x, max_steps=99, fractions=(1, 1 / 4, 1 / 16)
        )
    )
    with COUNTER.measure() as count:
        solution = run(cell, x)
    lone = eqx.filter_jit(
        lambda cell, x: nks.root_find(
            residual, solver, jnp.zeros_like(x), (cell, x), throw=False, max_steps=99
        )
    )
    total = 0
    for i in range(BATCH):
        one = lone(cell, x[i])
        total += int(one.stats["num_fn_evals"])
        for name in ("num_steps", "num_fn_evals", "reason"):
            mine, other = solution.stats[name], one.stats[name]
            mine, other = getattr(mine, "_value", mine), getattr(other, "_value", other)
            assert mine[i] == other, name
        np.testing.assert_allclose(solution.value[i], one.value, atol=1e-13)
    easy = np.setdiff1d(np.arange(BATCH), [HARD])
    np.testing.assert_allclose(solution.value[easy], roots[easy], atol=1e-8)
    assert name_of(solution.stats["reason"], HARD) == "max_steps"
    assert solution.stats["num_steps"][HARD] == 99
    lane_evals = int(solution.stats["stages"].num_lane_evals.sum())
    assert weighted(count, "primal") == lane_evals
    assert total <= lane_evals <= 1.5 * total


def test_a_direction_that_needs_every_iteration_is_not_rushed():
    """A cyclic shift: GMRES makes no progress at all before its last iteration."""
    size = 6
    shift = jnp.roll(jnp.eye(size), 1, axis=0)

    def fn(y, args):
        s, b = args
        return (1 - s) * y + s * (shift @ y) - b

    s = jnp.zeros(16).at[jnp.array([3, 9])].set(1.0)
    b = jnp.asarray(np.random.default_rng(1).standard_normal((16, size)))
    solution = compacted_root_find(
        fn, nks.NewtonKrylov(1e-10, 1e-12), jnp.zeros((16, size)), (s, b), fractions=(1, 1 / 4)
    )
    expected = jnp.where(s[:, None] > 0, jax.vmap(lambda b: shift.T @ b)(b), b)
    np.testing.assert_allclose(solution.value, expected, atol=1e-9)
    assert solution.stats["num_matvecs"][0] < size <= solution.stats["num_matvecs"][3]


def two_leaves(y, args):
    (a, flag), (b, c) = args
    u, v = y["u"], y["v"]
    moved = {"u": jnp.tanh(a @ u + 0.1 * v) + b - u, "v": 0.3 * jnp.sin(c * jnp.sum(u) + v) - v}
    return moved, {"sum": jnp.sum(u) + c if flag else None}


@pytest.mark.slow
def test_pytrees_forward_mode_and_second_derivatives():
    rng = np.random.default_rng(2)
    a, b = jnp.asarray(0.2 * rng.standard_normal((3, 3))), jnp.asarray(rng.standard_normal((5, 3)))
    c = jnp.linspace(0.0, 2.0, 5)
    y0 = {"u": jnp.zeros((5, 3)), "v": jnp.zeros(5)}

    def solve(a, c):
        solution = compacted_root_find(
            two_leaves, Picard(1e-13, 1e-13, linear_solver=nks.GMRES(restart=4)), y0,
            ((a, True), (b, c)), in_axes=(None, 0), fractions=(1, 1 / 2), has_aux=True,
            adjoint=KrylovAdjoint(rtol=1e-13),
        )  # fmt: skip
        return solution.value, solution.aux

    def loss(parameters):
        value, aux = solve(*parameters)
        return jnp.sum(value["u"] ** 2) + jnp.sum(jnp.cos(value["v"])) + jnp.sum(aux["sum"] ** 2)

    direction = (jnp.ones_like(a), jnp.cos(c))

    @jax.jit
    def everything(a, c):
        """(loss, gradient), and the derivative of both along the direction."""
        return jax.jvp(jax.value_and_grad(loss), ((a, c),), (direction,))

    def along(gradient):
        return float(sum(jnp.vdot(g, d) for g, d in zip(gradient, direction, strict=True)))

    (_, gradient), (forward, second) = everything(a, c)
    np.testing.assert_allclose(forward, along(gradient), rtol=1e-10)
    h = 1e-5
    moved = [everything(a + s * h * direction[0], c + s * h * direction[1])[0] for s in (1, -1)]
    (f_plus, g_plus), (f_minus, g_minus) = moved
    np.testing.assert_allclose(forward, (f_plus - f_minus) / (2 * h), rtol=1e-7)
    for exact, plus, minus in zip(second, g_plus, g_minus, strict=True):
        np.testing.assert_allclose(exact, (plus - minus) / (2 * h), atol=1e-6)


def linear(y, args):
    return args * y - 1.0


def test_one_sample_float32_another_adjoint_and_failure():
    y0 = jnp.zeros((1, 2), jnp.float32)
    args = jnp.full((1, 2), 2.0, jnp.float32)

    @eqx.filter_jit
    def value(args, y0, max_steps, throw=True):
        solver = Picard(1e-5, 1e-6, damping=-0.4)
        solution = compacted_root_find(
            linear, solver, y0, args, max_steps=max_steps, throw=throw, adjoint=OneStep(),
            fractions=(1, 1 / 4),
        )  # fmt: skip
        return solution.value

    root, gradient = eqx.filter_value_and_grad(lambda a: value(a, y0, 50).sum())(args)
    assert root.dtype == jnp.float32
    np.testing.assert_allclose(root, 1.0, atol=1e-5)
    # λ = −ȳ in place of J⁻ᵀȳ, so that dL/dargs is + y: its sign and size are OneStep's own.
    np.testing.assert_allclose(jnp.abs(gradient), 0.5, atol=1e-4)
    with pytest.raises(Exception, match="maximum number of trial steps"):
        jax.block_until_ready(value(args, y0, 2))
    assert np.all(np.isfinite(value(args, y0, 2, throw=False)))


def test_sizes():
    assert bucket_sizes(256, (1, 1 / 4, 1 / 16, 1 / 64)) == (256, 64, 16, 4)
    assert bucket_sizes(10, (1, 1 / 4, 1 / 16, 1 / 64)) == (10, 3, 1)
    assert bucket_sizes(1, (1, 1 / 4)) == (1,)
    for bad in ((), (1 / 2,), (1, 1), (1, 0), (1, 0.5, 0.4, 0.3, 0.2, 0.1)):
        with pytest.raises(ValueError, match="fractions"):
            bucket_sizes(8, bad)
    rows, source = unfinished_rows(jnp.array([True, False, True, False]), 3)
    assert rows.tolist() == [0, 2, 4] and source.tolist() == [0, 2, 1]


def test_what_is_refused():
    y0, args = jnp.zeros((4, 2)), jnp.ones((4, 2))
    solver = Picard(1e-6, 1e-6)
    with pytest.raises(ValueError, match="holds 1"):
        compacted_root_find(linear, solver, y0, args, in_axes=1)
    with pytest.raises(ValueError, match="same length"):
        compacted_root_find(linear, solver, y0, jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="first axis"):
        compacted_root_find(linear, solver, jnp.zeros(()), args)
    with pytest.raises(ValueError, match="not empty"):
        compacted_root_find(linear, solver, y0[:0], args[:0])
    with pytest.raises(ValueError, match="max_steps"):
        compacted_root_find(linear, solver, y0, args, max_steps=-1)
    with pytest.raises(TypeError, match="Vmap"):
        compacted_root_find(linear, optx.Newton(1e-6, 1e-6), y0, args)  # pyright: ignore
    with pytest.raises(TypeError, match="adjoints"):
        compacted_root_find(linear, solver, y0, args, adjoint=optx.ImplicitAdjoint())  # pyright: ignore


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 512])
def test_one_hard_sample_among_256(size):
    """At most 1.5 times the work that the samples need alone, and less time than in lockstep."""
    case = tanh_cell("near_symmetric", size, 0.99)
    rhos = [0.5] * 256
    rhos[100] = 0.99
    x, roots = inputs(case, rhos)
    z0, ct = jnp.zeros_like(x), jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    solver, reports = nks.NewtonKrylov(1e-8, 1e-10, linear_solver=nks.GMRES()), []
    mine = {"adjoint": KrylovAdjoint(rtol=1e-8), "fractions": (1, 1 / 4, 1 / 16, 1 / 64)}

    def lockstep(adjoint):
        def one(cell, x, z0):
            return nks.root_find(residual, solver, z0, (cell, x), throw=False, adjoint=adjoint)

        return lambda c, x: eqx.filter_vmap(one, in_axes=(None, 0, 0))(c, x, z0)

    def pulled(solve):
        return eqx.filter_jit(lambda c, x: pulled_back(solve, c, x, ct))

    told = pulled(lockstep(KrylovAdjoint(rtol=1e-8, report=reports.append)))
    each, each_gradient = jax.block_until_ready(told(case.cell, x))
    jax.effects_barrier()
    forward = sum(int(each.stats[n].sum()) for n in ("num_fn_evals", "num_matvecs"))
    backward = sum(r.num_matvecs - 2 for r in reports)  # two are of the report itself

    run = pulled(lambda c, x: compacted(solver, z0, c, x, **mine))
    run(case.cell, x)
    with COUNTER.measure() as count:
        solution, gradient = run(case.cell, x)
    np.testing.assert_allclose(solution.value, roots, atol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(each_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
    work = sum(weighted(count, role) for role in ("primal", "tangent")) - 256
    print(f"D = {size}: forward {work / forward:.3f}")
    assert work <= 1.5 * forward
    pullback = weighted(count, "transposed")
    print(f"backward {pullback / backward:.3f}")
    assert pullback <= 1.5 * backward

    def clock(run):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(jax.tree.leaves(eqx.filter(run(case.cell, x), eqx.is_array)))
            times.append(time.perf_counter() - start)
        return min(times)

    fast, slow = clock(run), clock(pulled(lockstep(KrylovAdjoint(rtol=1e-8))))
    print(f"time {fast / slow:.3f}")
    assert fast < slow

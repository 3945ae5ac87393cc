"""Deflation: every root of problems whose roots are known, and the step without another solve."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from nksolve.problems.beam import beam
from nksolve.problems.bratu import bratu_1d, bratu_1d_solution
from nksolve.problems.kinsol import ferraris_tronconi
from nksolve.verbs.deflated import Deflated
from nksolve.verbs.deflation import Deflation, deflate
from tests.helpers import Counter
from tests.newton.solving import counters, reason, rows

COUNTER = Counter()
SUCCESS = ("residual_atol", "residual_rtol")


def newton(atol=1e-10, **keywords):
    tight = {
        "linear_solver": nks.GMRES(restart=70),
        "forcing": nks.ConstantForcing(1e-9),
        # A root that is known is a pole of G, and full steps jump over it.
        "globalisation": nks.Backtracking(growth=math.inf),
    }
    return nks.NewtonKrylov(0.0, atol, history_length=64, **(tight | keywords))


def all_roots(fn, solver, start, args, *, room, plain=False, **keywords):
    """Roots found one after another from one start, in a buffer that NaN fills up: one program."""
    buffer = jnp.full((room, *start.shape), jnp.nan, start.dtype)
    solutions = []
    for k in range(room):
        if plain:
            solution = nks.root_find(
                deflate(fn, buffer, **keywords), solver, start, args, throw=False
            )
        else:
            deflated = Deflated(solver, buffer, **keywords)
            solution = nks.root_find(fn, deflated, start, args, throw=False)
        if reason(solution) not in SUCCESS:
            break
        solutions.append(solution)
        buffer = buffer.at[k].set(solution.value)
    return solutions


def cubic(x, roots):
    x = COUNTER.tick(x)
    return (x - roots[0]) * (x - roots[1]) * (x - roots[2])


ROOTS = jnp.array([1.0, 2.0, 4.0])


@pytest.mark.parametrize("plain", [False, True])
def test_three_roots_of_a_cubic(plain):
    with COUNTER.measure() as count:
        found = all_roots(cubic, newton(), jnp.array([0.3]), ROOTS, room=3, plain=plain)
        evals = sum(counters(s)["num_fn_evals"] for s in found)
    np.testing.assert_allclose([float(s.value[0]) for s in found], ROOTS, rtol=1e-9)
    assert count.primal == evals == 7 + 9 + 18
    # One matvec for each direction: with one unknown there is nothing else to find.
    assert all(counters(s)["num_matvecs"] == counters(s)["num_steps"] for s in found)


@eqx.filter_jit
def factor(deflation, y):
    return deflation(y)


def test_factor_and_gradient():
    rng = np.random.default_rng(2)
    y, roots = rng.standard_normal(4), rng.standard_normal((3, 4))
    scale = np.array([1.0, 2.0, 0.5, 3.0])
    deflation = Deflation(jnp.asarray(roots), 3.0, 0.7, jnp.asarray(scale))
    distances = np.linalg.norm((y - roots) / scale, axis=1)
    at = factor(deflation, jnp.asarray(y))
    np.testing.assert_allclose(at.value, np.prod(distances**-3 + 0.7), rtol=1e-13)
    by_jax = jax.jit(jax.grad(lambda y: jnp.log(deflation(y).value)))(jnp.asarray(y))
    np.testing.assert_allclose(at.log_gradient, by_jax, rtol=1e-12)
    # The same roots in a list, in a buffer with gaps, and as trees.
    listed = Deflation([jnp.asarray(r) for r in roots], 3.0, 0.7, jnp.asarray(scale))
    gaps = jnp.asarray(np.stack([np.full(4, np.nan), *roots, np.full(4, np.nan)]))
    padded = Deflation(gaps, 3.0, 0.7, jnp.asarray(scale))
    halves = lambda x: {"a": jnp.asarray(x[..., :2]), "b": jnp.asarray(x[..., 2:])}
    trees = Deflation(halves(roots), 3.0, 0.7, halves(scale))
    for other, point in ((listed, y), (padded, y), (trees, halves(y))):
        value = factor(other, jax.tree.map(jnp.asarray, point))
        np.testing.assert_allclose(value.value, at.value, rtol=1e-13)
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(value.log_gradient)])
        np.testing.assert_allclose(flat, at.log_gradient, rtol=1e-12)
    assert float(Deflation([])(jnp.asarray(y)).value) == 1.0
    # Complex points: the gradient of a real function, by real inner products.
    z, known = jnp.asarray(y[:2] + 1j * y[2:]), [jnp.asarray(roots[0, :2] + 1j * roots[0, 2:])]
    v = jnp.asarray([0.3 - 1.0j, 0.7 + 0.2j])
    log = lambda z: jnp.log(Deflation(known)(z).value)
    slope = np.vdot(factor(Deflation(known), z).log_gradient, v).real
    by_jax = jax.jit(lambda z, v: jax.jvp(log, (z,), (v,))[1])(z, v)
    np.testing.assert_allclose(slope, by_jax, rtol=1e-12)


def test_step_is_that_of_the_deflated_jacobian():
    """Sherman–Morrison: the iterates are those of dense Newton steps of G."""
    problem = ferraris_tronconi("lower")
    known = [jnp.array([0.29944869, 2.83692777])]
    solver = Deflated(newton(globalisation=nks.FullStep()), known, power=2.0, shift=1.0)
    trials = (1, 2, 3)
    start = jnp.array([0.5, 1.0])
    recorded = nks.Recorded(solver, trials)  # pyright: ignore[reportCallIssue]
    solution = nks.root_find(problem.fn, recorded, start, throw=False)
    residual = jax.jit(lambda x: deflate(problem.fn, known)(x, None))
    jacobian = jax.jit(jax.jacfwd(residual))
    y = start
    for iterate in solution.stats["iterates"]:
        y = y - np.linalg.solve(jacobian(y), residual(y))
        np.testing.assert_allclose(iterate, y, rtol=1e-7)


def test_both_branches_of_bratu():
    """Work beyond the first root: that of plain steps. The values are those of the closed form."""
    problem = bratu_1d(63, 2.0)
    scale = float(np.sqrt(63))  # the 2-norm as a mean square
    roots, plain = (
        all_roots(problem.fn, newton(), problem.y0, problem.args, room=2, plain=p, scale=scale)
        for p in (False, True)
    )
    assert [counters(s)["num_steps"] for s in roots] == [3, 8]
    x = np.arange(1, 64) / 64
    for solution, other, upper in zip(roots, plain, (False, True), strict=True):
        exact = bratu_1d_solution(x, 2.0, upper=upper)
        np.testing.assert_allclose(solution.value, exact, rtol=2e-3)
        np.testing.assert_allclose(other.value, solution.value, atol=1e-7)
        assert counters(other)["num_steps"] == counters(solution)["num_steps"]


def test_three_shapes_of_a_beam():
    problem = beam()
    found = all_roots(problem.fn, newton(1e-8), problem.y0, problem.args, room=3, scale=8.0)
    most = [float(s.value[jnp.argmax(jnp.abs(s.value))]) for s in found]
    assert abs(most[0]) < 1e-9
    np.testing.assert_allclose(sorted(most[1:]), [-2.191, 2.191], atol=5e-4)


def test_a_preconditioner_for_the_plain_jacobian_serves():
    """The colours of a tridiagonal J find it in m J, and not in m J + F ∇mᵀ."""
    problem = bratu_1d(63, 2.0)
    lower = nks.root_find(problem.fn, newton(), problem.y0, problem.args).value
    banded = nks.GMRES(preconditioner=nks.BlockTridiagonal())
    solver = newton(linear_solver=banded, forcing=nks.ConstantForcing(1e-6))
    scale = float(np.sqrt(63))
    deflated = Deflated(solver, [lower], scale=scale)
    solution = nks.root_find(problem.fn, deflated, problem.y0, problem.args)
    plain = nks.root_find(
        deflate(problem.fn, [lower], scale=scale), solver, problem.y0, problem.args, throw=False
    )
    assert reason(solution) == "residual_atol"
    assert counters(solution)["num_matvecs"] == counters(solution)["num_steps"]
    assert counters(plain)["num_matvecs"] > 2 * counters(plain)["num_steps"]


def test_at_a_known_root():
    """G is infinite there: a start fails and says so, a step to it is shortened."""
    fn = lambda x, _: x * (x - 1)
    start = jnp.array([0.0])
    for solution in (
        nks.root_find(fn, Deflated(newton(), [start]), start, throw=False),
        nks.root_find(deflate(fn, [start]), newton(), start, throw=False),
    ):
        assert reason(solution) == "nonfinite" and float(solution.value[0]) == 0.0
        assert np.isinf(rows(solution)["norm"][0])
    # Entries of F that vanish there are no 0/0.
    value = deflate(lambda x, _: jnp.stack([x[0], x[1] - 1]), [jnp.zeros(2)])(jnp.zeros(2), None)
    assert bool(jnp.all(value == jnp.inf))


def test_lanes_jit_and_gradient():
    """The derivative of a root does not know how it was found."""
    start = jnp.array([0.3])

    def find(known, roots):
        return nks.root_find(cubic, Deflated(newton(), known), start, roots, throw=False)

    def value_of(known, roots):
        solution = find(known, roots)
        return solution.value, solution.stats

    none = jnp.full((2, 1), jnp.nan)
    first, second = none.at[0].set(1.0), jnp.array([[1.0], [2.0]])
    lanes = jnp.stack([none, first, second])
    values, stats = jax.jit(jax.vmap(value_of, in_axes=(0, None)))(lanes, ROOTS)
    np.testing.assert_allclose(values[:, 0], ROOTS, rtol=1e-9)
    alone = [find(known, ROOTS) for known in lanes]
    for name in ("num_steps", "num_rejected_steps", "num_fn_evals", "num_matvecs"):
        expected = [counters(s)[name] for s in alone]
        np.testing.assert_array_equal(stats[name], expected)
    gradient = jax.jit(jax.grad(lambda roots: value_of(second, roots)[0][0]))(ROOTS)
    np.testing.assert_allclose(gradient, [0.0, 0.0, 1.0], atol=1e-9)


@pytest.mark.slow
def test_known_roots_that_depend_on_the_parameters():
    start = jnp.array([0.3])

    def through(roots):
        known = nks.root_find(cubic, newton(), start, roots).value
        return nks.root_find(deflate(cubic, [known]), newton(), start, roots).value[0]

    np.testing.assert_allclose(jax.grad(through)(ROOTS), [0.0, 1.0, 0.0], atol=1e-9)


@pytest.mark.parametrize(
    "search",
    [nks.Damped(0.8), nks.Parabolic(), nks.NonMonotone(growth=math.inf), nks.CriticalPoint()],
    ids=lambda s: type(s).__name__,
)
def test_every_line_search(search):
    """A circle and a line: from between the two points, past the one that is known."""
    fn = lambda y, _: jnp.stack([y @ y - 4, y[0] - y[1]])
    known, start = jnp.full(2, 2**0.5), jnp.array([1.0, 0.3])
    solver = Deflated(newton(globalisation=search), [known])
    solution = nks.root_find(fn, solver, start)
    np.testing.assert_allclose(solution.value, -known, rtol=1e-9)


def test_other_solvers_float32_and_optimistix():
    problem = beam(15, dtype=jnp.float32)
    flat = jnp.zeros(15, jnp.float32)
    fn = lambda u, lam: (problem.fn(u, lam) * jnp.float32(1 / 256), jnp.max(u))
    solver = nks.NewtonKrylov(0.0, 1e-5, linear_solver=nks.GMRES(restart=15))
    deflated = Deflated(solver, [flat], scale=4.0)
    start = problem.y0
    solution = optx.root_find(fn, deflated, start, problem.args, has_aux=True)
    assert solution.value.dtype == jnp.float32 and float(jnp.abs(solution.aux)) >= 0
    assert float(jnp.max(jnp.abs(solution.value))) > 2
    trust = nks.NewtonKrylov(
        0.0, 1e-5, linear_solver=nks.GMRES(restart=15), globalisation=nks.Dogleg()
    )
    residual = deflate(fn, [flat], scale=4.0, has_aux=True)
    other = nks.root_find(residual, trust, start, problem.args, has_aux=True)
    np.testing.assert_allclose(jnp.abs(other.value), jnp.abs(solution.value), rtol=2e-3)


def test_what_is_refused():
    fn, start = lambda x, _: x, jnp.ones(3)
    with pytest.raises(ValueError, match="`roots` must be a list of points like y"):
        nks.root_find(deflate(fn, jnp.zeros(3)), newton(), start)
    with pytest.raises(ValueError, match="`scale` must be a number"):
        nks.root_find(deflate(fn, [jnp.zeros(3)], scale=jnp.ones(2)), newton(), start)
    with pytest.raises(ValueError, match="`power` must be positive"):
        deflate(fn, [], power=0.0)
    with pytest.raises(ValueError, match="`shift` must not be negative"):
        deflate(fn, [], shift=-1.0)
    with pytest.raises(ValueError, match="needs a line search"):
        Deflated(newton(globalisation=nks.Dogleg()), [start])
    with pytest.raises(TypeError):
        Deflated(nks.Picard(0.0, 1e-3), [start])  # pyright: ignore[reportArgumentType]

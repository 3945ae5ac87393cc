"""The globalisations beyond backtracking, against references in plain NumPy."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.newton.state import Direction
from nksolve.problems import get

from .solving import assert_honest, counters, reason, rows, run

ONE = jnp.ones(())


def model(operator, minus_f, direction, eta=0.0):
    norm = jnp.linalg.norm(minus_f)
    image = operator.mv(direction)
    slope = -jnp.vdot(minus_f, image) / norm**2
    residual = jnp.linalg.norm(image - minus_f) / norm
    found = Direction(direction, slope, residual, jnp.asarray(eta))
    return nks.Model(operator, minus_f, norm, found, None, 0, jnp.array(True))


# --- dogleg ------------------------------------------------------------------------------------


def dogleg(jacobian, f, d, radius):
    """The point of the path 0 – Cauchy point – d at that distance."""
    g = jacobian.T @ f
    cauchy = -(g @ g) / np.sum((jacobian @ g) ** 2) * g
    if np.linalg.norm(d) <= radius:
        return d
    if np.linalg.norm(cauchy) >= radius:
        return radius * cauchy / np.linalg.norm(cauchy)
    low, high = 0.0, 1.0
    for _ in range(200):
        t = 0.5 * (low + high)
        inside = np.linalg.norm(cauchy + t * (d - cauchy)) <= radius
        low, high = (t, high) if inside else (low, t)
    return cauchy + low * (d - cauchy)


@pytest.mark.parametrize("exact", [True, False])
def test_dogleg_steps(exact):
    """At radii from far inside to far outside: the step, its length, and what is promised of it."""
    rng = np.random.default_rng(5)
    jacobian, f = rng.standard_normal((6, 6)), rng.standard_normal(6)
    d = -np.linalg.solve(jacobian, f)
    d = d if exact else d + 0.3 * np.linalg.norm(d) * rng.standard_normal(6) / 6**0.5
    operator = lx.MatrixLinearOperator(jnp.asarray(jacobian))
    search = nks.Dogleg()
    made = model(operator, -jnp.asarray(f), jnp.asarray(d))
    fresh = jax.jit(search.start)(made, search.init(jnp.asarray(f), ONE, None))
    np.testing.assert_allclose(fresh.radius, np.linalg.norm(d))  # the first: d itself
    for radius in np.linalg.norm(d) * np.array([1e-6, 1e-2, 0.1, 0.3, 0.6, 0.9, 0.999, 1.0, 7.0]):
        state = fresh._replace(radius=jnp.asarray(radius))
        wanted = dogleg(jacobian, f, d, radius)
        got = search.displacement(state, jnp.asarray(d))
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12 * np.linalg.norm(d))
        step = search.step(state.subspace, state.radius)
        np.testing.assert_allclose(step.length, np.linalg.norm(wanted), rtol=1e-9)
        promised = np.linalg.norm(f + jacobian @ wanted) / np.linalg.norm(f)
        np.testing.assert_allclose(step.linear_norm, promised, rtol=1e-7, atol=3e-8)  # √ε


def test_dogleg_radius():
    """ρ < 1/4: a quarter of the step; ρ > 3/4 on the boundary: twice; kept in between."""
    search, operator = nks.Dogleg(), lx.IdentityLinearOperator(jnp.zeros(2))
    f = jnp.array([3.0, 4.0])
    state = search.start(model(operator, -f, -f), search.init(f, ONE, None))
    state = state._replace(radius=jnp.asarray(2.5))  # half way: m = 1/2, promised 3/4

    def judged(merit):
        return search.judge(state, nks.Trial(f, f, jnp.asarray(merit), -f))

    for merit, accepted, radius in (
        (jnp.inf, False, 0.625),
        (1.1, False, 0.625),
        ((1 - 0.75 * 0.1) ** 0.5, True, 0.625),
        ((1 - 0.75 * 0.5) ** 0.5, True, 2.5),
        ((1 - 0.75 * 0.9) ** 0.5, True, 5.0),
    ):
        verdict = judged(merit)
        assert bool(verdict.accepted) == accepted and not verdict.failed
        np.testing.assert_allclose(verdict.state.radius, radius)


def test_dogleg_in_a_solve():
    """Wood's function: a rejected trial costs an evaluation and no product with J."""
    problem = get("wood")
    dogleg = nks.Dogleg(initial_radius=0.1)
    solver = nks.NewtonKrylov(
        0.0, 1e-10, globalisation=dogleg, forcing=nks.ConstantForcing(1e-8), history_length=200
    )
    solution = run(problem.fn, solver, problem.y0, problem.args, max_steps=150)
    assert reason(solution) == "residual_atol"
    assert_honest(solution, problem.fn, problem.y0, problem.args, rtol=0.0, atol=1e-10)
    record, counted = rows(solution), counters(solution)
    solves = counted["num_steps"]  # one for each accepted point but the last, and the first
    assert counted["num_transposed_matvecs"] == solves
    rejected = ~record["accepted"]
    assert rejected.any()
    assert (record["num_matvecs"][rejected] == 0).all()
    assert (np.diff(record["norm"][record["accepted"]]) < 0).all()


def test_trust_region_failure():
    """J of the wrong sign: no step will do, and the reason says so."""
    wrong = lambda y, _: y + 2.0 * jax.lax.stop_gradient(-y) + 5.0
    solver = nks.NewtonKrylov(0.0, 1e-10, globalisation=nks.Dogleg())
    solution = run(wrong, solver, jnp.ones(2), max_steps=100)
    assert reason(solution) == "trust_region_failed"
    np.testing.assert_array_equal(solution.value, [1.0, 1.0])


# --- hookstep ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gmres", "fgmres", "restarted"])
def test_hooksteps(name):
    """The least ‖F + J s‖ over the Krylov space within the radius, against a dense solve of it."""
    rng = np.random.default_rng(8)
    n = 9
    jacobian = rng.standard_normal((n, n)) + 2 * np.eye(n)
    f, m = rng.standard_normal(n), np.diag(rng.uniform(0.5, 4.0, n))
    jacobi = nks.UserPreconditioner(lambda j, y, a: lambda v: v / jnp.diag(m))
    kinds = {
        "gmres": (nks.GMRES(restart=9), np.eye(n)),
        "fgmres": (nks.FGMRES(restart=9, preconditioner=jacobi), np.linalg.inv(m)),
        "restarted": (nks.GMRES(restart=2, max_steps=8), np.eye(n)),
    }
    solver, inverse = kinds[name]
    operator = nks.linearise(lambda y, a: a @ y, jnp.zeros(n), jnp.asarray(jacobian)).operator
    state = solver.prepare(operator, jnp.zeros(n), None)
    minus_f = -jnp.asarray(f)
    empty = solver.workspace(minus_f, real=True)
    norm = np.linalg.norm(f)
    out = solver.run(state, minus_f, tolerance=0.3 * norm, real=True, workspace=empty)
    made = model(operator, minus_f, out.value)
    made = made._replace(workspace=out.workspace, num_restarts=out.num_restarts)
    search = nks.Hookstep()
    search.check(solver)
    fresh = jax.jit(search.start)(made, search.init(minus_f, ONE, empty))
    d, k = np.asarray(out.value), int(out.workspace.record.columns)
    assert 1 < k < n
    space, vector = [], f
    for _ in range(k):  # M⁻¹ K_k(J M⁻¹, F)
        space.append(inverse @ vector)
        vector = jacobian @ space[-1]
        vector = vector / np.linalg.norm(vector)
    basis = np.linalg.qr(np.stack(space, 1))[0]
    for fraction in (0.05, 0.4, 0.8, 0.99):
        radius = fraction * np.linalg.norm(d)
        got = np.asarray(search.vector(fresh.subspace, jnp.asarray(radius), out.value))
        np.testing.assert_allclose(np.linalg.norm(got), radius, rtol=1e-8)
        step = search.step(fresh.subspace, jnp.asarray(radius))
        promised = np.linalg.norm(f + jacobian @ got) / norm
        if name == "restarted":
            np.testing.assert_allclose(got, fraction * d, rtol=1e-12)
            assert promised <= float(step.linear_norm) + 1e-12
            continue
        image = jacobian @ basis
        low, high = 0.0, 1e6
        for _ in range(200):
            mu = 0.5 * (low + high)
            y = np.linalg.solve(image.T @ image + mu * np.eye(k), -image.T @ f)
            low, high = (mu, high) if np.linalg.norm(y) > radius else (low, mu)
        np.testing.assert_allclose(got, basis @ y, rtol=1e-6, atol=1e-7 * radius)
        np.testing.assert_allclose(step.linear_norm, promised, rtol=1e-8)
    np.testing.assert_array_equal(search.vector(fresh.subspace, 2 * ONE * norm * 9, out.value), d)


def test_hookstep_wants_an_arnoldi_basis():
    diagonal = nks.Jacobi(probes=1)
    for solver in (nks.CG(), nks.BiCGStab(), nks.GCRODR(), nks.GMRES(preconditioner=diagonal)):
        with pytest.raises(ValueError, match="Hookstep"):
            nks.NewtonKrylov(1e-6, 1e-6, linear_solver=solver, globalisation=nks.Hookstep())


# --- line searches -----------------------------------------------------------------------------


def test_non_monotone_with_a_window_of_one_is_backtracking():
    problem = get("generalised-rosenbrock")
    made = [
        run(
            problem.fn,
            nks.NewtonKrylov(0.0, 1e-8, globalisation=search, history_length=64),
            problem.y0,
            problem.args,
            max_steps=60,
        )
        for search in (nks.Backtracking(), nks.NonMonotone(window=1))
    ]
    for name, column in rows(made[0]).items():
        np.testing.assert_array_equal(column, rows(made[1])[name], err_msg=name)


def test_non_monotone_measures_against_the_largest_of_its_window():
    search = nks.NonMonotone(window=3)
    operator = lx.IdentityLinearOperator(jnp.zeros(1))
    state, norms = search.init(jnp.zeros(1), ONE, None), []
    for norm in (4.0, 1.0, 2.0, 0.5, 0.25):
        f = jnp.array([norm])
        state = search.start(model(operator, -f, -f), state)
        norms = [norm, *norms][:3]
        # ½φ² ≤ ½(max/‖F‖)² − α: just inside, just outside.
        bound = ((max(norms) / norm) ** 2 - 2e-4) ** 0.5
        for factor, accepted in ((1 - 1e-9, True), (1 + 1e-9, False)):
            trial = nks.Trial(f, f, jnp.asarray(factor * bound), -f)
            assert bool(search.judge(state, trial).accepted) == accepted
        assert not search.judge(state, nks.Trial(f, f, jnp.inf * ONE, -f)).accepted


def test_critical_point_is_the_secant_method():
    """F along d is 1 − λ·slope…: the lengths are those of a secant method in NumPy."""
    fn = lambda y, _: -jnp.cos(y) + 0.9 * y**3  # F(0) = −1
    solver = nks.NewtonKrylov(
        0.0, 1e-13, globalisation=nks.CriticalPoint(max_secants=3), history_length=64
    )
    solution = run(fn, solver, jnp.full(1, 0.3), max_steps=60)
    assert reason(solution) == "residual_atol"
    record, y, k = rows(solution), 0.3, 1
    value = lambda u: -np.cos(u) + 0.9 * u**3
    slope = lambda u: np.sin(u) + 2.7 * u**2
    for _ in range(3):
        d = -value(y) / slope(y)
        lengths, values, length = [0.0], [value(y) * d], 1.0
        while True:
            np.testing.assert_allclose(record["step_length"][k], length, rtol=1e-5)
            lengths.append(length)
            values.append(value(y + length * d) * d)
            slopes = (values[-1] - values[-2]) / (lengths[-1] - lengths[-2])
            following = min(max(length - values[-1] / slopes, 1e-12), 1.0)
            small = abs(values[-1]) <= 1e-3 * abs(values[0])
            done = small or len(values) > 4 or following == length
            assert bool(record["accepted"][k]) == done
            k += 1
            if done:
                break
            length = following
        y = y + length * d


def test_damped_newton_contracts_by_one_minus_lambda():
    """On a linear problem ‖F‖ falls by 1 − λ in every step."""
    fn = lambda y, _: jnp.array([2.0, 3.0]) * y - 1.0
    solver = nks.NewtonKrylov(
        1e-2,
        0.0,
        globalisation=nks.Damped(0.5),
        forcing=nks.ConstantForcing(1e-12),
        history_length=9,
    )
    norms = rows(run(fn, solver, jnp.zeros(2)))["norm"]
    np.testing.assert_allclose(norms, norms[0] * 0.5 ** np.arange(8), rtol=1e-9)


# --- pseudo-transient continuation -------------------------------------------------------------


def test_the_beam_goes_to_its_positive_branch():
    """Kelley's beam: max u = 2.191, 25 residuals in his history; a line search ends at u = 0."""
    problem = get("beam")
    solver = nks.NewtonKrylov(
        0.0,
        1e-8,
        globalisation=nks.PseudoTransient(0.01),
        forcing=nks.ConstantForcing(1e-3),
        linear_solver=nks.BandedDirect(lower=1, upper=1),
        history_length=200,
    )
    solution = run(problem.fn, solver, problem.y0, problem.args, max_steps=150)
    assert reason(solution) == "residual_atol"
    assert float(jnp.max(solution.value)) == pytest.approx(2.191, abs=5e-4)
    assert float(jnp.min(solution.value)) > -1e-12
    assert len(rows(solution)["norm"]) <= 25
    backtracking = nks.NewtonKrylov(0.0, 1e-8, linear_solver=nks.BandedDirect(lower=1, upper=1))
    other = run(problem.fn, backtracking, problem.y0, problem.args, max_steps=150)
    assert float(jnp.max(other.value)) < 2.0


@pytest.mark.parametrize("rule", [nks.SER(), nks.TTE(tolerance=0.1)], ids=["SER", "TTE"])
def test_steps_are_those_of_linearised_implicit_euler(rule):
    """With M = diag(1, 4) and δ₀: s = −(M/δ + J)⁻¹F, and δ grows by its rule."""
    matrix, mass = np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([1.0, 4.0])
    fn = lambda y, a: a @ y + y**3 - 1.0
    solver = nks.NewtonKrylov(
        0.0,
        1e-12,
        globalisation=nks.PseudoTransient(0.3, rule, mass=jnp.asarray(mass)),
        linear_solver=nks.DenseDirect(),
        forcing=nks.ConstantForcing(1e-13),
        history_length=64,
    )
    solution = run(fn, solver, jnp.zeros(2), jnp.asarray(matrix), max_steps=60)
    y, delta, norms, before = np.zeros(2), 0.3, [], None
    value = lambda y: matrix @ y + y**3 - 1.0
    for _ in range(6):
        norms.append(np.linalg.norm(value(y)))
        jacobian = matrix + np.diag(3 * y**2)
        step = -np.linalg.solve(np.diag(mass) / delta + jacobian, value(y))
        y, slope = y + step, step / delta
        if isinstance(rule, nks.SER):
            following = delta * norms[-1] / np.linalg.norm(value(y))
        elif before is None:
            following = 0.3
        else:  # δ²|u″|/(2 (1 + |u|)) = 0.1, with the second divided difference for u″
            second = 2 * (slope - before[0]) / (delta + before[1])
            worst = np.max(np.abs(second) / (1 + np.abs(y)))
            following = min(np.sqrt(2 * 0.1 / worst), 10 * delta)
        before, delta = (slope, delta), following
    np.testing.assert_allclose(rows(solution)["norm"][:6], norms, rtol=1e-9)
    assert reason(solution) == "residual_atol"


# --- all of them -------------------------------------------------------------------------------

SEARCHES = [
    nks.Damped(0.5),
    nks.NonMonotone(),
    nks.CriticalPoint(),
    nks.Dogleg(),
    nks.Hookstep(),
    nks.PseudoTransient(1.0),
]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: type(s).__name__)
def test_lanes_trees_and_precision(search):
    """Lanes of a batch as if alone, on a tree, in float32; and a NaN beyond a wall."""

    def fn(y, a):
        u, v = y["u"], y["v"]
        inside = jnp.all(jnp.abs(u) < 20)
        return {"u": jnp.where(inside, u**3 + a * u - v[0], jnp.nan), "v": v + u[:1] - 1.0}

    y0 = {"u": jnp.full((3,), 1.5, jnp.float32), "v": jnp.zeros((1,), jnp.float32)}
    solver = nks.NewtonKrylov(1e-3, 1e-5, globalisation=search)
    solve = lambda a: run(fn, solver, y0, a, max_steps=80)
    args = jnp.array([0.5, 1.0, 4.0], jnp.float32)
    batch = jax.jit(lambda a: jax.vmap(lambda a: solve(a).value)(a))(args)
    counts = jax.jit(lambda a: jax.vmap(lambda a: solve(a).stats["num_steps"])(a))(args)
    for k, a in enumerate(args):
        alone = solve(a)
        assert reason(alone).startswith("residual")
        assert int(alone.stats["num_steps"]) == int(counts[k])
        for got, wanted in zip(jax.tree.leaves(batch), jax.tree.leaves(alone.value), strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got[k], wanted, rtol=2e-4, atol=2e-5)


def test_bad_arguments():
    for make in (
        lambda: nks.Damped(0.0),
        lambda: nks.NonMonotone(window=0),
        lambda: nks.CriticalPoint(max_secants=0),
        lambda: nks.Dogleg(initial_radius=-1.0),
        lambda: nks.Dogleg(accept=0.5),
        lambda: nks.PseudoTransient(-1.0),
        lambda: nks.TTE(growth=0.5),
    ):
        with pytest.raises(ValueError, match="must"):
            make()

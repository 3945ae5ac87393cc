"""ESDIRK methods with one linearisation a step: order, end values, counts, bad input."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
import nksolve.ode as ode
from nksolve.problems.stiff import STIFF
from tests.helpers.counting import Counter

METHODS = {
    "ImplicitEuler": (ode.ImplicitEuler, 1),
    "Kvaerno3": (ode.Kvaerno3, 3),
    "Kvaerno4": (ode.Kvaerno4, 4),
    "Kvaerno5": (ode.Kvaerno5, 5),
}
BAND = nks.BandedDirect(lower=1, upper=1)


def _smooth(t, y, args):
    """Three unknowns, an explicit time, y = exp(sin t) (1, 2, 3) as solution."""
    u, v, w = y
    c, s = jnp.cos(t), jnp.exp(jnp.sin(t))
    return jnp.stack(
        [
            c * u + args * (v - 2 * s) ** 2,
            c * v + u * w - 3 * s**2,
            2.0 * c * w - c * v * w / (2 * s),
        ]
    )


def _exact(t):
    return np.exp(np.sin(t)) * np.array([1.0, 2.0, 3.0])


@pytest.mark.parametrize("name", METHODS)
def test_order_of_convergence(name):
    method, order = METHODS[name]
    newton = ode.SimplifiedNewton.alone(1e-13, 1e-13, kappa=1e-1, max_steps=30)
    solver = method(linear_solver=nks.BandedDirect(lower=2, upper=2), root_finder=newton)

    @jax.jit
    def error(dt):
        out = dfx.diffeqsolve(
            dfx.ODETerm(_smooth),
            solver,
            0.0,
            1.0,
            dt,
            jnp.array([1.0, 2.0, 3.0]),
            jnp.asarray(0.5),
            max_steps=400,
        )
        return jnp.max(jnp.abs(out.ys[-1] - _exact(1.0)))

    steps = [32, 64, 128] if order < 5 else [8, 16, 32]
    errors = np.array([float(error(1.0 / n)) for n in steps])
    orders = np.log2(errors[:-1] / errors[1:])
    assert np.all(orders > order - 0.25), orders
    assert np.all(orders < order + 0.9), orders


@eqx.filter_jit
def _solved(problem, solver, rtol, atol, terms=None, max_steps=4096):
    return dfx.diffeqsolve(
        dfx.ODETerm(problem.fn) if terms is None else terms,
        solver,
        *problem.span,
        None,
        problem.y0,
        problem.args,
        stepsize_controller=dfx.PIDController(rtol=rtol, atol=atol),
        max_steps=max_steps,
        saveat=dfx.SaveAt(t1=True, solver_state=True),
        throw=False,
    )


def _weighted(problem, sol, rtol, atol):
    error = np.abs(np.asarray(sol.ys[-1]) - problem.end)
    return float(np.max(error / (atol + rtol * np.abs(problem.end))))


KINETICS = ("rober", "hires", "orego", "van-der-pol")


@pytest.mark.parametrize("name", ["rober", "hires"])
def test_end_values(name):
    problem = STIFF[name]()
    for rtol in (1e-4, 1e-6):
        atol = rtol * problem.atol_factor
        sol = _solved(
            problem, ode.Kvaerno5(linear_solver=nks.BandedDirect(block=len(problem.y0))), rtol, atol
        )
        assert sol.result == dfx.RESULTS.successful
        assert _weighted(problem, sol, rtol, atol) < 20


@pytest.mark.slow
@pytest.mark.parametrize("method", ["Kvaerno3", "Kvaerno4", "Kvaerno5"])
@pytest.mark.parametrize("name", [*KINETICS, "brusselator-1d"])
def test_end_values_in_full(name, method):
    problem = STIFF[name]()
    block = 2 if name == "brusselator-1d" else len(problem.y0)
    solver = METHODS[method][0](linear_solver=nks.BandedDirect(block=block))
    for rtol in (1e-4, 1e-6, 1e-8):
        atol = rtol * problem.atol_factor
        sol = _solved(problem, solver, rtol, atol, max_steps=100_000)
        w = _weighted(problem, sol, rtol, atol)
        print(name, method, rtol, "w", round(w, 3), {k: int(v) for k, v in sol.stats.items()})
        assert sol.result == dfx.RESULTS.successful
        assert w < 20


def test_as_many_steps_as_with_a_tight_dense_newton():
    """Diffrax's default root finder rejects half of the steps; a converged one does not."""
    problem = STIFF["brusselator-1d"](10)
    dense = dfx.Kvaerno5(root_finder=optx.Newton(rtol=1e-10, atol=1e-12), root_find_max_steps=20)
    theirs = _solved(problem, dense, 1e-5, 1e-5)
    direct = _solved(problem, ode.Kvaerno5(linear_solver=nks.BandedDirect(block=2)), 1e-5, 1e-5)
    krylov = _solved(
        problem,
        ode.Kvaerno5(linear_solver=nks.GMRES(preconditioner=nks.BlockTridiagonal())),
        1e-5,
        1e-5,
    )
    for ours in (direct, krylov):
        for count in ("num_accepted_steps", "num_rejected_steps"):
            assert abs(int(ours.stats[count]) - int(theirs.stats[count])) <= 2
        np.testing.assert_allclose(ours.ys, theirs.ys, rtol=1e-4)
    work = krylov.solver_state.work
    assert int(work.num_linearisations) == int(krylov.stats["num_accepted_steps"])
    # The preconditioner is kept by the γ rule: made in fewer than two thirds of the steps.
    assert int(work.num_preconditioner_updates) < 2 * int(work.num_linearisations) / 3
    assert int(direct.solver_state.work.num_preconditioner_updates) == int(
        direct.solver_state.work.num_linearisations
    )


def test_counts_are_those_of_the_run():
    counter = Counter()
    fn = lambda t, y, args: counter.tick(_smooth(t, y, args))
    newton = ode.SimplifiedNewton.alone(1e-6, 1e-6)
    solver = ode.Kvaerno3(linear_solver=nks.GMRES(), root_finder=newton)
    terms, y0, args = dfx.ODETerm(fn), jnp.array([1.0, 2.0, 3.0]), jnp.asarray(0.5)

    @jax.jit
    def step(y0):
        state = solver.init(terms, 0.0, 0.1, y0, args)
        return solver.step(terms, 0.0, 0.1, y0, args, state, jnp.array(False))

    with counter.measure() as count:
        y1, _, _, state, result = jax.block_until_ready(step(y0))
    assert result == dfx.RESULTS.successful
    assert count.primal == int(state.work.num_fn_evals)
    assert count.tangent == int(state.work.num_matvecs)
    assert int(state.work.num_linearisations) == 1
    np.testing.assert_allclose(y1, _exact(0.1), rtol=1e-4)


def _tree_fn(t, y, args):
    a, (b,) = y["a"], y["b"]
    return {"a": -args * (a - jnp.cos(t)), "b": (-1e3 * (b - a[0]),)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_trees_dtypes_lanes_and_dense_output(dtype):
    """One program: a tree of unknowns, three lanes of different stiffness, values between steps."""
    y0 = {"a": jnp.ones((2,), dtype), "b": (jnp.zeros((), dtype),)}
    rtol = 1e-4

    def run(stiffness):
        return dfx.diffeqsolve(
            dfx.ODETerm(_tree_fn),
            ode.Kvaerno4(linear_solver=nks.GMRES()),
            jnp.asarray(0.0, dtype),
            jnp.asarray(2.0, dtype),
            None,
            y0,
            stiffness,
            stepsize_controller=dfx.PIDController(rtol=rtol, atol=rtol),
            saveat=dfx.SaveAt(ts=jnp.linspace(0.5, 2.0, 4).astype(dtype), solver_state=True),
        )

    k = np.array([1.0, 30.0, 2000.0])
    lanes = eqx.filter_jit(jax.vmap(run))(jnp.asarray(k, dtype))
    alone = eqx.filter_jit(run)
    for i in range(3):
        sol = alone(jnp.asarray(k[i], dtype))
        # The same counts, where rounding does not decide them.
        work = jax.tree.map(lambda x, i=i: x[i], lanes.solver_state.work)
        rounding = 0.0 if dtype == jnp.float64 else 0.05
        np.testing.assert_allclose(work, sol.solver_state.work, rtol=rounding)
        near = 1e-6 if dtype == jnp.float64 else 10 * rtol
        np.testing.assert_allclose(lanes.ys["a"][i], sol.ys["a"], atol=near)
        t = np.linspace(0.5, 2.0, 4)
        exact = (k[i] ** 2 * np.cos(t) + k[i] * np.sin(t)) / (k[i] ** 2 + 1)
        exact = exact + (1 - k[i] ** 2 / (k[i] ** 2 + 1)) * np.exp(-k[i] * t)
        np.testing.assert_allclose(sol.ys["a"][-1, 0], exact[-1], atol=20 * rtol)
        # Between steps by a cubic, whose error the controller does not see.
        np.testing.assert_allclose(sol.ys["a"][:, 0], exact, atol=2e-2)
        assert sol.ys["a"].dtype == dtype


@pytest.mark.filterwarnings("ignore:Complex dtype support")
def test_complex_states():
    """i y' = H y with a Hermitian H, by parts and as it is."""
    matrix = jnp.array([[1.0, 0.5j, 0.0], [-0.5j, 200.0, 1.0], [0.0, 1.0, -3.0]])
    y0 = jnp.array([1.0, 0.0, 1.0j])
    sol = dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: -1j * (args @ y) - 50.0 * y),
        ode.Kvaerno5(linear_solver=nks.GMRES()),
        0.0,
        0.1,
        None,
        y0,
        matrix,
        stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-9),
    )
    exact = jax.scipy.linalg.expm(0.1 * (-1j * matrix - 50.0 * jnp.eye(3, dtype=complex))) @ y0
    np.testing.assert_allclose(sol.ys[-1], exact, atol=1e-7)


# --- what goes wrong ---------------------------------------------------------------------------


def test_constant_steps_need_tolerances():
    terms, y0 = dfx.ODETerm(lambda t, y, args: -y), jnp.ones(2)
    with pytest.raises(ValueError, match="tolerances"):
        dfx.diffeqsolve(terms, ode.Kvaerno3(), 0.0, 1.0, 0.1, y0)
    solver = ode.Kvaerno3()
    with pytest.raises(ValueError, match=r"SimplifiedNewton\.alone"):
        solver.step(terms, 0.0, 0.1, y0, None, solver.init(terms, 0.0, 0.1, y0, None), False)


def test_states_are_inexact():
    with pytest.raises(TypeError, match="floating-point"):
        ode.Kvaerno3().init(dfx.ODETerm(lambda t, y, args: y), 0.0, 1.0, jnp.arange(2), None)


@pytest.mark.parametrize("bad", [dict(max_steps=0), dict(kappa=-1.0), dict(rtol=-1e-3)])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match="must"):
        ode.SimplifiedNewton(**bad)


def test_a_right_hand_side_that_is_not_finite_ends_with_a_reason():
    run = lambda controller: dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: jnp.where(t > 0.5, jnp.nan, -y)),
        ode.Kvaerno3(root_finder=ode.SimplifiedNewton.alone(), linear_solver=nks.GMRES()),
        0.0,
        1.0,
        0.05,
        jnp.ones(3),
        stepsize_controller=controller,
        max_steps=60,
        throw=False,
    )
    constant = run(dfx.ConstantStepSize())
    assert constant.result == dfx.RESULTS.nonlinear_divergence
    adaptive = run(dfx.PIDController(rtol=1e-3, atol=1e-6))
    assert adaptive.result == dfx.RESULTS.max_steps_reached
    assert int(adaptive.stats["num_rejected_steps"]) > 10


def test_sizes_one_and_none():
    run = lambda y0: dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: jax.tree.map(lambda x: -100.0 * x, y)),
        ode.Kvaerno3(linear_solver=nks.GMRES()),
        0.0,
        1.0,
        None,
        y0,
        stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-6),
    )
    assert abs(float(run(jnp.ones(())).ys[-1])) < 1e-5
    assert run((jnp.ones(()), jnp.zeros((0,)))).ys[1].shape == (1, 0)


# --- the two-dimensional Brusselator, with its jump ----------------------------------------------


@eqx.filter_jit
def _brusselator(solver, rtol):
    problem = STIFF["brusselator-2d"](8)
    controller = dfx.PIDController(rtol=rtol, atol=rtol, pcoeff=0.3, icoeff=0.3)
    return dfx.diffeqsolve(
        dfx.ODETerm(problem.fn),
        solver,
        *problem.span,
        None,
        problem.y0,
        problem.args,
        stepsize_controller=dfx.ClipStepSizeController(
            controller, jump_ts=jnp.array(problem.jumps)
        ),
        max_steps=4096,
        saveat=dfx.SaveAt(t1=True, solver_state=True),
    )


@pytest.mark.parametrize("rtol", [1e-5, 1e-6])
def test_few_steps_are_rejected(rtol):
    """At most 15%, with Diffrax's own root finder 52%; linearisations: one a step."""
    problem = STIFF["brusselator-2d"](8)
    sol = _brusselator(ode.Kvaerno5(linear_solver=nks.GMRES()), rtol)
    taken, lost = int(sol.stats["num_accepted_steps"]), int(sol.stats["num_rejected_steps"])
    error = np.abs(np.asarray(sol.ys[-1]) - problem.end) / (rtol * (1 + np.abs(problem.end)))
    print(f"rtol {rtol:g}: {taken} + {lost} steps, w = {error.max():.2f}")
    assert lost <= 0.15 * (taken + lost)
    assert error.max() < 20
    work = sol.solver_state.work
    assert int(work.num_linearisations) == taken
    assert int(work.num_convergence_failures) == 0


@pytest.mark.slow
def test_fewer_steps_than_diffrax_at_equal_error():
    problem = STIFF["brusselator-2d"](8)
    for rtol in (1e-5, 1e-6):
        ours = _brusselator(ode.Kvaerno5(linear_solver=nks.GMRES()), rtol)
        theirs = _brusselator(dfx.Kvaerno5(), rtol)
        errors = [np.abs(np.asarray(s.ys[-1]) - problem.end).max() for s in (ours, theirs)]
        steps = [int(s.stats["num_steps"]) for s in (ours, theirs)]
        lost = int(theirs.stats["num_rejected_steps"])
        print(f"rtol {rtol:g}: steps {steps}, errors {errors}, Diffrax rejects {lost}")
        assert steps[0] <= 0.6 * steps[1]

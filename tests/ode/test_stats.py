"""Statistics of all attempts: against the run-time counts, and the solve as if they were not."""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.ode.implicit_euler import ImplicitEuler
from nksolve.ode.kvaerno import Kvaerno3
from nksolve.ode.newton import SimplifiedNewton
from nksolve.ode.stats import WithStats, _work_of, format_stats
from nksolve.ode.work import Work
from tests.helpers.counting import Counter

COUNTER = Counter()
Y0, MU, SLOW = jnp.array([2.0, 1.0]), jnp.asarray(10.0), jnp.asarray(1.0)
PID = dfx.PIDController(rtol=1e-3, atol=1e-3)
KVAERNO = Kvaerno3(linear_solver=nks.GMRES())
CHECKPOINTS = dfx.RecursiveCheckpointAdjoint()


def van_der_pol(t, y, mu):
    del t
    y = COUNTER.tick(y)
    return jnp.stack([y[1], mu * ((1.0 - y[0] ** 2) * y[1] - y[0])])


def solve(y0, mu, adjoint=CHECKPOINTS, controller=PID, solver=KVAERNO, dt0=1.0, **keywords):
    terms = dfx.ODETerm(van_der_pol)
    keywords = {"max_steps": 64, "saveat": dfx.SaveAt(t1=True, solver_state=True)} | keywords
    span = keywords.pop("span", (0.0, 1.0))
    return dfx.diffeqsolve(
        terms,
        solver,
        *span,
        dt0,
        y0,
        args=mu,
        stepsize_controller=controller,
        adjoint=adjoint,
        **keywords,
    )


@functools.cache
def with_gradient(adjoint):
    """mu ↦ ((y1, solution), gradient of y1's sum) by reverse mode."""

    def end(mu, y0):
        solution = solve(y0, mu, adjoint)
        return jnp.sum(solution.ys), solution

    return jax.jit(jax.value_and_grad(end, has_aux=True))


@functools.cache
def counted():
    """A solve with rejections: what ran, and the solution."""
    run = jax.jit(lambda y0, mu: solve(y0, mu, WithStats()))
    run(Y0, MU)
    with COUNTER.measure() as count:
        solution = run(Y0, MU)
    return count, solution


def test_counts_are_what_ran_in_all_attempts():
    count, solution = counted()
    stats = solution.stats
    assert stats["num_rejected_steps"] >= 3
    assert count.primal == stats["num_fn_evals"]
    assert count.tangent == stats["num_matvecs"]
    assert stats["num_linearisations"] == stats["num_steps"]
    assert stats["num_fn_evals"] == stats["num_steps"] + stats["num_newton_steps"]
    assert stats["num_steps"] == stats["num_accepted_steps"] + stats["num_rejected_steps"]


def test_the_solver_state_counts_accepted_steps_only():
    _, solution = counted()
    work = solution.solver_state.work
    assert work.num_linearisations == solution.stats["num_accepted_steps"]
    assert all(work._asdict()[name] <= solution.stats[name] for name in Work._fields)
    assert set(solution.stats) == {
        *Work._fields,
        *("num_steps", "num_accepted_steps", "num_rejected_steps", "max_steps"),
    }


def test_value_and_gradient_are_bit_equal_to_those_without():
    (value, solution), gradient = with_gradient(WithStats())(MU, Y0)
    (expected, plain), expected_gradient = with_gradient(CHECKPOINTS)(MU, Y0)
    assert value == expected and gradient == expected_gradient
    assert gradient != 0 and jnp.isfinite(gradient)
    np.testing.assert_array_equal(solution.ys, plain.ys)
    assert all(solution.stats[name] == number for name, number in plain.stats.items())
    _, counts = counted()
    assert solution.stats["num_matvecs"] == counts.stats["num_matvecs"]


def test_lanes_count_as_if_alone():
    mus = jnp.array([1.0, 3.0, 10.0])
    batch = jax.jit(jax.vmap(lambda mu: solve(Y0, mu, WithStats())))(mus)
    alone = jax.jit(lambda mu: solve(Y0, mu, WithStats()))
    for i, mu in enumerate(mus):
        single = alone(mu)
        for name in (*Work._fields, "num_steps", "num_rejected_steps"):
            assert batch.stats[name][i] == single.stats[name], name
        np.testing.assert_allclose(batch.ys[i], single.ys, rtol=1e-12)
    assert len(set(batch.stats["num_newton_steps"].tolist())) == 3


EULER = ImplicitEuler(linear_solver=nks.GMRES(), root_finder=SimplifiedNewton.alone(1e-3, 1e-3))


@pytest.mark.parametrize(
    ("controller", "dt0"),
    [(dfx.ConstantStepSize(), 0.125), (dfx.StepTo(jnp.linspace(0.0, 1.0, 9)), None)],
    ids=["constant", "step_to"],
)
def test_constant_steps(controller, dt0):
    keywords = dict(controller=controller, dt0=dt0, solver=EULER)
    run = jax.jit(lambda y0, adjoint: solve(y0, SLOW, adjoint, **keywords), static_argnums=1)
    run(Y0, WithStats())
    with COUNTER.measure() as count:
        solution = run(Y0, WithStats())
    assert solution.stats["num_linearisations"] == solution.stats["num_steps"] == 8
    assert count.primal == solution.stats["num_fn_evals"] > 16
    assert count.tangent == solution.stats["num_matvecs"]
    np.testing.assert_array_equal(solution.ys, run(Y0, CHECKPOINTS).ys)


class Halving(dfx.AbstractStepSizeController):
    """Takes back every other attempt before t = 0.8; looks at f three times before the first."""

    def wrap(self, direction):
        del direction
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        del dt0, error_order, t1
        look = lambda y, _: (y + 1e-9 * func(terms, t0, y, args), None)
        y, _ = jax.lax.scan(look, y0, None, length=2)
        h = 0.25 + 0.0 * jnp.sum(func(terms, t0, y, args))
        return t0 + h, jnp.array(False)

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):
        del y0, y1_candidate, args, y_error, error_order
        h = t1 - t0
        keep = state | (t1 > 0.8)
        start = jnp.where(keep, t1, t0)
        return keep, start, start + h, False, ~keep, dfx.RESULTS.successful


def test_a_controller_of_ones_own_and_its_first_step():
    keywords = dict(controller=Halving(), dt0=None, solver=EULER)
    run = jax.jit(lambda y0: solve(y0, SLOW, WithStats(), **keywords))
    run(Y0)
    with COUNTER.measure() as count:
        solution = run(Y0)
    stats = solution.stats
    assert (stats["num_rejected_steps"], stats["num_accepted_steps"]) == (3, 4)
    assert stats["num_linearisations"] == 7
    assert count.primal == stats["num_fn_evals"] == 3 + 7 + stats["num_newton_steps"]


def test_clipped_steps_with_an_event_and_dense_output():
    controller = dfx.ClipStepSizeController(PID, jump_ts=[0.3])
    seen = []

    def crossing(t, y, args, *, solver, stepsize_controller, **_):
        seen.append((type(solver), type(stepsize_controller)))
        return y[0] - 1.9

    saves = dfx.SaveAt(t0=True, t1=True, ts=[0.1, 0.2], dense=True, controller_state=True)
    keywords = dict(controller=controller, saveat=saves, event=dfx.Event(crossing))
    run = jax.jit(
        lambda y0, adjoint: solve(y0, MU, adjoint, **keywords, span=(0.0, 2.0)), static_argnums=1
    )
    counts, plain = run(Y0, WithStats()), run(Y0, CHECKPOINTS)
    assert counts.result == dfx.RESULTS.event_occurred
    for a, b in zip(
        jax.tree.leaves((counts.ys, counts.controller_state, counts.interpolation)),
        jax.tree.leaves((plain.ys, plain.controller_state, plain.interpolation)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert set(seen) == {(Kvaerno3, dfx.ClipStepSizeController)}
    assert counts.stats["num_linearisations"] == counts.stats["num_steps"]


@pytest.mark.slow
def test_forward_mode_and_direct():
    def end(mu, adjoint):
        solution = solve(Y0, mu, adjoint)
        return jnp.sum(solution.ys), solution.stats

    for kind in (dfx.ForwardMode(), dfx.DirectAdjoint()):
        run = lambda adjoint: jax.jit(
            lambda mu: jax.jvp(lambda mu: end(mu, adjoint), (mu,), (1.0,), has_aux=True)
        )(MU)
        value, tangent, stats = run(WithStats(kind))
        expected, expected_tangent, _ = run(kind)
        assert value == expected and tangent == expected_tangent
        assert stats["num_matvecs"] == counted()[1].stats["num_matvecs"]
    gradient = jax.jit(jax.grad(lambda mu: end(mu, WithStats(dfx.DirectAdjoint()))[0]))(MU)
    np.testing.assert_allclose(gradient, with_gradient(CHECKPOINTS)(MU, Y0)[1], rtol=1e-8)


@pytest.mark.slow
def test_implicit_adjoint_at_a_steady_state():
    def steady(rate, adjoint):
        fn = lambda t, y, rate: COUNTER.tick(rate - y**3)
        event = dfx.Event(dfx.steady_state_event())
        solution = dfx.diffeqsolve(
            dfx.ODETerm(fn),
            Kvaerno3(),
            0.0,
            jnp.inf,
            0.1,
            jnp.ones(3),
            args=rate,
            stepsize_controller=dfx.PIDController(rtol=1e-8, atol=1e-8),
            event=event,
            adjoint=adjoint,
        )
        return jnp.sum(solution.ys), solution.stats

    # Diffrax's rule promotes types.
    run = jax.numpy_dtype_promotion("standard")(
        jax.jit(jax.value_and_grad(steady, has_aux=True), static_argnums=1)
    )
    (value, stats), gradient = run(jnp.asarray(8.0), WithStats(dfx.ImplicitAdjoint()))
    (expected, _), expected_gradient = run(jnp.asarray(8.0), dfx.ImplicitAdjoint())
    assert value == expected and gradient == expected_gradient
    assert stats["num_linearisations"] == stats["num_steps"]


def test_table():
    _, solution = counted()
    lines = format_stats(solution).splitlines()
    assert len(lines) == 9
    assert len({line.index("=") for line in lines}) == 1
    numbers = {line.split("=")[0].strip(): int(line.split("=")[1]) for line in lines}
    assert numbers["Right-hand side evaluations"] == solution.stats["num_fn_evals"]
    assert numbers["Rejected steps"] == solution.stats["num_rejected_steps"]


def test_refused():
    with pytest.raises(TypeError, match=r"Kvaerno5.*nks\.ode\.Kvaerno3/4/5"):
        solve(Y0, MU, WithStats(), solver=dfx.Kvaerno5())
    with pytest.raises(TypeError, match="HalfSolver"):
        _work_of(dfx.HalfSolver(KVAERNO), counted()[1].solver_state)
    for wrong in (dfx.BacksolveAdjoint(), WithStats()):
        with pytest.raises(TypeError, match="RecursiveCheckpointAdjoint"):
            WithStats(wrong)
    with pytest.raises(ValueError, match="WithStats"):
        format_stats(jax.eval_shape(lambda: solve(Y0, MU)))

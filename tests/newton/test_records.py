"""What a solve tells: counters, history, the callback, the progress meter."""

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from tests.helpers.counting import Counter
from tests.helpers.jaxprs import walk

from .solving import counters, reason, rows, run, trials


def _logarithm(y, args):
    """Full steps from 3 leave the domain, and the Jacobian is no multiple of the identity."""
    return jnp.log(y) * args + 0.1 * jnp.flip(y) - 0.1


Y0, ARGS = jnp.asarray([3.0, 2.9, 2.0]), jnp.asarray([1.0, 2.0, 3.0])
RECORDED = nks.NewtonKrylov(1e-9, 0.0, history_length=24)


def test_history_and_counters_agree():
    solution = run(_logarithm, RECORDED, Y0, ARGS)
    counted, record, n = counters(solution), rows(solution), trials(solution)
    assert counted["num_rejected_steps"] > 0
    assert counted["num_fn_evals"] == counted["num_linearisations"] == n
    assert counted["num_steps"] == np.sum(record["accepted"]) - 1
    assert counted["num_rejected_steps"] == np.sum(~record["accepted"])
    assert counted["num_matvecs"] == np.sum(record["num_matvecs"])
    assert counted["num_transposed_matvecs"] == counted["num_linear_failures"] == 0
    assert counted["num_preconditioner_applications"] == 0
    assert counted["num_preconditioner_updates"] == 0
    # A linear solve follows every accepted point but the root, and nothing else.
    solved = record["accepted"].copy()
    solved[-1] = False
    np.testing.assert_array_equal(record["num_matvecs"] > 0, solved)
    np.testing.assert_array_equal(np.isfinite(record["eta"]), solved)
    assert float(solution.stats["residual_norm"]) == record["norm"][-1]
    assert float(solution.stats["initial_residual_norm"]) == record["norm"][0]
    assert record["step_length"][0] == 0 and record["accepted"][0]
    # A rejected trial is followed by a shorter one, an accepted one by at most twice its length.
    lengths = record["step_length"]
    assert lengths[1] == 1.0
    for k in range(2, n):
        if record["accepted"][k - 1]:
            assert lengths[k] == min(1.0, 2 * lengths[k - 1])
        else:
            assert lengths[k] <= 0.5 * lengths[k - 1]
    assert nks.reason_name(int(record["reason"][-1])) == reason(solution) == "residual_rtol"
    history = solution.stats["history"]
    assert history.norm.shape == (24,)
    assert np.all(np.isnan(history.norm[n:])) and not np.any(history.accepted[n:])


def test_a_short_history_drops_what_is_past_it():
    full = rows(run(_logarithm, RECORDED, Y0, ARGS))
    solution = run(_logarithm, nks.NewtonKrylov(1e-9, 0.0, history_length=2), Y0, ARGS)
    history = solution.stats["history"]
    np.testing.assert_array_equal(history.norm, full["norm"][:2])
    np.testing.assert_array_equal(history.num_matvecs, full["num_matvecs"][:2])


def test_one_evaluation_for_each_trial():
    counter = Counter()

    def fn(y, args):
        return _logarithm(counter.tick(y), args)

    with counter.measure() as count:
        solution = run(fn, RECORDED, Y0, ARGS)
    counted = counters(solution)
    assert counted["num_rejected_steps"] > 0
    assert count.primal == counted["num_fn_evals"] == trials(solution)
    assert count.tangent == counted["num_matvecs"]
    assert count.transposed == 0


def test_preconditioner_counters():
    jacobi = nks.Jacobi(lambda y, args: args / y)
    solver = nks.NewtonKrylov(
        1e-9, 0.0, linear_solver=nks.GMRES(preconditioner=jacobi), history_length=24
    )
    solution = run(_logarithm, solver, Y0, ARGS)
    counted = counters(solution)
    assert reason(solution) == "residual_rtol"
    assert counted["num_preconditioner_updates"] == counted["num_steps"]
    # One application an iteration, and one for the solution of each solve.
    assert counted["num_preconditioner_applications"] == (
        counted["num_matvecs"] + counted["num_steps"]
    )


# --- the callback ----------------------------------------------------------------------------

REPORTS: list[nks.StepReport] = []


def test_one_report_for_each_trial():
    solver = nks.NewtonKrylov(1e-9, 0.0, history_length=24, verbose=REPORTS.append)
    REPORTS.clear()
    solution = run(_logarithm, solver, Y0, ARGS)
    jax.block_until_ready(solution.value)
    jax.effects_barrier()
    record, reports = rows(solution), sorted(REPORTS, key=lambda report: report.trial)
    assert [report.trial for report in reports] == list(range(trials(solution)))
    assert [report.reason for report in reports[:-1]] == [""] * (len(reports) - 1)
    assert reports[-1].reason == "residual_rtol"
    np.testing.assert_array_equal([r.norm for r in reports], record["norm"])
    np.testing.assert_array_equal([r.eta for r in reports], record["eta"])
    np.testing.assert_array_equal([r.num_matvecs for r in reports], record["num_matvecs"])
    np.testing.assert_array_equal([r.step_length for r in reports], record["step_length"])
    np.testing.assert_array_equal([r.accepted for r in reports], record["accepted"])


def test_verbose_prints_a_line_for_each_trial(capfd):
    solution = run(_logarithm, nks.NewtonKrylov(1e-9, 0.0, verbose=True), Y0, ARGS)
    jax.block_until_ready(solution.value)
    jax.effects_barrier()
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("trial")]
    assert len(lines) == trials(solution)
    assert sum("rejected" in line for line in lines) == counters(solution)["num_rejected_steps"]
    assert "residual_rtol" in lines[-1]


def _callbacks(solver):
    jaxpr = jax.make_jaxpr(lambda y: run(_logarithm, solver, y, ARGS).value)(Y0)
    return [eqn.primitive.name for eqn in walk(jaxpr) if "callback" in eqn.primitive.name]


def test_nothing_of_it_unless_asked_for():
    assert _callbacks(RECORDED) == []
    assert _callbacks(nks.NewtonKrylov(1e-9, 0.0, verbose=True)) != []


# --- the progress meter ----------------------------------------------------------------------


class Meter(eqxi.AbstractProgressMeter):
    """Collects the fractions that it is told."""

    seen: list = eqx.field(static=True)

    def init(self):
        return jnp.zeros(())

    def step(self, state, progress):
        jax.debug.callback(lambda x: self.seen.append(float(x)), progress)
        return progress

    def close(self, state):
        del state


def test_progress_goes_from_0_to_1():
    class Seen(list):
        __hash__ = object.__hash__

    meter = Meter(Seen())
    solution = run(_logarithm, nks.NewtonKrylov(1e-9, 0.0, progress_meter=meter), Y0, ARGS)
    jax.block_until_ready(solution.value)
    jax.effects_barrier()
    assert len(meter.seen) == trials(solution)
    assert meter.seen[0] == 0.0 and meter.seen[-1] == 1.0
    assert sorted(meter.seen) == meter.seen  # of the best point so far: it never goes back


@pytest.mark.parametrize("batched", [False, True], ids=["jit", "vmap"])
def test_text_meter(batched, capfd):
    solver = nks.NewtonKrylov(1e-9, 0.0, progress_meter=eqxi.TextProgressMeter())

    def solve(y):
        return run(_logarithm, solver, y, ARGS).value

    value = jax.jit(jax.vmap(solve) if batched else solve)(
        jnp.stack([Y0, Y0 / 2]) if batched else Y0
    )
    jax.block_until_ready(value)
    jax.effects_barrier()
    printed = capfd.readouterr().out.split()
    assert "0.00%" in printed and "100.00%" in printed
    np.testing.assert_allclose(value, jnp.ones_like(value), rtol=1e-8)

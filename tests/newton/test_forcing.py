"""Forcing terms against their formulas, alone and inside a solve."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.newton.forcing import Progress

from .solving import rows, run

GOLDEN = (1 + 5**0.5) / 2


def eta(rule, *, first=False, norm=1.0, previous=1.0, linear=0.0, eta=0.0, target=0.0) -> float:
    values = (norm, previous, linear, eta, target)
    progress = Progress(jnp.asarray(first), *(jnp.asarray(v, jnp.float64) for v in values))
    value, _ = rule.eta(progress, rule.init(np.dtype(np.float64)))
    assert value.shape == () and value.dtype == jnp.float64
    return float(value)


def test_constant_forcing_is_constant():
    rule = nks.ConstantForcing(0.03)
    assert eta(rule, first=True) == eta(rule, norm=7.0, previous=2.0, eta=0.5, target=0.9) == 0.03
    assert nks.ConstantForcing().value == 0.1
    assert eta(nks.ConstantForcing(0.0)) == 0.0


@pytest.mark.parametrize("rule", [nks.EisenstatWalker1, nks.EisenstatWalker2])
def test_first_value_is_eta_0(rule):
    # At the start the other norms mean nothing: not even NaN among them may come through.
    assert eta(rule(), first=True, norm=3.0, previous=np.inf, linear=np.nan) == 0.5
    assert eta(rule(eta_0=0.7), first=True) == 0.7
    assert eta(rule(eta_0=0.7, eta_max=0.2), first=True) == 0.2


@pytest.mark.parametrize("linear", [0.5, 2.5])
def test_choice_1_is_how_well_the_linear_model_predicted(linear):
    # |1 − linear|/10, whether the model was too high or too low
    expected = abs(1.0 - linear) / 10.0
    got = eta(nks.EisenstatWalker1(), norm=1.0, previous=10.0, linear=linear, eta=0.01)
    np.testing.assert_allclose(got, expected, rtol=1e-14)


def test_choice_1_safeguard():
    rule = nks.EisenstatWalker1()
    assert 0.2**GOLDEN < 0.1 < 0.3**GOLDEN  # below and above the threshold
    unguarded = eta(rule, norm=1.0, previous=100.0, linear=0.5, eta=0.2)
    np.testing.assert_allclose(unguarded, 0.005, rtol=1e-14)
    guarded = eta(rule, norm=1.0, previous=100.0, linear=0.5, eta=0.3)
    np.testing.assert_allclose(guarded, 0.3**GOLDEN, rtol=1e-14)
    # The safeguard is a floor: it does not lower what is above it.
    above = eta(rule, norm=8.0, previous=10.0, linear=0.0, eta=0.3)
    np.testing.assert_allclose(above, 0.8, rtol=1e-14)
    never = eta(nks.EisenstatWalker1(threshold=0.5), norm=1.0, previous=100.0, linear=0.5, eta=0.3)
    np.testing.assert_allclose(never, 0.005, rtol=1e-14)


def test_choice_2_is_the_ratio_of_norms():
    got = eta(nks.EisenstatWalker2(), norm=0.2, previous=2.0, eta=0.1)
    np.testing.assert_allclose(got, 0.9 * 0.1**2, rtol=1e-14)
    got = eta(nks.EisenstatWalker2(gamma=0.5, alpha=1.5), norm=0.2, previous=2.0, eta=0.1)
    np.testing.assert_allclose(got, 0.5 * 0.1**1.5, rtol=1e-14)


def test_choice_2_safeguard():
    rule = nks.EisenstatWalker2()
    assert 0.9 * 0.3**2 < 0.1 < 0.9 * 0.4**2
    np.testing.assert_allclose(eta(rule, norm=0.1, previous=1.0, eta=0.3), 0.009, rtol=1e-14)
    np.testing.assert_allclose(eta(rule, norm=0.1, previous=1.0, eta=0.4), 0.144, rtol=1e-14)
    np.testing.assert_allclose(eta(rule, norm=0.5, previous=1.0, eta=0.4), 0.225, rtol=1e-14)


@pytest.mark.parametrize("rule", [nks.EisenstatWalker1(), nks.EisenstatWalker2()])
def test_no_tighter_than_the_last_step_needs(rule):
    small = {"norm": 1e-6, "previous": 1.0, "linear": 1e-6, "eta": 0.1}
    assert eta(rule, **small) < 1e-10
    np.testing.assert_allclose(eta(rule, **small, target=0.3), 0.15, rtol=1e-14)
    # eta_max comes last: it holds whatever the guards say.
    assert eta(rule, **small, target=100.0) == 0.9
    assert eta(rule, norm=5.0, previous=1.0, eta=0.1) == 0.9


RULES = (
    nks.ConstantForcing(0.25),
    nks.EisenstatWalker1(),
    nks.EisenstatWalker1(eta_0=0.0, eta_max=0.3, threshold=0.01),
    nks.EisenstatWalker2(),
    nks.EisenstatWalker2(gamma=1.0, alpha=GOLDEN, eta_max=0.999),
)
positive = st.floats(1e-300, 1e300)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    rule=st.sampled_from(RULES),
    first=st.booleans(),
    norm=positive,
    previous=positive,
    linear=st.floats(0, 1e300),
    last=st.floats(0, 0.999),
    target=st.floats(0, 1e300),
)
def test_law_between_0_and_eta_max(rule, first, norm, previous, linear, last, target):
    largest = getattr(rule, "eta_max", 0.25)
    value = eta(
        rule, first=first, norm=norm, previous=previous, linear=linear, eta=last, target=target
    )
    assert 0 <= value <= largest < 1


@pytest.mark.parametrize(
    ("rule", "arguments"),
    [
        (nks.ConstantForcing, {"value": 1.0}),
        (nks.ConstantForcing, {"value": -0.1}),
        (nks.ConstantForcing, {"value": float("nan")}),
        (nks.EisenstatWalker1, {"eta_0": 1.0}),
        (nks.EisenstatWalker1, {"eta_max": 1.0}),
        (nks.EisenstatWalker1, {"eta_max": -0.1}),
        (nks.EisenstatWalker2, {"eta_0": -0.5}),
        (nks.EisenstatWalker2, {"eta_max": 1.5}),
        (nks.EisenstatWalker2, {"gamma": 1.1}),
        (nks.EisenstatWalker2, {"gamma": -0.1}),
        (nks.EisenstatWalker2, {"alpha": 1.0}),
        (nks.EisenstatWalker2, {"alpha": 2.5}),
    ],
)
def test_bad_arguments(rule, arguments):
    with pytest.raises(ValueError, match="must lie in"):
        rule(**arguments)


def _logarithm(y, args):
    return jnp.log(y)


def test_choice_1_in_a_solve():
    # One unknown: the linear solves are exact, so the model predicts (1−λ)‖F‖. The first step is
    # halved, since a full one leaves the domain.
    solver = nks.NewtonKrylov(1e-9, 0.0, forcing=nks.EisenstatWalker1(), history_length=16)
    record = rows(run(_logarithm, solver, jnp.array([3.0])))
    norms, lengths = record["norm"][record["accepted"]], record["step_length"][record["accepted"]]
    etas = record["eta"][record["accepted"]]
    assert lengths[1] == 0.5
    expected = [0.5]
    for k in range(1, len(norms) - 1):
        value = abs(norms[k] - (1 - lengths[k]) * norms[k - 1]) / norms[k - 1]
        floor = expected[-1] ** GOLDEN
        value = max(value, floor) if floor > 0.1 else value
        expected.append(min(0.9, max(value, 0.5 * 1e-9 * norms[0] / norms[k])))
    np.testing.assert_allclose(etas[:-1], expected, rtol=1e-6, atol=1e-12)
    assert np.isnan(etas[-1])


def test_choice_2_in_a_solve():
    solver = nks.NewtonKrylov(1e-9, 1e-10, history_length=16)
    record = rows(run(_logarithm, solver, jnp.array([3.0])))
    norms, etas = record["norm"][record["accepted"]], record["eta"][record["accepted"]]
    expected = [0.5]
    for k in range(1, len(norms) - 1):
        value, floor = 0.9 * (norms[k] / norms[k - 1]) ** 2, 0.9 * expected[-1] ** 2
        value = max(value, floor) if floor > 0.1 else value
        expected.append(min(0.9, max(value, 0.5 * (1e-10 + 1e-9 * norms[0]) / norms[k])))
    np.testing.assert_allclose(etas[:-1], expected, rtol=1e-10)


def _bent(y, args):
    matrix, b, bend = args
    return b + matrix @ y + bend * jnp.sum(y * y)


def test_choice_1_after_a_shortened_inexact_step():
    """The model is that of the step taken: ‖F + λ J d‖, here with one GMRES iteration for d."""
    matrix, b = np.asarray([[1.0, 0.6], [-0.7, 0.8]]), np.asarray([1.0, 0.4])
    args = (jnp.asarray(matrix), jnp.asarray(b), jnp.asarray(2.0))
    solver = nks.NewtonKrylov(
        1e-6,
        0.0,
        linear_solver=nks.GMRES(restart=1, max_steps=1),
        forcing=nks.EisenstatWalker1(threshold=0.99),  # no safeguard
        history_length=16,
    )
    record = rows(run(_bent, solver, jnp.zeros(2), args, max_steps=10))
    norms, lengths = record["norm"][record["accepted"]], record["step_length"][record["accepted"]]
    assert lengths[1] < 1
    image = matrix @ b
    direction = -(image @ b) / (image @ image) * b
    model = np.linalg.norm(b + lengths[1] * matrix @ direction)
    expected = abs(norms[1] - model) / norms[0]
    np.testing.assert_allclose(record["eta"][record["accepted"]][1], expected, rtol=1e-9)

"""Line searches against references written from the papers' formulas, in plain NumPy."""

import math

import hypothesis
import hypothesis.strategies as st
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.newton.state import Direction

from .solving import all_finite, reason, rows, run

ALPHA = 1e-4


# --- references: the next λ, from all trials (λ, ‖F‖) of this search so far ------------------


def petsc_bt(trials, norm, slope):
    """PETSc's `bt`, order 3; f = ½‖F‖², slope = FᵀJd. NaN halves λ, and starts the fit anew."""
    length, value = trials[-1][0], 0.5 * trials[-1][1] ** 2
    if not math.isfinite(value):
        return 0.5 * length
    f = 0.5 * norm**2
    excess = value - f - length * slope
    previous = trials[-2] if len(trials) > 1 and math.isfinite(trials[-2][1]) else None
    if previous is None:
        proposal = -slope * length**2 / (2 * excess)
    else:
        before, g = previous[0], 0.5 * previous[1] ** 2
        t1, t2 = excess, g - f - before * slope
        a = (t1 / length**2 - t2 / before**2) / (length - before)
        b = (-before * t1 / length**2 + length * t2 / before**2) / (length - before)
        d = max(0.0, b**2 - 3 * a * slope)
        proposal = -slope / (2 * b) if a == 0 else (-b + math.sqrt(d)) / (3 * a)
    return min(max(proposal, 0.1 * length), 0.5 * length)


def parab3p(trials, norm, slope):
    """Kelley's three-point parabola in ‖F‖²; the first reduction halves."""
    del slope
    length, ffc = trials[-1][0], trials[-1][1] ** 2
    if len(trials) == 1 or not math.isfinite(ffc) or not math.isfinite(trials[-2][1]):
        return 0.5 * length
    before, ffm, ff0 = trials[-2][0], trials[-2][1] ** 2, norm**2
    c2 = before * (ffc - ff0) - length * (ffm - ff0)
    if c2 >= 0:
        return 0.1 * length
    c1 = length**2 * (ffm - ff0) - before**2 * (ffc - ff0)
    return min(max(-c1 / (2 * c2), 0.1 * length), 0.5 * length)


def accepts_bt(length, value, norm, slope):
    return 0.5 * value**2 - 0.5 * norm**2 - ALPHA * length * slope


def accepts_parabolic(length, value, norm, slope):
    return value - (1 - ALPHA * length) * norm


SEARCHES = {
    "bt": (nks.Backtracking(), petsc_bt, accepts_bt),
    "parab3p": (nks.Parabolic(), parab3p, accepts_parabolic),
}


# --- the search by itself --------------------------------------------------------------------


def drive(search, merit, slope=-1.0):
    """Runs a search on φ = merit(λ), ‖F(y)‖ = 1: the trials, and whether it ended in acceptance."""
    one, none = jnp.ones(()), jnp.zeros((1,))
    direction = Direction(none, jnp.asarray(slope), 0 * one, 0 * one)
    model = nks.Model(lx.IdentityLinearOperator(none), none, one, direction, None, 0, one > 0)
    state, trials = search.start(model, search.init(none, one, None)), []
    while True:
        length = float(search.step_length(state))
        np.testing.assert_allclose(search.displacement(state, jnp.asarray([2.0])), [2 * length])
        trials.append((length, merit(length)))
        judgement = search.judge(state, nks.Trial(none, none, jnp.asarray(merit(length)), none))
        assert not (judgement.accepted and judgement.failed)
        if judgement.accepted or judgement.failed:
            return trials, bool(judgement.accepted)
        state = judgement.state


def assert_follows(trials, accepted, name, slope=-1.0, norm=1.0, rtol=1e-9):
    """Each λ is the reference's, and exactly the last trial is accepted, if any."""
    _, reference, excess = SEARCHES[name]
    assert trials[0][0] == 1.0
    for k, (length, value) in enumerate(trials):
        ok = math.isfinite(value) and excess(length, value, norm, slope) <= 0
        close = math.isfinite(value) and abs(excess(length, value, norm, slope)) < 1e-12 * norm
        assert close or ok == (accepted and k == len(trials) - 1)
        if k > 0:
            np.testing.assert_allclose(length, reference(trials[:k], norm, slope), rtol=rtol)


def test_hand_computed_quadratic_then_cubic():
    # φ² = 5 at λ = 1: λ = ½·1·1/(½(5 − 1) + 1) = 1/6.
    values = {1.0: 5.0**0.5}
    trials, _ = drive(nks.Backtracking(), lambda x: values.get(x, 2.0**0.5 if x > 0.1 else 0.5))
    np.testing.assert_allclose(trials[1][0], 1 / 6, rtol=1e-14)
    # t₁ = ½ + 1/6, t₂ = 3; a = (24 − 3)/(1/6 − 1), b = (−24 + 3/6)/(1/6 − 1)
    a, b = (24 - 3) / (1 / 6 - 1), (-24 + 0.5) / (1 / 6 - 1)
    cubic = (-b + math.sqrt(b**2 + 3 * a)) / (3 * a)
    np.testing.assert_allclose(trials[2][0], np.clip(cubic, 1 / 60, 1 / 12), rtol=1e-12)
    assert len(trials) == 3


def test_hand_computed_parabola():
    values = {1.0: 2.0, 0.5: 1.5}
    trials, accepted = drive(nks.Parabolic(), lambda x: values.get(x, 0.9))
    # c₂ = 1·(2.25 − 1) − ½(4 − 1) = −¼, c₁ = ¼·3 − 1·1.25 = −½: λ = −c₁/2c₂ < 0.1 λ
    assert [x for x, _ in trials] == [1.0, 0.5, 0.05]
    assert accepted


@pytest.mark.parametrize("name", SEARCHES)
def test_reductions_are_clipped(name):
    steep, _ = drive(SEARCHES[name][0], lambda x: 1 + 1e6 * x**2)
    flat, _ = drive(SEARCHES[name][0], lambda x: (1 - 1e-4) ** 0.5 if x > 0.5 else 1.0)
    for trials in (steep, flat):
        lengths = np.asarray([x for x, _ in trials])
        ratios = lengths[1:] / lengths[:-1]
        assert np.all(ratios >= 0.1 - 1e-12) and np.all(ratios <= 0.5 + 1e-12)
    assert flat[1][0] == 0.5  # where the quadratic has its minimum a little beyond
    assert steep[1][0] == (0.1 if name == "bt" else 0.5)


def test_backtracking_starts_the_fit_anew_after_nan():
    trials, _ = drive(nks.Backtracking(), lambda x: np.nan if x > 0.6 else 3.0 if x > 0.4 else 0.0)
    assert trials[1][0] == 0.5
    np.testing.assert_allclose(trials[2][0], petsc_bt(trials[:2], 1.0, -1.0), rtol=1e-12)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_halves_until_finite(name, bad):
    search = SEARCHES[name][0]
    trials, accepted = drive(search, lambda x: bad if x > 0.2 else 1 - 0.5 * x)
    assert [x for x, _ in trials] == [1.0, 0.5, 0.25, 0.125]
    assert accepted


@pytest.mark.parametrize("name", SEARCHES)
def test_not_finite_is_never_accepted(name):
    trials, accepted = drive(SEARCHES[name][0], lambda x: np.nan)
    assert not accepted
    assert len(trials) <= 40
    np.testing.assert_allclose([x for x, _ in trials], 0.5 ** np.arange(len(trials)))


@pytest.mark.parametrize("name", SEARCHES)
def test_acceptance_is_sufficient_decrease(name):
    search = SEARCHES[name][0]
    # At λ = 1 with slope −1: ½φ² ≤ ½ − α, φ ≤ 1 − α: to first order the same bound on φ.
    bound = (1 - 2 * ALPHA) ** 0.5 if name == "bt" else 1 - ALPHA
    assert len(drive(search, lambda x: bound - 1e-12 if x == 1 else 0.0)[0]) == 1
    assert len(drive(search, lambda x: bound + 1e-12 if x == 1 else 0.0)[0]) == 2
    assert len(drive(search, lambda x: 1.0 if x == 1 else 0.0)[0]) == 2


def test_backtracking_asks_less_of_a_flat_slope():
    value = (1 - 2 * ALPHA * 0.5) ** 0.5  # enough for slope −½, not for −1
    search = nks.Backtracking()
    assert len(drive(search, lambda x: value - 1e-12 if x == 1 else 0.0, slope=-0.5)[0]) == 1
    assert len(drive(search, lambda x: value - 1e-12 if x == 1 else 0.0, slope=-1.0)[0]) == 2


@pytest.mark.parametrize("kind", [nks.Backtracking, nks.Parabolic])
def test_fails_after_max_trials_or_below_min_length(kind):
    trials, accepted = drive(kind(max_trials=3), lambda x: 2.0)
    assert (len(trials), accepted) == (3, False)
    trials, accepted = drive(kind(max_trials=1000, min_length=1e-3), lambda x: 1 + x)
    assert not accepted
    assert min(x for x, _ in trials) >= 1e-3 > 0.1 * trials[-1][0]
    trials, accepted = drive(kind(alpha=0.9), lambda x: 1 - 0.5 * x)
    assert not accepted  # a tenth of the decrease predicted is not enough for this one


def test_full_step_takes_anything_finite():
    for value in (0.0, 1.0, 1e300):
        assert drive(nks.FullStep(), lambda x: value) == ([(1.0, value)], True)
    for value in (np.nan, np.inf):
        trials, accepted = drive(nks.FullStep(), lambda x: value)
        assert (len(trials), accepted) == (1, False)


merits = st.tuples(st.floats(-3, 30), st.floats(-30, 30), st.floats(0, 30), st.floats(1, 20))


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    name=st.sampled_from(sorted(SEARCHES)), slope=st.floats(-1, -1e-3), coefficients=merits
)
def test_follows_the_reference(name, slope, coefficients):
    c2, c3, a, w = coefficients

    def merit(x):
        square = 1 + 2 * slope * x + c2 * x**2 + c3 * x**3 + a * (1 - math.cos(w * x))
        return math.sqrt(abs(square))

    trials, accepted = drive(SEARCHES[name][0], merit, slope)
    assert_follows(trials, accepted, name, slope)


# --- the search inside a solve ---------------------------------------------------------------


def _along(y, args):
    """F(0) = 1, J(0) = −1: the first direction is 1, so λ is y. `lie` spoils the Jacobian."""
    c2, c3, a, w, lie, wall = args
    value = 1 - y + c2 * y**2 + c3 * y**3 + a * (1 - jnp.cos(w * y)) + lie * lax.stop_gradient(y)
    return jnp.where((y > wall) & (y > 0), jnp.nan, value)


SOLVERS = {
    name: nks.NewtonKrylov(1e-6, 0.0, globalisation=search, history_length=48)
    for name, (search, _, _) in SEARCHES.items()
}


def first_search(name, c2=0.0, c3=0.0, a=0.0, w=1.0, lie=0.0, wall=np.inf):
    args = tuple(jnp.asarray(float(x)) for x in (c2, c3, a, w, lie, wall))
    solution = run(_along, SOLVERS[name], jnp.zeros(1), args, max_steps=45)
    record = rows(solution)
    accepted = record["accepted"]
    assert accepted[0] and record["norm"][0] == 1.0 and record["step_length"][0] == 0.0
    end = next((k for k in range(1, len(accepted)) if accepted[k]), len(accepted) - 1)
    pairs = zip(record["step_length"][1 : end + 1], record["norm"][1 : end + 1], strict=True)
    return [(float(x), float(v)) for x, v in pairs], bool(accepted[end]), solution


@pytest.mark.parametrize("name", SEARCHES)
@hypothesis.settings(max_examples=20)
@hypothesis.given(c2=st.floats(-3, 300), c3=st.floats(-30, 30), a=st.floats(0, 30))
def test_solve_follows_the_reference(name, c2, c3, a):
    trials, accepted, solution = first_search(name, c2, c3, a, 9.0)
    assert_follows(trials, accepted, name, rtol=1e-6)
    assert all_finite(solution.value)


@pytest.mark.parametrize("name", SEARCHES)
def test_solve_steps_back_from_nan(name):
    trials, accepted, solution = first_search(name, wall=0.3)
    assert [x for x, _ in trials] == [1.0, 0.5, 0.25]
    assert np.isnan(trials[0][1]) and np.isnan(trials[1][1]) and accepted
    assert all_finite(solution.value) and float(solution.value[0]) <= 0.3


@pytest.mark.parametrize("name", SEARCHES)
def test_failed_search_in_a_solve(name):
    trials, accepted, solution = first_search(name, lie=6.0)
    assert not accepted
    assert reason(solution) == "line_search_failed"
    assert_follows(trials, accepted, name, rtol=1e-6)
    np.testing.assert_array_equal(solution.value, [0.0])
    assert float(solution.stats["residual_norm"]) == 1.0


def _bent(y, args):
    matrix, b, bend = args
    return b + matrix @ y + bend * jnp.sum(y * y)


ONE_ITERATION = nks.NewtonKrylov(
    1e-6, 0.0, linear_solver=nks.GMRES(restart=1, max_steps=1), history_length=48
)


@hypothesis.settings(max_examples=15)
@hypothesis.given(seed=st.integers(0, 10**6), bend=st.floats(0.5, 50))
def test_slope_of_an_inexact_direction(seed, bend):
    """One GMRES iteration: d = −c F with c = ⟨AF, F⟩/‖AF‖², and FᵀAd = −⟨AF, F⟩²/‖AF‖²."""
    rng = np.random.default_rng(seed)
    matrix, b = np.eye(2) + rng.uniform(-0.9, 0.9, (2, 2)), rng.normal(size=2)
    image = matrix @ b
    slope = -((image @ b) ** 2) / (image @ image)
    hypothesis.assume(-slope > 0.01 * (b @ b))
    args = (jnp.asarray(matrix), jnp.asarray(b), jnp.asarray(bend))
    record = rows(run(_bent, ONE_ITERATION, jnp.zeros(2), args, max_steps=45))
    direction = -(image @ b) / (image @ image) * b
    accepted = record["accepted"]
    end = next((k for k in range(1, len(accepted)) if accepted[k]), len(accepted) - 1)
    trials = []
    for k in range(1, end + 1):
        length, value = float(record["step_length"][k]), float(record["norm"][k])
        y = length * direction
        by_hand = np.linalg.norm(b + matrix @ y + bend * (y @ y))
        np.testing.assert_allclose(value, by_hand, rtol=1e-9)
        trials.append((length, value))
    assert_follows(trials, bool(accepted[end]), "bt", slope, np.linalg.norm(b), rtol=1e-6)

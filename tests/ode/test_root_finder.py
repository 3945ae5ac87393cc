"""Diffrax's own implicit solvers with StageNewtonKrylov: step counts, work, spaces and failures."""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from nksolve.ode.newton import SimplifiedNewton
from nksolve.ode.root_finder import StageNewtonKrylov
from nksolve.problems import stiff
from tests.helpers import square_values
from tests.helpers.counting import Counter

GMRES = nks.GMRES()
ROBER = stiff.rober(40.0)
# SciPy's Radau at rtol = 1e-12.
ROBER_END = np.array([0.7158270687194, 9.185534764558e-06, 0.2841637457458])


def tight(rtol=1e-10):
    """Newton's method, linearised anew at each iteration, with dense LU."""
    finder = optx.Newton(rtol=rtol, atol=rtol, linear_solver=lx.LU())
    return dict(root_finder=finder, root_find_max_steps=50)


def solve(problem, solver, rtol, y0=None, fn=None, **keywords):
    controller = dfx.PIDController(rtol=rtol, atol=problem.atol_factor * rtol, **keywords)
    return dfx.diffeqsolve(
        dfx.ODETerm(problem.fn if fn is None else fn),
        solver,
        *problem.span,
        None,
        problem.y0 if y0 is None else y0,
        args=problem.args,
        stepsize_controller=controller,
        max_steps=4000,
    )


@functools.cache
def counts(name, kind, rtol, method):
    """(accepted, rejected) steps and the end."""
    finders = {
        "tight": tight,
        "auto": lambda: dict(root_finder=StageNewtonKrylov()),
        "gmres": lambda: dict(root_finder=StageNewtonKrylov(linear_solver=GMRES)),
        "default": lambda: {},
    }
    problem, keywords = {
        "line": lambda: (stiff.brusselator_1d(20), {}),
        "square": lambda: (
            stiff.brusselator_2d(8),
            dict(pcoeff=0.3, icoeff=0.3, jump_ts=[1.1]),
        ),
    }[name]()
    solver = method(**finders[kind]())
    out = jax.jit(lambda y0: solve(problem, solver, rtol, y0, **keywords))(problem.y0)
    stats = out.stats
    return int(stats["num_accepted_steps"]), int(stats["num_rejected_steps"]), out.ys[0]


@pytest.mark.parametrize("kind", ["auto", "gmres"])
def test_step_counts_on_a_line_are_those_of_tight_stages(kind):
    accepted, rejected, end = counts("line", kind, 1e-6, dfx.Kvaerno5)
    expected = counts("line", "tight", 1e-6, dfx.Kvaerno5)
    assert abs(accepted - expected[0]) <= 1 and abs(rejected - expected[1]) <= 1
    np.testing.assert_allclose(end, expected[2], rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rtol", [1e-5, 1e-6])
def test_step_counts_in_the_plane_are_those_of_tight_stages(rtol):
    expected = counts("square", "tight", rtol, dfx.Kvaerno5)
    for kind in ("auto", "gmres"):
        accepted, rejected, end = counts("square", kind, rtol, dfx.Kvaerno5)
        # Tight stages take as many, give or take, and reject some more.
        assert accepted + rejected <= 1.1 * (expected[0] + expected[1])
        assert rejected <= expected[1] + 2
        np.testing.assert_allclose(end, stiff.brusselator_2d(8).end, rtol=50 * rtol)


@pytest.mark.slow
def test_the_default_of_diffrax_rejects_half_of_its_steps():
    accepted, rejected, _ = counts("line", "default", 1e-6, dfx.Kvaerno5)
    assert rejected > 0.8 * accepted
    ours = counts("line", "auto", 1e-6, dfx.Kvaerno5)
    assert ours[0] + ours[1] < 0.2 * (accepted + rejected)


# --- every solver ----------------------------------------------------------------------------


def _error(method):
    """The end of Rober at t = 40 against the reference, in units of the tolerance."""
    rtol = 1e-4
    solver = method(root_finder=StageNewtonKrylov())
    if method in (dfx.KenCarp3, dfx.KenCarp4, dfx.KenCarp5, dfx.Sil3):
        # The slow reaction is explicit.
        fast = lambda t, y, k: stiff._rober(t, y, k * jnp.array([0.0, 1.0, 1.0]))
        slow = lambda t, y, k: stiff._rober(t, y, k * jnp.array([1.0, 0.0, 0.0]))
        terms = dfx.MultiTerm(dfx.ODETerm(slow), dfx.ODETerm(fast))
    else:
        terms = dfx.ODETerm(ROBER.fn)

    @jax.jit
    def run(y0):
        controller = dfx.PIDController(rtol=rtol, atol=1e-6 * rtol)
        return dfx.diffeqsolve(
            terms,
            solver,
            0.0,
            40.0,
            1e-5,
            y0,
            args=ROBER.args,
            stepsize_controller=controller,
            max_steps=100_000,
        )

    solution = run(ROBER.y0)
    error = np.abs(solution.ys[0] - ROBER_END) / (rtol * ROBER_END)
    return error.max(), solution.stats


@pytest.mark.parametrize(
    "method",
    [
        dfx.Kvaerno3,
        dfx.KenCarp3,
        dfx.ImplicitEuler,
        *(
            pytest.param(method, marks=pytest.mark.slow)
            for method in (dfx.Kvaerno4, dfx.Kvaerno5, dfx.KenCarp4, dfx.KenCarp5, dfx.Sil3)
        ),
    ],
)
def test_every_implicit_solver(method):
    error, stats = _error(method)
    # First order accumulates the errors of many steps.
    assert error < (2000 if method is dfx.ImplicitEuler else 20)
    assert stats["num_rejected_steps"] <= 0.2 * stats["num_accepted_steps"]


# --- one linearisation and one preconditioner for the stages of a step ------------------------


def test_one_linearisation_and_one_preconditioner_a_step():
    evaluations, setups, norms = Counter(), Counter(), Counter()
    problem = stiff.brusselator_1d(5)

    def fn(t, y, args):
        return problem.fn(t, evaluations.tick(y), args)

    def diagonal(z, stage):
        # Of I − hγJ, roughly.
        z = setups.tick(z)
        gamma = stage.gamma
        return jnp.ones_like(z) + gamma * (4.0 + 2 * 0.02 * 36)

    def norm(x):
        return optx.rms_norm(norms.tick(x))

    solver = nks.GMRES(preconditioner=nks.Jacobi(diagonal))
    finder = StageNewtonKrylov(1e-6, 1e-6, norm, linear_solver=solver)
    run = jax.jit(lambda y0: solve(problem, dfx.Kvaerno3(root_finder=finder), 1e-6, y0, fn))
    run(problem.y0)
    with evaluations.measure() as made, setups.measure() as set_up, norms.measure() as measured:
        solution = run(problem.y0)
    steps = int(solution.stats["num_steps"])
    iterations = measured.primal // 2  # of the correction, and of y
    assert set_up.primal == steps
    assert made.primal == steps + iterations
    assert 3 * steps <= iterations < 12 * steps
    assert made.tangent > 0


def test_no_square_value_with_a_krylov_method():
    problem = stiff.brusselator_1d(67)

    def run(fields):
        y0 = jnp.stack([fields, 4.0 - fields], axis=1)
        return solve(problem, dfx.Kvaerno5(root_finder=finder), 1e-6, y0).ys

    finder = StageNewtonKrylov(linear_solver=GMRES)
    assert square_values(jax.make_jaxpr(run)(jnp.ones(67)), 67) == []
    assert square_values(jax.make_jaxpr(run)(jnp.ones(67)), 134) == []


# --- states, tolerances, batches --------------------------------------------------------------


def _decay(t, y, rates):
    """Two leaves that pull each other, float32 as given."""
    del t
    a, b = y["a"], y["b"]
    return {"a": rates * (jnp.cos(b) - a), "b": jnp.sum(a) - 3.0 * b}


def test_float32_trees_in_a_batch_are_as_if_alone():
    rates = jnp.array([[1.0, 30.0, 900.0], [2.0, 5.0, 9.0]], jnp.float32)
    y0 = {"a": jnp.zeros(3, jnp.float32), "b": jnp.ones((), jnp.float32)}
    times = jnp.array([0.0, 2.0, 0.01], jnp.float32)
    finder = dfx.with_stepsize_controller_tols(StageNewtonKrylov)(linear_solver=GMRES)

    def run(rates):
        return dfx.diffeqsolve(
            dfx.ODETerm(_decay),
            dfx.Kvaerno3(root_finder=finder),
            *times,
            y0,
            args=rates,
            stepsize_controller=dfx.PIDController(rtol=1e-4, atol=1e-4),
        )

    batch = jax.jit(jax.vmap(run))(rates)
    alone = jax.jit(run)
    for i in range(2):
        single = alone(rates[i])
        for name in ("num_steps", "num_rejected_steps"):
            assert batch.stats[name][i] == single.stats[name]
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5), batch.ys, single.ys
        )
        assert single.ys["a"].dtype == jnp.float32
        assert single.stats["num_rejected_steps"] <= 3
    assert batch.stats["num_steps"][0] != batch.stats["num_steps"][1]
    # a = cos b and Σa = 3 b at rest.
    np.testing.assert_allclose(batch.ys["a"][0, 0, 2], jnp.cos(batch.ys["b"][0, 0]), atol=1e-2)


@pytest.mark.filterwarnings("ignore:Complex :UserWarning")
def test_complex_states_with_conjugates():
    """y' = −20 y + 6i ȳ, of which the real and imaginary parts are a linear system."""
    y0 = jnp.array([1.0 + 2.0j])
    finder = StageNewtonKrylov(linear_solver=GMRES)
    run = jax.jit(
        lambda y0: dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -20.0 * y + 6.0j * jnp.conj(y)),
            dfx.Kvaerno3(root_finder=finder),
            0.0,
            0.5,
            0.01,
            y0,
            stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-9),
        )
    )
    solution = run(y0)
    matrix = np.array([[-20.0, 6.0], [6.0, -20.0]])
    values, vectors = np.linalg.eigh(matrix)
    x = vectors @ (np.exp(0.5 * values) * (vectors.T @ np.array([1.0, 2.0])))
    np.testing.assert_allclose(solution.ys[0, 0], x[0] + 1j * x[1], rtol=1e-4)
    assert solution.stats["num_rejected_steps"] <= 2


class Expensive(dfx.ODETerm):
    """Makes Diffrax solve for increments in the place of slopes."""

    def is_vf_expensive(self, t0, t1, y, args):
        del t0, t1, y, args
        return True


def _matrix_field(t, y, args):
    """Slopes against two controls, of which the first moves as 2 t and the second as t²."""
    del t, args
    return jnp.stack([-0.5 * (y - jnp.cos(y[::-1])), 0.1 * y], axis=1)


def _path(t0, t1):
    return jnp.stack([2.0 * (t1 - t0), t1**2 - t0**2])


def _rewritten(t, y, args):
    del args
    return -(y - jnp.cos(y[::-1])) + 0.2 * t * y


def test_every_unknown_of_diffrax_at_constant_steps():
    y0 = jnp.array([1.0, 2.0, -1.0])
    finder = StageNewtonKrylov.alone(1e-10, 1e-10, linear_solver=GMRES)
    terms = {
        "slope": dfx.ODETerm(_rewritten),
        "increment": Expensive(_rewritten),
    }

    def run(term, finder):
        solver = dfx.Kvaerno3(root_finder=finder)
        return dfx.diffeqsolve(term, solver, 0.0, 1.0, 0.125, y0).ys[0]

    ends = {name: jax.jit(lambda t=t: run(t, finder))() for name, t in terms.items()}
    expected = jax.jit(lambda: run(terms["slope"], tight(1e-12)["root_finder"]))()
    for end in ends.values():
        np.testing.assert_allclose(end, expected, rtol=1e-9)

    # Slopes that are matrices, and a control that is a vector: no division undoes that product.
    path = dfx.ControlTerm(_matrix_field, _Path())
    end = jax.jit(lambda: run(path, finder))()
    other = jax.jit(lambda: run(path, tight(1e-12)["root_finder"]))()
    np.testing.assert_allclose(end, other, rtol=1e-8)
    np.testing.assert_allclose(end, expected, rtol=1e-2)


class _Path(dfx.AbstractPath):
    @property
    def t0(self):
        return 0.0

    @property
    def t1(self):
        return 1.0

    def evaluate(self, t0, t1=None, left=True):
        del left
        return _path(t0, t1)


# --- derivatives ------------------------------------------------------------------------------


def _end(rates, adjoint, root):
    problem = stiff.rober(0.5)
    return dfx.diffeqsolve(
        dfx.ODETerm(problem.fn),
        dfx.Kvaerno3(**root),
        *problem.span,
        0.01,
        problem.y0,
        args=rates,
        stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-8),
        adjoint=adjoint,
        max_steps=64,
    ).ys[0]


OURS = dict(root_finder=StageNewtonKrylov(linear_solver=GMRES, kappa=1e-6), root_find_max_steps=20)


@pytest.mark.slow
def test_derivatives_are_those_of_diffrax():
    rates = ROBER.args
    weights = jnp.array([1.0, 1e4, -1.0])
    value = lambda rates, root: weights @ _end(rates, dfx.RecursiveCheckpointAdjoint(), root)
    ours = jax.jit(jax.grad(lambda k: value(k, OURS)))(rates)
    theirs = jax.jit(jax.grad(lambda k: value(k, tight(1e-12))))(rates)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)

    tangent = jnp.array([0.01, 1e5, -1e3])
    forward = lambda root: jax.jit(
        lambda k: jax.jvp(lambda k: weights @ _end(k, dfx.ForwardMode(), root), (k,), (tangent,))
    )(rates)
    (end, slope), (expected, expected_slope) = forward(OURS), forward(tight(1e-12))
    np.testing.assert_allclose(end, expected, rtol=1e-7)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-5)
    np.testing.assert_allclose(slope, jnp.sum(ours * tangent), rtol=1e-5)


# --- one stage, without an integrator ----------------------------------------------------------

STAGE = dict(rtol=1e-6, atol=1e-6, norm=optx.rms_norm, linear_solver=GMRES)


def stage_args(vf_prod, base, diagonal=0.5):
    """As Diffrax hands them over for increments."""
    return jnp.array(1), jnp.asarray(diagonal), vf_prod, jnp.array(0.0), base, None, jnp.array(1.0)


def residual(k, args):
    _, diagonal, vf_prod, t, base, extra, control = args
    return k - vf_prod(t, base + diagonal * k, extra, control)


def solved(vf_prod, base, guess, finder, options=None):
    args = stage_args(vf_prod, base)
    return optx.root_find(residual, finder, guess, args, options=options, throw=False, max_steps=10)


def test_slow_is_not_diverged():
    base = jnp.array([0.1, 0.2])
    field = lambda t, z, args, h: h * (-(z**3) - z)
    finder = StageNewtonKrylov(**STAGE)

    def run(far):
        # A linearisation that is off, so that each iteration gains a factor of about ten.
        at = jnp.full(2, far)
        state = finder.init(residual, at, stage_args(field, base), {}, None, None, frozenset())
        return solved(field, base, jnp.zeros(2), finder, {"init_state": state})

    out = run(0.4)
    assert out.result == optx.RESULTS.successful
    assert 4 <= out.stats["num_steps"] <= 10
    exact = solved(field, base, jnp.zeros(2), tight(1e-13)["root_finder"]).value
    assert jnp.max(jnp.abs(out.value - exact)) < 1e-2 * 2e-6
    # So far off that ten iterations would not do: given up before they are made.
    hopeless = run(1.5)
    assert hopeless.result == optx.RESULTS.nonlinear_divergence
    assert hopeless.stats["num_steps"] < 6 and jnp.all(hopeless.value == 0.0)


def test_diverged_and_not_finite():
    base = jnp.array([0.1, 0.2])
    finder = StageNewtonKrylov(**STAGE)
    steep = lambda t, z, args, h: h * 40.0 * jnp.sin(9.0 * z)
    out = solved(steep, base, jnp.zeros(2), finder)
    assert out.result == optx.RESULTS.nonlinear_divergence
    root = lambda t, z, args, h: h * -jnp.sqrt(z - 1.0)
    out = solved(root, base, jnp.zeros(2), finder)
    assert out.result != optx.RESULTS.successful
    assert jnp.all(jnp.isfinite(out.value)) and out.stats["num_steps"] <= 2


def test_an_explicit_stage_takes_one_iteration():
    base = jnp.array([0.1, 0.2])
    field = lambda t, z, args, h: h * jnp.exp(z)
    args = stage_args(field, base, 0.0)
    finder = StageNewtonKrylov(**STAGE)
    out = optx.root_find(residual, finder, jnp.zeros(2), args)
    assert out.stats["num_steps"] == 1
    np.testing.assert_allclose(out.value, jnp.exp(base), rtol=1e-15)


def test_refused():
    with pytest.raises(TypeError, match=r"nks\.root_find"):
        optx.root_find(lambda y, _: y**2 - 2.0, StageNewtonKrylov(**STAGE), jnp.ones(2))
    with pytest.raises(ValueError, match=r"alone\(\)"):
        optx.root_find(
            residual,
            StageNewtonKrylov(),
            jnp.zeros(2),
            stage_args(lambda t, z, args, h: -z, jnp.ones(2)),
        )
    with pytest.raises(ValueError, match="kappa"):
        StageNewtonKrylov(kappa=-1.0)
    assert StageNewtonKrylov.alone().rtol == SimplifiedNewton.alone().rtol

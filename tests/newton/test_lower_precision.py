"""Krylov solves in float32 inside a float64 Newton."""

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.linearise.lower import working
from nksolve.problems import get
from tests.helpers.counting import Counter

from .solving import counters, reason, run, trials

LOW = nks.LowerPrecision()
BRATU, FOOD_WEB, H = get("bratu", n=15), get("food-web", mx=4), get("chandrasekhar", n=16)


def _flat(vector):
    return np.concatenate([np.ravel(np.asarray(x)) for x in jtu.tree_leaves(vector)])


def _control_flow(y, a):
    c, out = lax.scan(lambda c, x: (jnp.tanh(c * x) + a, c**2), y, jnp.arange(1.0, 5.0))
    c = lax.fori_loop(0, 3, lambda _, c: c * jnp.sin(c), c)
    c = lax.cond(a > 0, lambda c: c**2, lambda c: c**3, c)
    solved = jnp.linalg.solve(2 * jnp.eye(7) + jnp.outer(y, y), y)
    return c + out.sum(0) + jnp.fft.irfft(2.0 * jnp.fft.rfft(y), 7) + solved + jnp.cumsum(y)


def _module(y, args):
    return {"a": jnp.tanh(args @ y["a"]) + y["b"], "b": y["b"] ** 3 * y["a"].sum()}


def _complex(y, args):
    return args * y + jnp.roll(y, 1) * y


CASES = {
    "bratu": (BRATU.fn, BRATU.y0 + 0.3, BRATU.args),
    "food web": (FOOD_WEB.fn, 1.1 * FOOD_WEB.y0, FOOD_WEB.args),
    "control flow": (_control_flow, jnp.linspace(0.1, 1.0, 7), jnp.array(0.3)),
    "tree": (_module, {"a": jnp.arange(3.0), "b": jnp.ones(3)}, jnp.eye(3) + 0.1),
    "complex": (_complex, jnp.asarray(np.arange(5.0) + 1j), jnp.array(2.0 - 1j)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_map_is_the_same_and_nothing_in_it_is_wide(case):
    fn, y, args = CASES[case]
    wide = nks.linearise(fn, y, args, policy=LOW).operator
    low = working(wide)
    rng = np.random.default_rng(3)
    v = jtu.tree_map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), y)
    small = jtu.tree_map(lambda x, s: x.astype(s.dtype), v, low.in_structure())
    for ours, theirs in ((low, wide), (low.transpose(), wide.transpose())):
        text = str(jax.make_jaxpr(ours.mv)(small))
        assert "f64" not in text and "c128" not in text
        out, exact = _flat(ours.mv(small)), _flat(theirs.mv(v))
        assert out.dtype in (np.float32, np.complex64)
        np.testing.assert_allclose(out, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("problem", [BRATU, H], ids=lambda p: p.name)
def test_newton_reaches_tolerances_that_float32_does_not(problem):
    counter = Counter()
    fn = lambda y, args: problem.fn(counter.tick(y), args)
    solver = nks.NewtonKrylov(rtol=1e-12, atol=0.0, policy=LOW)
    with counter.measure() as count:
        solution = run(fn, solver, problem.y0, problem.args)
    exact = run(problem.fn, nks.NewtonKrylov(rtol=1e-13, atol=0.0), problem.y0, problem.args)
    assert reason(solution) == "residual_rtol" and solution.value.dtype == np.float64
    np.testing.assert_allclose(solution.value, exact.value, rtol=1e-9)
    # no evaluation beyond one a trial, and hardly more Krylov iterations
    assert count.primal == trials(solution)
    assert counters(solution)["num_matvecs"] <= 1.25 * counters(exact)["num_matvecs"] + 10


def test_gradients_are_as_precise_as_asked():
    def value(policy):
        solver = nks.NewtonKrylov(rtol=1e-11, atol=0.0, policy=policy)
        return lambda lam: jnp.sum(nks.root_find(BRATU.fn, solver, BRATU.y0, lam).value ** 2)

    low, wide = value(LOW), value(nks.Linearise())
    lam, one = jnp.array(6.5), jnp.ones(())
    both = lambda f: jax.jit(lambda: (jax.value_and_grad(f)(lam), jax.jvp(f, (lam,), (one,))))
    ours, theirs = jtu.tree_leaves(both(low)()), jtu.tree_leaves(both(wide)())
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8)


def _ill_conditioned(condition, n=41):
    rng = np.random.default_rng(5)
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    return jnp.asarray(u @ np.diag(np.geomspace(1.0, 1 / condition, n)) @ v.T)


@pytest.mark.parametrize(("condition", "verify"), [(1e3, 1e-12), (1e10, 1e-8)])
def test_beyond_the_lower_precision_it_goes_on_in_its_own(condition, verify):
    matrix = _ill_conditioned(condition)
    b = matrix @ jnp.linspace(-1.0, 1.0, 41)
    operator = nks.linearise(lambda y, m: m @ y, b, matrix, policy=LOW).operator
    solver = nks.GMRES(rtol=verify, restart=41)
    solution = jax.jit(lambda b: lx.linear_solve(operator, b, solver, throw=False))(b)
    assert bool(solution.result == lx.RESULTS.successful)
    residual = float(jnp.linalg.norm(b - matrix @ solution.value))
    assert residual <= verify * float(jnp.linalg.norm(b)) * (1 + 1e-6)
    np.testing.assert_allclose(float(solution.stats["residual_norm"]), residual, rtol=1e-2)


def test_failures_are_said():
    singular = jnp.diag(jnp.array([1.0, 2.0, 0.0]))
    operator = nks.linearise(lambda y, m: m @ y, jnp.ones(3), singular, policy=LOW).operator
    solve = lambda b, solver: lx.linear_solve(operator, b, solver, throw=False)
    stuck = solve(jnp.ones(3), nks.GMRES())
    assert bool(stuck.result == lx.RESULTS.stagnation)
    np.testing.assert_allclose(float(stuck.stats["residual_norm"]), 1.0, rtol=1e-6)
    cut = solve(jnp.array([1.0, 1.0, 0.0]), nks.GMRES(max_steps=1))
    assert bool(cut.result == lx.RESULTS.max_steps_reached)
    broken = solve(jnp.array([1.0, jnp.nan, 0.0]), nks.GMRES())
    assert not bool(broken.result == lx.RESULTS.successful)
    zero = solve(jnp.zeros(3), nks.GMRES())
    assert bool(zero.result == lx.RESULTS.successful) and int(zero.stats["num_matvecs"]) == 0


def test_lanes_are_as_if_alone():
    solver = nks.NewtonKrylov(rtol=1e-10, atol=0.0, policy=LOW)

    @jax.jit
    def alone(lam):
        solution = run(BRATU.fn, solver, BRATU.y0, lam)
        return solution.value, solution.stats

    lanes = jnp.array([0.0, 1.0, 5.0, 9.0])
    values, stats = jax.jit(jax.vmap(alone))(lanes)
    for i, lam in enumerate(lanes):
        value, own = alone(lam)
        np.testing.assert_allclose(values[i], value, rtol=1e-6, atol=1e-8)
        if i < 3:  # beyond the fold, rounding decides how it fails
            for name in (k for k in own if k.startswith("num_")):
                assert int(stats[name][i]) == int(own[name]), (i, name)


def test_the_preconditioner_is_of_the_lower_precision():
    seen = []

    def build(operator, y, args):
        del args
        seen.append((operator.in_structure().dtype, y.dtype))
        return lambda v: v / 4

    krylov = nks.GMRES(preconditioner=nks.UserPreconditioner(build))
    solver = nks.NewtonKrylov(rtol=1e-10, atol=0.0, policy=LOW, linear_solver=krylov)
    solution = run(BRATU.fn, solver, BRATU.y0, BRATU.args)
    assert reason(solution) == "residual_rtol"
    assert set(seen) == {(np.dtype(np.float32), np.dtype(np.float64))}


def test_narrow_enough_already_means_plain():
    operator = nks.linearise(lambda y, _: y**2, jnp.ones(3, jnp.float32), policy=LOW).operator
    assert working(operator) is operator


def test_only_real_floating_dtypes():
    with pytest.raises(ValueError, match="real floating dtype"):
        nks.LowerPrecision(jnp.int32)

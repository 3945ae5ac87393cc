"""Lagged: when it refreshes, and that what it keeps between is what it had."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.precondition.lagged import Lagged
from tests.helpers import Counter

N = 11
_OFF = jnp.asarray(0.05 * np.random.default_rng(2).standard_normal((N, N)))
_PROBED = Counter()


def _fn(y, k):
    return y**3 + jnp.arange(1.0, N + 1) * y + _OFF @ y - k


class _Probing(nks.AbstractPreconditioner):
    """The diagonal of J from n matvecs in one batch, and the argument it was made at."""

    def init(self, operator, y, args):
        columns = jax.vmap(operator.mv)(_PROBED.tick(jnp.eye(N)))
        return jnp.diagonal(columns)

    def as_operator(self, state):
        operator = nks.UserPreconditioner(lambda *_: lambda v: v / state)
        return operator.init(_structure(), None, None)

    def num_probes(self, operator, y, args):
        return N


@ft.cache
def _structure():
    return nks.linearise(lambda y, _: y, jnp.zeros(N)).operator


def _solver(preconditioner, eta=1e-2, **kwargs):
    krylov = nks.GMRES(rtol=1e-10, preconditioner=preconditioner)
    return nks.NewtonKrylov(
        rtol=1e-11,
        atol=1e-13,
        linear_solver=krylov,
        forcing=nks.ConstantForcing(eta),
        history_length=40,
        **kwargs,
    )


def _run(preconditioner, **kwargs):
    solver = _solver(preconditioner, **kwargs)

    def solve(k):
        solution = nks.root_find(_fn, solver, jnp.zeros(N), k)
        return solution.value, solution.stats

    return solve


K = jnp.linspace(1.0, 40.0, N)


@pytest.mark.parametrize("max_age", [1, 2, 3, None])
def test_refreshed_by_age(max_age):
    """At linear solves 0, a, 2a, …; probes are executed as often as they are counted."""
    solve = jax.jit(_run(Lagged(_Probing(), max_age=max_age)))
    with _PROBED.measure() as count:
        y, stats = solve(K)
    steps = int(stats["num_steps"])
    assert steps >= 5
    expected = 1 if max_age is None else -(-steps // max_age)
    assert int(stats["num_preconditioner_updates"]) == expected
    assert int(stats["num_probes"]) == N * expected
    assert len(count.executions) == expected
    np.testing.assert_allclose(_fn(y, K), 0, atol=1e-8)


def test_kept_is_the_old_one():
    """By hand: the rules, one after the other, on a state."""
    preconditioner = Lagged(nks.Jacobi(lambda y, k: y), max_age=2, growth=2.0)
    operator = _structure()
    y0, y1 = 2 * jnp.ones(N), 5 * jnp.ones(N)
    state = preconditioner.init(operator, y0, None)
    due = lambda state: bool(preconditioner.is_due(state, y1, None))
    apply = lambda state: float(preconditioner.as_operator(state).mv(jnp.ones(N))[0])
    steps = lambda n: jnp.array(n, jnp.int32)
    assert not due(state) and apply(state) == 0.5
    once = preconditioner.observe(state, steps(3))
    assert not due(once) and apply(once) == 0.5
    assert due(preconditioner.observe(once, steps(3)))  # by age
    old = Lagged(nks.Jacobi(lambda y, k: y), growth=2.0)
    grown = old.observe(old.observe(once, steps(6)), steps(6))
    assert not bool(old.is_due(grown, y1, None))  # twice as many, not more
    assert bool(old.is_due(old.observe(grown, steps(7)), y1, None))
    new = preconditioner.update(grown, operator, y1, None)
    assert not due(new) and apply(new) == 0.2
    assert int(new.age) == 0


def test_refreshed_by_a_change_of_the_shift():
    """Relative to the γ of the last refresh, not of the last solve."""
    preconditioner = Lagged(nks.Identity(), shift=lambda y, gamma: gamma, max_shift_change=0.3)
    state = preconditioner.init(_structure(), None, jnp.array(2.0))
    due = lambda gamma: bool(preconditioner.is_due(state, None, jnp.array(gamma)))
    assert [due(g) for g in (2.0, 2.5, 1.5, 2.61, 1.39, -2.0, np.nan)] == [False] * 3 + [True] * 4
    state = preconditioner.update(state, _structure(), None, jnp.array(1.0))
    assert [due(g) for g in (1.0, 1.2, 2.0)] == [False, False, True]


def test_refreshed_by_growth_in_newton():
    """A diagonal made at zero serves worse and worse as y grows: with the rule there are fewer
    matvecs than without, and fewer refreshes than with one at each step."""
    never, grown, always = (
        jax.jit(_run(Lagged(_Probing(), **rule), eta=1e-6))
        for rule in ({}, {"growth": 1.3}, {"max_age": 1})
    )
    (_, never), (_, grown), (_, always) = never(50 * K), grown(50 * K), always(50 * K)
    assert int(never["num_preconditioner_updates"]) == 1
    updates = [int(s["num_preconditioner_updates"]) for s in (grown, always)]
    assert 1 < updates[0] < updates[1] == int(always["num_steps"])
    matvecs = [int(s["num_matvecs"]) for s in (always, grown, never)]
    assert matvecs[1] < matvecs[2]


def test_a_batch_is_refreshed_as_one():
    """Values as alone; refreshed where any lane is due, so that lanes count alike while running."""
    ks = jnp.stack([K / 40, K, 50 * K])
    # With full steps every trial of a lane that runs asks for a direction.
    solve = _run(Lagged(_Probing(), max_age=2), globalisation=nks.FullStep())
    values, stats = jax.jit(jax.vmap(solve))(ks)
    steps = stats["num_steps"].tolist()
    assert len(set(steps)) > 1
    alone = jax.jit(solve)
    for lane in range(3):
        np.testing.assert_allclose(values[lane], alone(ks[lane])[0], rtol=1e-8, atol=1e-10)
    assert stats["num_preconditioner_updates"].tolist() == [-(-n // 2) for n in steps]


def test_the_adjoint_is_preconditioned_at_the_root():
    """The gradient by differences, and with a probe there."""
    solve = _run(Lagged(_Probing()))
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(solve(k)[0])))
    with _PROBED.measure() as count:
        slope = gradient(K)
    assert len(count.executions) == 2  # the first linearisation, and the root
    y = jax.jit(solve)(K)[0]
    a = np.diag(3 * np.asarray(y) ** 2 + 1 + np.arange(N)) + np.asarray(_OFF)
    np.testing.assert_allclose(slope, np.linalg.solve(a.T, np.ones(N)), rtol=1e-7)


def test_rules_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="max_age"):
        Lagged(nks.Identity(), max_age=0)
    with pytest.raises(ValueError, match="growth"):
        Lagged(nks.Identity(), growth=0.5)

"""The bound of rounding errors, which tests of honesty allow: a bound, and not a loose one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nksolve.problems import PROBLEMS, get
from tests.helpers import rounding_bound
from tests.newton.census import SMALL

F32 = jnp.finfo(jnp.float32)


def errors(fn, points, args32, *, unit=1.0):
    """(|fl(F) − F|, bound) at the points, with fl in float32."""
    double = lambda x: jnp.asarray(x, jnp.float64)
    args = jax.tree.map(double, args32)
    bound = rounding_bound(fn, double(points[0]), args)
    eps, tiny = unit * float(F32.eps), float(F32.tiny)
    evaluate = jax.jit(jax.vmap(lambda y: bound(jnp.asarray(eps), jnp.asarray(tiny), y, args)))
    value, allowed = evaluate(double(points))
    low = jax.jit(jax.vmap(lambda y: fn(y, args32)))(points)
    assert low.dtype == jnp.float32 and value.dtype == jnp.float64
    return np.abs(np.asarray(low, np.float64) - value), np.asarray(allowed)


def around(problem, count=200):
    rng = np.random.default_rng(3)
    y0 = np.asarray(problem.y0, np.float64)
    away = rng.standard_normal((count, *y0.shape))
    return jnp.asarray(y0 + (1 + np.abs(y0)) * away, jnp.float32)


@pytest.mark.parametrize("name", PROBLEMS)
def test_of_every_problem(name):
    problem = get(name, **SMALL.get(name, {}), dtype=jnp.float32)
    error, allowed = errors(problem.fn, around(problem), problem.args)
    assert np.all(error <= allowed)
    assert np.isfinite(allowed).all()
    # Some point comes near: a hundredth of it would be no bound.
    assert np.any(error > 0.01 * allowed)


def _all_operations(y, args):
    total = jnp.cumsum(y) + args @ y
    waves = jnp.sin(y) * jnp.cos(y) + jnp.tanh(y) / (2.0 + jnp.abs(y)) - jnp.expm1(-(y**2))
    roots = jnp.sqrt(1.0 + jnp.square(y)) + jnp.log1p(jnp.abs(y)) + jnp.arctan2(y, 1.0 + y**2)
    products = jnp.prod(y) + jnp.maximum(y, total) + jnp.power(1.5 + jnp.abs(y), 0.3)
    return waves + roots + products + jnp.pad(y[1:], (0, 1)) + total


def test_of_every_operation():
    rng = np.random.default_rng(8)
    points = jnp.asarray(rng.standard_normal((500, 5)) * 3, jnp.float32)
    args = jnp.asarray(rng.standard_normal((5, 5)), jnp.float32)
    error, allowed = errors(_all_operations, points, args)
    assert np.all(error <= allowed)
    assert np.any(error > 0.05 * allowed)
    assert not np.all(error <= errors(_all_operations, points, args, unit=1e-2)[1])


def test_errors_are_passed_on():
    """That of a large product, by a function of it that is small."""
    fn = lambda y, args: jnp.sin(y * args) * 1e3
    points = jnp.linspace(0.1, 1.0, 50, dtype=jnp.float32)[:, None]
    error, allowed = errors(fn, points, jnp.asarray(1e4, jnp.float32))
    assert np.all(error <= allowed)
    assert 0.1 < np.max(error) < np.max(allowed) < 10.0


def test_an_operation_that_is_not_known():
    with pytest.raises(NotImplementedError, match="erf"):
        errors(lambda y, _: jax.scipy.special.erf(y), jnp.ones((1, 2), jnp.float32), None)

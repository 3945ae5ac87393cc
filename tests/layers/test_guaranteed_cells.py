"""The guaranteed cells: what they promise, and that solvers find their roots."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from nksolve.accelerate.picard import Picard
from nksolve.layers.layer import ImplicitLayer
from nksolve.layers.monotone_cell import MonotoneCell
from nksolve.layers.spectral_norm_cell import SpectralNormCell
from nksolve.verbs.fixed_point import fixed_point

D = 24
ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "softplus": jax.nn.softplus}


@ft.cache
def _cell(name="relu", m=0.1, scale=1.0):
    cell = MonotoneCell(3, D, m, ACTIVATIONS[name], key=jax.random.key(0))
    large = lambda c: (c.a, c.b)
    return eqx.tree_at(large, cell, jax.tree.map(lambda p: scale * p, large(cell)))


@ft.cache
def _newton(tol=1e-11):
    solver = nks.NewtonKrylov(0.0, tol)
    return eqx.filter_jit(lambda cell, x, z0: fixed_point(cell, solver, z0, x))


@pytest.mark.parametrize("m", [0.05, 0.5, 1.0])
def test_strong_monotonicity_for_any_parameters(m):
    for scale in (0.0, 1.0, 30.0):
        weight = np.asarray(_cell(m=m, scale=scale).weight)
        gap = np.eye(D) - (weight + weight.T) / 2
        assert np.linalg.eigvalsh(gap)[0] >= m - 1e-12 * (1 + scale**2)


def test_the_conditioning_bounds_hold_and_are_attained():
    rng = np.random.default_rng(0)
    for m in (0.05, 0.5):
        weight = np.asarray(_cell(m=m, scale=2.0).weight)
        for _ in range(20):
            slopes = rng.uniform(size=D) * rng.integers(0, 2, D)
            inverse = np.linalg.inv(np.eye(D) - slopes[:, None] * weight)
            assert np.linalg.norm(inverse * slopes, 2) <= 1 / m
            assert np.linalg.norm(inverse, 2) <= 1 + np.linalg.norm(weight, 2) / m
    # Attained where A and B are zero and all slopes are 1.
    weight = np.asarray(_cell(m=0.05, scale=0.0).weight)
    np.testing.assert_allclose(np.linalg.norm(np.linalg.inv(np.eye(D) - weight), 2), 1 / 0.05)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_one_root_from_any_start_where_picard_diverges(name):
    cell, rng = _cell(name, scale=4.0), np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal(3))
    starts = [10.0**k * rng.standard_normal(D) for k in range(-1, 3)]
    roots = [_newton()(cell, x, jnp.asarray(z0)).value for z0 in starts]
    for root in roots:
        np.testing.assert_allclose(root, roots[0], atol=1e-9)
    jacobian = np.asarray(jax.jacfwd(cell)(roots[0], x))
    assert np.linalg.eigvals(jacobian).real.min() < -1.5
    plain = fixed_point(cell, Picard(0.0, 1e-10), roots[0] + 1e-3, x, max_steps=400, throw=False)
    assert plain.result != optx.RESULTS.successful


def test_the_root_moves_no_faster_than_the_bound():
    m = 0.3
    cell, rng = _cell("tanh", m=m, scale=2.0), np.random.default_rng(2)
    for _ in range(4):
        x, y = (jnp.asarray(rng.standard_normal(3)) for _ in range(2))
        roots = [_newton()(cell, a, jnp.zeros(D)).value for a in (x, y)]
        moved = np.linalg.norm(roots[0] - roots[1])
        assert moved <= np.linalg.norm(cell.injection @ (x - y)) / m


def test_gradients_against_dense_ones():
    cell, x = _cell("tanh", scale=2.0), jnp.asarray([0.3, -1.0, 2.0])

    def loss(cell):
        return jnp.sum(_newton(1e-13)(cell, x, jnp.zeros(D)).value ** 2)

    got = eqx.filter_grad(loss)(cell)
    z = _newton(1e-13)(cell, x, jnp.zeros(D)).value
    jacobian = jax.jacfwd(cell)(z, x)
    costate = jnp.linalg.solve((jnp.eye(D) - jacobian).T, 2 * z)
    wanted = eqx.filter_vjp(lambda c: c(z, x), cell)[1](costate)[0]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_dtypes_and_bad_input():
    key = jax.random.key(0)
    cell = MonotoneCell(3, 4, dtype=jnp.float32, key=key)
    z = jnp.ones(4, jnp.float32)
    assert cell(z, jnp.ones(3, jnp.float32)).dtype == jnp.float32
    cell = MonotoneCell(0, 4, dtype=jnp.float32, key=key)
    assert cell(z, jnp.ones(0, jnp.float32)).shape == (4,)
    for m in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="`m` must be in"):
            MonotoneCell(3, 4, m, key=key)
    with pytest.raises(ValueError, match="`gain` must be in"):
        SpectralNormCell(3, 4, gain=1.0, key=key)


def _spectral():
    return eqx.nn.make_with_state(SpectralNormCell)(3, D, 0.9, key=jax.random.key(1))


def _copied(state):
    """Equinox refuses a state that was used before; a copy may be used again."""
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state))


def test_a_spectrally_normalised_cell_contracts_by_its_gain():
    cell, state = _spectral()
    x, rng = jnp.asarray([0.3, -1.0, 2.0]), np.random.default_rng(3)
    linear = eqx.tree_at(lambda c: c.activation, cell, lambda y: y)
    jacobian = jax.jacfwd(lambda z: linear(z, x, _copied(state))[0])(jnp.zeros(D))
    np.testing.assert_allclose(np.linalg.norm(jacobian, 2), 0.9, rtol=1e-2)
    # After a step of training the followed norm lags; a few updates of the state catch up.
    weight = jnp.asarray(rng.standard_normal((D, D)))
    where = lambda c: c.recurrent.layer.weight
    trained = eqx.tree_at(where, linear, weight)
    for _ in range(100):
        _, state = trained(jnp.zeros(D), x, state)
    jacobian = jax.jacfwd(lambda z: trained(z, x, state)[0])(jnp.zeros(D))
    np.testing.assert_allclose(np.linalg.norm(jacobian, 2), 0.9, rtol=1e-2)


def test_its_state_is_frozen_during_a_solve_and_updated_once_after():
    cell, state = _spectral()
    x = jnp.asarray([0.3, -1.0, 2.0])
    frozen = lambda z, own: own[0](z, own[1], _copied(state))[0]
    roots = [
        fixed_point(frozen, solver, jnp.zeros(D), (cell, x)).value
        for solver in (nks.NewtonKrylov(0.0, 1e-12), Picard(0.0, 1e-12))
    ]
    np.testing.assert_allclose(roots[0], roots[1], atol=1e-11)
    layer = ImplicitLayer(cell, nks.NewtonKrylov(0.0, 1e-12))
    z, info = layer(x, jnp.zeros(D), state=state)
    np.testing.assert_allclose(z, roots[0], atol=1e-11)
    once = cell(z, x, _copied(state))[1]
    for a, b in zip(jax.tree.leaves(info.state), jax.tree.leaves(once), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)


class WeightNormCell(eqx.Module):
    """Rows of W of norm g, by Equinox: stateless, so it needs no care in a solve."""

    recurrent: eqx.nn.WeightNorm
    injection: eqx.nn.Linear

    def __call__(self, z, x):
        return jnp.tanh(self.recurrent(z) + self.injection(x))


def test_a_weight_normalised_cell_is_an_ordinary_one():
    keys = jax.random.split(jax.random.key(2), 2)
    recurrent = eqx.nn.WeightNorm(eqx.nn.Linear(D, D, use_bias=False, key=keys[0]))
    cell = WeightNormCell(recurrent, eqx.nn.Linear(3, D, key=keys[1]))
    small = eqx.tree_at(lambda c: c.recurrent.g, cell, 0.4 * cell.recurrent.g)
    x = jnp.asarray([0.3, -1.0, 2.0])
    layer = ImplicitLayer(small, nks.NewtonKrylov(0.0, 1e-12))
    z, info = layer(x, jnp.zeros(D))
    assert bool(info.success)
    np.testing.assert_allclose(small(z, x), z, atol=1e-11)

    def loss(g):
        moved = eqx.tree_at(lambda layer: layer.cell.recurrent.g, layer, g)
        return jnp.sum(moved(x, jnp.zeros(D))[0] ** 2)

    g = small.recurrent.g
    direction, step = jnp.ones_like(g), 1e-5
    differences = (loss(g + step * direction) - loss(g - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(g), direction), differences, rtol=1e-6)

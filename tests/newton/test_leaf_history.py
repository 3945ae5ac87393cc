"""Records of each leaf: an equation that is never solved shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import nksolve as nks

from .solving import max_norm, reason, run, trials

Y0 = {"flow": jnp.full((3,), 2.0), "heat": jnp.asarray(1.0)}


def _stuck(y, args):
    """`flow` has a root, `heat` never falls below 1e-3."""
    return {"flow": 1e4 * (y["flow"] ** 2 - 1.0), "heat": 1e-3 * (1.0 + y["heat"] ** 2)}


def _recorded(solver):
    solution = run(_stuck, solver, Y0, max_steps=12)
    history = solution.stats["history"]
    n = min(trials(solution), history.norm.shape[0])
    return solution, {k: np.asarray(v)[:n] for k, v in history.leaf_norms.items()}, history, n


def test_leaf_norms():
    """√(Σ leaf²) is the norm; at the first trial they are those of F(y₀)."""
    solver = nks.NewtonKrylov(0.0, 1e-9, history_length=nks.PerLeaf(20))
    solution, leaves, history, n = _recorded(solver)
    assert reason(solution) != "residual_atol"
    assert list(leaves) == ["y['flow']", "y['heat']"]
    both = np.sqrt(leaves["y['flow']"] ** 2 + leaves["y['heat']"] ** 2)
    np.testing.assert_allclose(both, history.norm[:n], rtol=1e-12)
    f = _stuck(Y0, None)
    np.testing.assert_allclose(leaves["y['flow']"][0], np.linalg.norm(f["flow"]))
    np.testing.assert_allclose(leaves["y['heat']"][0], 2e-3)
    # The norm has fallen by 1e7; it is heat that has not.
    accepted = np.asarray(history.accepted[:n])
    assert np.min(leaves["y['flow']"]) < 1e-6 * leaves["y['flow']"][0]
    assert np.all(leaves["y['heat']"][accepted] > 0.4 * leaves["y['heat']"][0])
    assert np.all(np.isnan(history.leaf_norms["y['flow']"][n:]))


def test_they_are_in_the_norm_and_the_units_of_the_test():
    newton = nks.NewtonKrylov(0.0, 1e-9, norm=_largest, history_length=nks.PerLeaf(20))
    solver = nks.Scaled(newton, variables=1.0, residual={"flow": 1e4, "heat": 1e-3})
    _, leaves, history, n = _recorded(solver)
    largest = np.maximum(leaves["y['flow']"], leaves["y['heat']"])
    np.testing.assert_allclose(largest, history.norm[:n], rtol=1e-12)
    np.testing.assert_allclose([leaves["y['flow']"][0], leaves["y['heat']"][0]], [3.0, 2.0])


def _largest(f):
    """A norm that knows the structure."""
    return jnp.maximum(max_norm(f["flow"]), max_norm(f["heat"]))


def test_lanes_and_iterations():
    solver = nks.NewtonKrylov(0.0, 1e-6, history_length=nks.PerLeaf(6))
    fn = lambda y, args: y**2 - args
    solve = lambda a: run(fn, solver, jnp.ones(()), a, max_steps=5).stats["history"]
    lanes = jax.vmap(solve)(jnp.asarray([1.0, 4.0]))
    np.testing.assert_array_equal(lanes.leaf_norms["y"], lanes.norm)
    picard = nks.Picard(0.0, 1e-6, history_length=nks.PerLeaf(5))
    solution = run(lambda y, args: 0.5 * (1.0 - y), picard, jnp.zeros(()))
    history = solution.stats["history"]
    np.testing.assert_array_equal(history.leaf_norms["y"], history.norm)


def test_not_asked_for():
    solver = nks.NewtonKrylov(0.0, 1e-6, history_length=6)
    assert run(_stuck, solver, Y0, max_steps=3).stats["history"].leaf_norms == {}
    for wrong in (0, -1, 2.0):
        with pytest.raises((ValueError, TypeCheckError), match="PerLeaf"):
            nks.PerLeaf(wrong)

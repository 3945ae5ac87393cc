"""`checkpoint_layers` marks the inputs of layers, and `Checkpointed` keeps just these."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

from nksolve.linearise.layers import CheckpointedLayer, checkpoint_layers
from nksolve.linearise.linearisation import linearise
from nksolve.linearise.policies import Checkpointed, Linearise
from tests.helpers import Counter

BATCH, WIDTH, HIDDEN = 3, 5, 7
X = jr.normal(jr.key(3), (BATCH, WIDTH))


class _Block(eqx.Module):
    """A residual block with a wide inside and a counted input."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear
    counter: Counter = eqx.field(static=True)

    def __init__(self, key, counter):
        up, down = jr.split(key)
        self.up = eqx.nn.Linear(WIDTH, HIDDEN, key=up)
        self.down = eqx.nn.Linear(HIDDEN, WIDTH, key=down)
        self.counter = counter

    def __call__(self, x, *, key=None):
        x = self.counter.tick(x)
        return x + self.down(jnp.tanh(self.up(x)))


def _stack(depth, counter):
    return eqx.nn.Sequential([_Block(k, counter) for k in jr.split(jr.key(4), depth)])


def _fn(y, network):
    return jax.vmap(network)(y) - y


def _kept(operator, network):
    """Shapes of the arrays that the operator keeps beside the weights."""
    weights = {x.shape for x in jtu.tree_leaves(network) if eqx.is_array(x)}
    shapes = [x.shape for x in jtu.tree_leaves(operator) if eqx.is_array(x)]
    return [shape for shape in shapes if shape not in weights]


@pytest.mark.parametrize("depth", [2, 5])
def test_keeps_the_inputs_of_layers_and_nothing_else(depth):
    network = _stack(depth, Counter())
    marked = checkpoint_layers(network)
    jit = eqx.filter_jit(lambda policy, net: linearise(_fn, X, net, policy=policy))
    lin = jit(Checkpointed(), marked)
    assert _kept(lin.operator, network) == [(BATCH, WIDTH)] * depth
    assert _kept(lin.joint, network) == [(BATCH, WIDTH)] * depth
    stored = _kept(jit(Linearise(), network).operator, network)
    assert sum(map(np.prod, stored)) > depth * BATCH * (WIDTH + HIDDEN) - BATCH * WIDTH
    # Without the marks there is the point alone: everything would be computed again from it.
    assert _kept(jit(Checkpointed(), network).operator, network) == [(BATCH, WIDTH)]


def test_matvec_recomputes_within_layers_only():
    """Each matvec runs no layer as a function of another's output: no primal layer is chained."""
    counter = Counter()
    marked = checkpoint_layers(_stack(4, counter))
    with counter.measure() as count:
        lin = eqx.filter_jit(lambda n: linearise(_fn, X, n, policy=Checkpointed()))(marked)
    assert count.primal == 4
    _, expected = jax.jvp(lambda y: _fn(y, marked), (X,), (X,))
    _, vjp = jax.vjp(_fn, X, marked)
    mv = eqx.filter_jit(lambda operator, v: operator.mv(v))
    with counter.measure() as count:
        actual = mv(lin.operator, X)
    assert (count.primal, count.tangent) == (4, 4)
    np.testing.assert_allclose(actual, expected, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(mv(lin.operator.transpose(), X), vjp(X)[0], rtol=1e-13, atol=1e-14)
    cotangent = lin.args_cotangent(X)
    for a, e in zip(jtu.tree_leaves(cotangent), jtu.tree_leaves(vjp(X)[1]), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "module",
    [
        eqx.nn.MLP(3, 3, 4, 2, key=jr.key(0)),
        eqx.nn.Sequential([eqx.nn.Linear(3, 3, key=jr.key(1)), eqx.nn.Lambda(jnp.tanh)]),
        [jnp.sin, eqx.nn.Linear(3, 3, key=jr.key(2))],
        (jnp.sin, jnp.cos),
    ],
    ids=["MLP", "Sequential", "list", "tuple"],
)
def test_a_copy_of_the_same_network(module):
    marked = checkpoint_layers(module)
    assert type(marked) is type(module)
    before, after = jtu.tree_leaves(module), jtu.tree_leaves(marked)
    assert len(before) == len(after) and all(b is a for b, a in zip(before, after, strict=True))
    layers = marked if isinstance(marked, list | tuple) else marked.layers
    original = module if isinstance(module, list | tuple) else module.layers
    assert type(layers) is type(original)
    assert all(isinstance(layer, CheckpointedLayer) for layer in layers)
    x = jnp.linspace(0.0, 1.0, 3)
    if isinstance(module, list | tuple):
        for a, b in zip(layers, original, strict=True):
            np.testing.assert_array_equal(a(x), b(x))
    else:
        np.testing.assert_array_equal(marked(x), module(x))
    assert "nksolve.layer_input" in str(jax.make_jaxpr(layers[0])(x))
    assert jtu.tree_structure(checkpoint_layers(marked)) == jtu.tree_structure(marked)


def test_keys_and_states_are_passed_on():
    linear = eqx.nn.Linear(3, 3, key=jr.key(0))
    norm = eqx.nn.BatchNorm(3, "batch", mode="batch")
    layers = [linear, eqx.nn.Dropout(0.5), norm, eqx.nn.Sequential([linear])]
    network, state = eqx.nn.make_with_state(lambda: eqx.nn.Sequential(layers))()
    x = jr.normal(jr.key(1), (6, 3))

    def run(network):
        call = lambda x, key, state: network(x, state, key=key)
        batched = jax.vmap(call, axis_name="batch", in_axes=(0, 0, None), out_axes=(0, None))
        return batched(x, jr.split(jr.key(2), 6), state)

    (out, new_state), (expected, expected_state) = run(checkpoint_layers(network)), run(network)
    np.testing.assert_array_equal(out, expected)
    assert eqx.tree_equal(new_state, expected_state) and not eqx.tree_equal(new_state, state)


def test_more_than_one_argument_and_trees():
    (marked,) = checkpoint_layers([lambda x, scale, *, shift: scale * x["a"] + shift])
    out = marked({"a": jnp.ones(2), "name": "held"}, 3.0, shift=1.0)
    np.testing.assert_array_equal(out, [4.0, 4.0])


def test_refusals():
    with pytest.raises(TypeError, match="checkpoint_name"):
        checkpoint_layers(eqx.nn.Linear(2, 2, key=jr.key(0)))
    with pytest.raises(TypeError, match="Layer 1 is not callable: str"):
        checkpoint_layers([jnp.sin, "cos"])

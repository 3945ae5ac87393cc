"""Residuals for the laws of a linearisation: (fn, y, args) with every kind of y."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from nksolve.linearise.layers import checkpoint_layers
from nksolve.linearise.policies import (
    Checkpointed,
    FiniteDifference,
    Linearise,
    Recompute,
    Transposed,
)

POLICIES = (Linearise(), Checkpointed(), Recompute(), Transposed(), FiniteDifference())
WITH_ADJOINT = POLICIES[:-1]


class Case(NamedTuple):
    name: str
    fn: Callable[[Any, Any], Any]
    y: Any
    args: Any
    holomorphic: bool = False
    single: bool = False  # has float32 leaves

    def rtol(self, policy: Any) -> float:
        """What the policy's matvec may differ from `jax.jvp`'s, relative to its norm."""
        eps = 1.2e-7 if self.single else 2.3e-16
        return 30 * eps**0.5 if isinstance(policy, FiniteDifference) else 300 * eps


def _array(y, args):
    return args["W"] @ jnp.tanh(y) ** args["power"] - y * args["scale"][args["index"]]


def _tree(y, args):
    a, (b, none, label) = y["a"], y["b"]
    assert none is None and label == "held"
    return [jnp.sin(a) * args + jnp.sum(b * b), {"b": jnp.exp(b) - a[:2, None]}]


def _module(y, args):
    return jax.vmap(y)(args)


def _jointly(y, args):
    network, x = y
    return network(x) - args * x


def _mixed(y, args):
    lo, hi = y["lo"], y["hi"]
    return {
        "lo": lo**2 - hi.astype(jnp.float32) * args,
        "hi": jnp.exp(hi) + lo.astype(jnp.float64),
    }


def _holomorphic(y, args):
    return args * y**2 + jnp.exp(1j * y)


def _real_linear(y, args):
    return jnp.conj(y) * y + args * jnp.conj(y)


def _network(width: int, depth: int, key: jax.Array) -> eqx.nn.MLP:
    return eqx.nn.MLP(width, width, 2 * width, depth, activation=jnp.tanh, key=key)


def _cases() -> list[Case]:
    keys = iter(jr.split(jr.key(20), 30))

    def draw(*shape, dtype=jnp.float64):
        return jr.normal(next(keys), shape, dtype)

    def complex_vector():
        return draw(4, dtype=jnp.complex128)

    arrays = {"power": 3, "index": jnp.array([0, 1, 1, 0, 1])}
    network = checkpoint_layers(_network(3, 2, next(keys)))
    return [
        Case("array", _array, draw(5), {"W": draw(5, 5), "scale": draw(2), **arrays}),
        Case(
            "array-f32",
            _array,
            draw(5, dtype=jnp.float32),
            {"W": draw(5, 5, dtype=jnp.float32), "scale": draw(2, dtype=jnp.float32), **arrays},
            single=True,
        ),
        Case("tree", _tree, {"a": draw(3), "b": [draw(2, 3), None, "held"]}, draw(3)),
        Case("module", _module, network, draw(4, 3)),
        Case("module-and-input", _jointly, (network, draw(3)), draw(3)),
        Case("layers-of-args", lambda y, args: jax.vmap(args)(y) - y, draw(4, 3), network),
        Case(
            "mixed",
            _mixed,
            {"lo": draw(3, dtype=jnp.float32), "hi": draw(3)},
            draw(3, dtype=jnp.float32),
            single=True,
        ),
        Case("holomorphic", _holomorphic, complex_vector(), complex_vector(), holomorphic=True),
        Case("real-linear", _real_linear, complex_vector(), complex_vector()),
        Case("no-args", lambda y, args: y**3 - jnp.flip(y), draw(4), None),
        Case("empty", lambda y, args: {"none": None}, {"none": None}, draw(2)),
    ]


CASES = _cases()


def arrays_of(x: Any) -> Any:
    return eqx.filter(x, eqx.is_inexact_array)


def on_arrays(case: Case) -> Callable[[Any, Any], Any]:
    """fn as a function of the inexact arrays of y and args."""
    _, static_y = eqx.partition(case.y, eqx.is_inexact_array)
    _, static_args = eqx.partition(case.args, eqx.is_inexact_array)
    return lambda y, args: case.fn(eqx.combine(y, static_y), eqx.combine(args, static_args))


def like(x: Any, seed: int) -> Any:
    """A normal vector of the space of x (arrays or structs), the same for the same seed."""
    leaves, treedef = jtu.tree_flatten(x)
    rng = np.random.default_rng(seed)

    def draw(leaf):
        value = rng.normal(size=leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            value = value + 1j * rng.normal(size=leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jtu.tree_unflatten(treedef, [draw(leaf) for leaf in leaves])


def flat(x: Any) -> np.ndarray:
    """All entries, in the widest dtype."""
    leaves = [np.ravel(np.asarray(leaf)) for leaf in jtu.tree_leaves(x)]
    return np.concatenate([*leaves, np.zeros(0)])


def assert_close(actual: Any, expected: Any, rtol: float) -> None:
    """Same structure, shapes and dtypes, and ‖actual − expected‖ ≤ rtol ‖expected‖."""
    assert jtu.tree_structure(actual) == jtu.tree_structure(expected)
    for a, b in zip(jtu.tree_leaves(actual), jtu.tree_leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    difference = np.linalg.norm(flat(actual) - flat(expected))
    assert difference <= rtol * np.linalg.norm(flat(expected))


def product(a: Any, b: Any) -> complex:
    """aᵀ b, without conjugation."""
    return flat(a) @ flat(b)

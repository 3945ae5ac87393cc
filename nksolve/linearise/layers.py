"""`checkpoint_layers`: a network of which `nks.Checkpointed` keeps the inputs of layers."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax.tree_util as jtu
from jax.ad_checkpoint import checkpoint_name

from .policies import LAYER_INPUT

_Layers = TypeVar("_Layers")


class CheckpointedLayer(eqx.nn.StatefulLayer):
    """A layer, `x ↦ layer(x, …)`, whose input is marked to be kept by `nks.Checkpointed`.

    The marks are identities: without such a policy nothing changes.
    """

    layer: Callable[..., Any]

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        arrays, rest = eqx.partition(x, eqx.is_array)
        marked = jtu.tree_map(lambda leaf: checkpoint_name(leaf, LAYER_INPUT), arrays)
        return self.layer(eqx.combine(marked, rest), *args, **kwargs)

    def is_stateful(self) -> bool:
        # `eqx.nn.Sequential` asks this, to know whether to pass the state on.
        return isinstance(self.layer, eqx.nn.StatefulLayer) and self.layer.is_stateful()


def checkpoint_layers(module: _Layers) -> _Layers:
    """The same network with each layer's input marked, for the policy `nks.Checkpointed()`.

    Linearised with that policy, a network of layers y ← φ_l(y) keeps the input of each layer and
    the weights; what lies within a layer (pre-activations, derivatives of activation functions,
    attention weights, …) is computed again inside every matvec, from the layer's input.

    **Arguments:**

    - `module`: an `eqx.Module` with a field `layers`, a tuple or list of callables (as
      `eqx.nn.Sequential` and `eqx.nn.MLP` have); or such a tuple or list itself. What a layer
      takes beside its first argument (`key`, `state`, …) is passed on.

    **Returns:** a copy of the same type. Layer `l` of the original is `layers[l].layer` in it; its
    array leaves are those of the original in the same order. In an `eqx.nn.MLP` the
    activation function between two linear layers counts to the layer before it, so that it is its
    result which is kept.

    **Raises:** `TypeError` for anything else, and where a layer is not callable.

    Storage: one layer input per layer, against every intermediate value with `nks.Linearise`.
    Work: each matvec computes every layer once more, with its tangent.
    Source: Griewank & Walther, Evaluating Derivatives, 2nd ed., SIAM 2008, chapter 12
    (checkpointing), with one checkpoint per layer.
    """
    if isinstance(module, tuple | list):
        return _marked(module)  # pyright: ignore[reportReturnType]
    layers = getattr(module, "layers", None)
    if not isinstance(module, eqx.Module) or not isinstance(layers, tuple | list):
        raise TypeError(
            "`checkpoint_layers` takes an `eqx.Module` with a tuple or list field `layers`, or a "
            f"tuple or list of layers; got {type(module).__name__}. Mark other places by hand: "
            f'`jax.ad_checkpoint.checkpoint_name(x, "{LAYER_INPUT}")`.'
        )
    marked = _marked(layers)
    return eqx.tree_at(lambda m: m.layers, module, marked, is_leaf=lambda x: x is layers)


def _marked(layers: Any) -> Any:
    for index, layer in enumerate(layers):
        if not callable(layer):
            raise TypeError(f"Layer {index} is not callable: {type(layer).__name__}.")
    return type(layers)(
        layer if isinstance(layer, CheckpointedLayer) else CheckpointedLayer(layer)  # pyright: ignore[reportCallIssue]
        for layer in layers
    )

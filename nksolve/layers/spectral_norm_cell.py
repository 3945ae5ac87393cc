"""A contractive cell by Equinox's spectral normalisation."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, PRNGKeyArray


class SpectralNormCell(eqx.Module):
    """z = σ(γ W z/‖W‖₂ + U x + b): a contraction by γ < 1, so one fixed point at any parameters.

    A stateful cell: ‖W‖₂ is followed by the power iteration of `eqx.nn.SpectralNorm`, whose vectors
    are the state. Make it with `eqx.nn.make_with_state`, and pass the state to the layer, which
    holds it during a solve and moves it on once:

    ```python
    cell, state = eqx.nn.make_with_state(nks.SpectralNormCell)(2, 64, key=key)
    layer = nks.ImplicitLayer(cell, guess=lambda x: jnp.zeros(64))
    z, info = layer(x, state=state)
    state = info.state
    ```

    A followed norm is a lower bound: right after a large step of the optimiser the factor may
    exceed γ. It forgets the old W at the rate (σ₂/σ₁)² a step.

    **Arguments:**

    - `in_size`, `size`: entries of x and of z, for one sample.
    - `gain`: γ, in (0, 1).
    - `activation`: σ, elementwise with slopes in [−1, 1]: `jnp.tanh` (the default), `jax.nn.relu`.
    - `num_power_iterations`: at each update.
    - `dtype`: of the parameters; JAX's default.
    - `key`: for the initial values.

    Source: Miyato, Kataoka, Koyama & Yoshida, Spectral normalization for generative adversarial
    networks, ICLR 2018.
    """

    recurrent: eqx.nn.SpectralNorm
    injection: eqx.nn.Linear
    gain: float = eqx.field(static=True)
    activation: Callable[[Array], Array]

    def __init__(
        self,
        in_size: int,
        size: int,
        gain: float = 0.9,
        activation: Callable[[Array], Array] = jnp.tanh,
        num_power_iterations: int = 1,
        dtype: jax.typing.DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        if not 0 < gain < 1:
            raise ValueError(f"`gain` must be in (0, 1) for a contraction, but it is {gain}.")
        dtype = jnp.zeros((), dtype).dtype
        keys = jax.random.split(key, 3)
        linear = eqx.nn.Linear(size, size, use_bias=False, dtype=dtype, key=keys[0])
        self.recurrent = eqx.nn.SpectralNorm(linear, "weight", num_power_iterations, key=keys[1])
        self.injection = eqx.nn.Linear(in_size, size, dtype=dtype, key=keys[2])
        self.gain = float(gain)
        self.activation = activation

    def __call__(
        self, z: Inexact[Array, " size"], x: Inexact[Array, " in_size"], state: eqx.nn.State
    ) -> tuple[Inexact[Array, " size"], eqx.nn.State]:
        """`(g(z, x), state)`, the state after one more power iteration."""
        moved, state = self.recurrent(z, state)
        gain = jnp.asarray(self.gain, moved.dtype)
        return self.activation(gain * moved + self.injection(x)), state

"""The monotone operator equilibrium cell."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, PRNGKeyArray


class MonotoneCell(eqx.Module):
    """z = σ(W z + U x + b) with I − W ⪰ m I for any parameters: always one fixed point.

    W = (1 − m) I − AᵀA + B − Bᵀ. Its eigenvalues may lie far to the left of −1, where the plain
    iteration diverges; Newton–Krylov does not mind. With slopes of σ in [0, 1], D their diagonal:

        ‖(I − D W)⁻¹ D‖₂ ≤ 1/m              how far the root moves with U x + b
        ‖(I − D W)⁻¹‖₂ ≤ 1 + ‖W‖₂/m         the linear systems of Newton and of the adjoint

    (multiply (D⁻¹ − W) v = r by vᵀ; then (I − D W)⁻¹ = I + (I − D W)⁻¹ D W).

    **Arguments:**

    - `in_size`, `size`: entries of x and of z, for one sample.
    - `m`: the strong monotonicity, in (0, 1]. Small: expressive; large: well conditioned.
    - `activation`: σ, an elementwise function with slopes between 0 and 1, such as `jax.nn.relu`,
      `jnp.tanh`, `jax.nn.sigmoid` or `jax.nn.softplus`. With others (`gelu`, `silu`) nothing is
      guaranteed.
    - `dtype`: of the parameters; JAX's default.
    - `key`: for their initial values, uniform in ±1/√fan-in.

    Work: `weight` takes one product of size × size matrices, once for a solve and its whole batch
    (the solvers of nksolve keep what does not depend on z); an evaluation two matrix–vector
    products.

    Source: Winston & Kolter, Monotone operator equilibrium networks, NeurIPS 2020 (the
    parametrisation); the first bound: Pabbaraju, Winston & Kolter, ICLR 2021.
    """

    a: Inexact[Array, "size size"]
    b: Inexact[Array, "size size"]
    injection: Inexact[Array, "size in_size"]
    bias: Inexact[Array, " size"]
    m: float = eqx.field(static=True)
    activation: Callable[[Array], Array]

    def __init__(
        self,
        in_size: int,
        size: int,
        m: float = 0.1,
        activation: Callable[[Array], Array] = jax.nn.relu,
        dtype: jax.typing.DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        if not 0 < m <= 1:
            raise ValueError(
                f"`m` must be in (0, 1], but it is {m}: I − W ⪰ m I needs m > 0 for one root."
            )
        dtype = jnp.zeros((), dtype).dtype
        keys = jax.random.split(key, 4)

        def uniform(key, shape, fan_in):
            return jax.random.uniform(key, shape, dtype, -1, 1) / jnp.asarray(fan_in**0.5, dtype)

        self.a = uniform(keys[0], (size, size), size)
        self.b = uniform(keys[1], (size, size), size)
        self.injection = uniform(keys[2], (size, in_size), max(in_size, 1))
        self.bias = uniform(keys[3], (size,), max(in_size, 1))
        self.m = float(m)
        self.activation = activation

    @property
    def weight(self) -> Inexact[Array, "size size"]:
        """W."""
        identity = jnp.eye(self.a.shape[0], dtype=self.a.dtype)
        diagonal = jnp.asarray(1 - self.m, self.a.dtype) * identity
        return diagonal - self.a.T @ self.a + self.b - self.b.T

    def __call__(
        self, z: Inexact[Array, " size"], x: Inexact[Array, " in_size"]
    ) -> Inexact[Array, " size"]:
        return self.activation(self.weight @ z + self.injection @ x + self.bias)

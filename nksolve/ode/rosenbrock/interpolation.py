"""The continuous extension that comes with a Rosenbrock method."""

from typing import Any

import diffrax as dfx
import jax.numpy as jnp
import jax.tree_util as jtu

from ...typing import ScalarLike, Vector


class RosenbrockInterpolation(dfx.AbstractLocalInterpolation):
    """y(t0 + θh) = (1 − θ) y0 + θ (y1 + (1 − θ)(d₁ + θ (d₂ + θ (d₃ …)))).

    Source: Hairer & Wanner, Solving Ordinary Differential Equations II, 2nd ed., §VI.4.
    """

    t0: ScalarLike
    t1: ScalarLike
    y0: Vector
    y1: Vector
    ds: Vector  # (p, …): d₁, d₂, …

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> Vector:
        del left
        if t1 is not None:
            return jtu.tree_map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        start = jnp.asarray(self.t0)
        length = jnp.asarray(self.t1) - start
        # A step of no length has one value.
        theta = (t0 - start) / jnp.where(length == 0, jnp.ones_like(length), length)

        def one(y0, y1, ds):
            s = theta.astype(y0.dtype)
            inner = ds[-1]
            for d in ds[-2::-1]:
                inner = d + s * inner
            return (1 - s) * y0 + s * (y1 + (1 - s) * inner)

        return jtu.tree_map(one, self.y0, self.y1, self.ds)

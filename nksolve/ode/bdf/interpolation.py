"""The polynomial of a step, as dense output."""

import diffrax as dfx
import jax.numpy as jnp
import jax.tree_util as jtu

from ...typing import ScalarLike, Vector
from .coefficients import MAX_ORDER
from .differences import weighted


class BDFInterpolation(dfx.AbstractLocalInterpolation):
    """y(t₁ + s h) = Σ_m ∇ᵐy s(s + 1)…(s + m − 1)/m!, of the order of the step; s from −1 to 0.

    It is what the formula itself differentiates, so that its error is that of the step, and it
    joins the last point and the new one continuously.

    **Arguments:**

    - `t0`, `t1`: the ends of the step.
    - `differences`: ∇⁰y … ∇⁵y at t₁ in rows, zero above the order of the step.

    Source: Shampine & Reichelt, SIAM J. Sci. Comput. 18 (1997), section 2.2.
    """

    t0: ScalarLike
    t1: ScalarLike
    differences: Vector

    def evaluate(self, t0: ScalarLike, t1: ScalarLike | None = None, left: bool = True) -> Vector:
        del left
        if t1 is not None:
            return jtu.tree_map(lambda a, b: a - b, self.evaluate(t1), self.evaluate(t0))
        t1 = jnp.asarray(self.t1)
        h = t1 - jnp.asarray(self.t0)
        s = jnp.where(h == 0, 0, (jnp.asarray(t0) - t1) / jnp.where(h == 0, 1, h)).astype(h.dtype)
        m = jnp.arange(1, MAX_ORDER + 1).astype(s.dtype)
        weights = jnp.concatenate([jnp.ones_like(m[:1]), jnp.cumprod((s + m - 1) / m)])
        return jtu.tree_map(lambda x: weighted(weights[None], x)[0], self.differences)

"""Backward differences: their prediction, and their change with the step size and with a step.

An array of differences holds ∇⁰y, ∇¹y, … ∇⁵y of the newest point in rows. At order k the rows up to
k are the polynomial through the last k + 1 points; row k + 1 is what the last step corrected.
"""

from typing import NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Inexact

from ...typing import Count, Scalar, Vector
from .coefficients import LEADING, MAX_ORDER, NEWTON


class Prediction(NamedTuple):
    """What the history says of the step."""

    differences: Vector  # at the old point, for the step's size
    y: Vector  # y⁽⁰⁾ = Σ_{m≤k} ∇ᵐy
    psi: Vector  # ψ = Σ_{1≤m≤k} γ_m ∇ᵐy / α_k


def predict(differences: Vector, order: Count, ratio: Scalar) -> Prediction:
    """The prediction for a step of `ratio` times the size that the differences stand for."""
    dtype = ratio.dtype
    rows = jnp.arange(MAX_ORDER + 1, dtype=order.dtype)
    within = (rows <= order).astype(dtype)
    change = change_step(order, ratio)
    psi = jnp.asarray(LEADING, dtype) * within / jnp.asarray(NEWTON, dtype)[order]
    weights = jnp.concatenate([change, within[None] @ change, psi[None] @ change])
    out = jtu.tree_map(lambda x: weighted(weights, x), differences)
    part = lambda i: jtu.tree_map(lambda x: x[i], out)
    return Prediction(part(slice(MAX_ORDER + 1)), part(-2), part(-1))


def change_step(order: Count, ratio: Scalar) -> Float[Array, "rows rows"]:
    """W with D* = W D: differences for the step size ratio·h, of the same polynomial.

    Rows above the order are left alone. For ratio = 1 the identity, without rounding.

    Source: Shampine & Reichelt 1997, section 2.2 (D* = D R U with columns; here rows).
    """
    rows = jnp.arange(MAX_ORDER + 1, dtype=order.dtype)
    full = (_steps_back(ratio) @ _steps_back(jnp.ones_like(ratio))).T
    within = (rows[:, None] <= order) & (rows[None, :] <= order)
    return jnp.where(within, full, jnp.eye(MAX_ORDER + 1, dtype=ratio.dtype))


def _steps_back(ratio: Scalar) -> Float[Array, "rows rows"]:
    """Column j: how y(t_n − j·ratio·h) is made of ∇⁰y … ∇⁵y, the binomials of −j·ratio."""
    i = jnp.arange(1, MAX_ORDER + 1).astype(ratio.dtype)[:, None]
    j = jnp.arange(MAX_ORDER + 1).astype(ratio.dtype)[None, :]
    factors = (i - 1 - ratio * j) / i
    return jnp.cumprod(jnp.concatenate([jnp.ones_like(factors[:1]), factors]), axis=0)


def advance(differences: Vector, d: Vector, order: Count, y: Vector) -> Vector:
    """The differences at the new point y = y⁽⁰⁾ + d: ∇ʲ = Σ_{j≤m≤k} ∇ᵐ_old + d.

    Those above ∇ᵏ⁺¹ = d are zero.
    """
    rows = jnp.arange(MAX_ORDER + 1, dtype=order.dtype)
    i, m = rows[:, None], rows[None, :]
    sums = (m >= i) & (m <= order)
    with_d = (rows <= order + 1)[:, None]

    def one(old, d, y):
        matrix = jnp.concatenate([sums, with_d], axis=1).astype(old.dtype)
        new = weighted(matrix, jnp.concatenate([old, d[None]]))
        return new.at[0].set(y)

    return jtu.tree_map(one, differences, d, y)


def polynomial(differences: Vector, order: Count) -> Vector:
    """The differences without the rows above the order."""
    rows = jnp.arange(MAX_ORDER + 1, dtype=order.dtype)

    def one(x):
        within = (rows <= order).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(within, x, jnp.zeros_like(x))

    return jtu.tree_map(one, differences)


def row(differences: Vector, i: Count) -> Vector:
    """∇ⁱy."""
    take = lambda x: lax.dynamic_index_in_dim(x, jnp.clip(i, 0, MAX_ORDER), keepdims=False)
    return jtu.tree_map(take, differences)


def weighted(weights: Inexact[Array, "out rows"], x: Array) -> Array:
    """Σ_m weights_im x_m, in full precision on accelerators too."""
    weights = weights.astype(x.dtype)
    return jnp.tensordot(weights, x, 1, precision=jax.lax.Precision.HIGHEST)

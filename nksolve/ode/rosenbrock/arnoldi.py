"""A small Arnoldi process that is differentiated as it stands."""

from collections.abc import Callable

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from ... import tree
from ...typing import Count, Scalar, Vector
from ..esdirk import combined, put


def arnoldi(mv: Callable[[Vector], Vector], start: Vector, size: int) -> tuple[Vector, Array]:
    """(V, H): V of `size` orthonormal vectors, as rows of the leaves, from `start`; H = VᵀAV.

    By classical Gram–Schmidt, twice. Complex entries count as pairs of real ones, so that A need
    only be real-linear. Where the space is exhausted, V and H end in zeros: VHVᵀ is what it was.
    """
    dtype = tree.real_dtype(start)
    first, _ = normalised(start, jnp.zeros((), dtype))
    basis = jtu.tree_map(lambda x: jnp.zeros((size, *x.shape), x.dtype), start)
    basis = put(basis, 0, first)

    def extended(basis, j):
        new, h, norm = next_vector(mv, basis, j)
        # The last vector is not kept: its place does not exist.
        h = h.at[j + 1].set(norm, mode="drop")
        rows = jtu.tree_map(lambda rows, x: rows.at[j + 1].set(x, mode="drop"), basis, new)
        return rows, h

    basis, columns = lax.scan(extended, basis, jnp.arange(size))
    return basis, columns.T


def next_vector(
    mv: Callable[[Vector], Vector], basis: Vector, j: Count
) -> tuple[Vector, Array, Scalar]:
    """(v, h, ‖w‖): A v_j = V h + w with w = ‖w‖ v; v and ‖w‖ are zero where w is rounding.

    Rows of the basis that are not in use must be zero.
    """
    w = mv(jtu.tree_map(lambda rows: rows[j], basis))
    least = jnp.asarray(100 * tree.eps(w), tree.real_dtype(w)) * _norm(w)
    h = projected(basis, w)
    w = tree.sub(w, combined(h, basis))
    again = projected(basis, w)
    w = tree.sub(w, combined(again, basis))
    new, norm = normalised(w, least)
    return new, h + again, norm


def projected(basis: Vector, v: Vector) -> Array:
    """Vᵀ v, in real arithmetic."""
    dtype = tree.real_dtype(v)

    def one(rows, x):
        found = jnp.tensordot(jnp.conj(rows), x, x.ndim)
        return found.real.astype(dtype)

    products = jtu.tree_leaves(jtu.tree_map(one, basis, v))
    return jnp.sum(jnp.stack(products), axis=0)


def normalised(v: Vector, least: Scalar) -> tuple[Vector, Scalar]:
    """(v/‖v‖, ‖v‖); zero where the norm is not above `least`."""
    norm = _norm(v)
    alive = norm > least
    safe = jnp.where(alive, norm, jnp.ones_like(norm))
    factor = jnp.where(alive, 1 / safe, jnp.zeros_like(norm))
    return tree.scale(factor, v), jnp.where(alive, norm, jnp.zeros_like(norm))


def _norm(v: Vector) -> Scalar:
    """‖v‖ with a derivative at zero, which is zero."""
    dtype = tree.real_dtype(v)
    squares = [jnp.sum((x.real**2 + x.imag**2).astype(dtype)) for x in jtu.tree_leaves(v)]
    total = sum(squares[1:], squares[0])
    positive = total > 0
    root = jnp.sqrt(jnp.where(positive, total, jnp.ones_like(total)))
    return jnp.where(positive, root, jnp.zeros_like(root))

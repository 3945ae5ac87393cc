"""The part of J that stands at the nodes of a grid, and its inverse.

Entries come from matvecs with seeds: nodes that a stencil of the given reach keeps apart share one,
so that (reach + 1)^d seeds a component give every entry that couples a node to itself.
"""

import abc
import functools as ft
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jax import lax
from jaxtyping import Array, Inexact

from .. import tree
from ..typing import Scalar, Vector


class NodeInverse(eqx.Module):
    """b → c B⁻¹ b with B the blocks of J at the nodes, by their inverses.

    `inverse` has the shape of the grid where a node has one unknown, and (…grid, c, c) otherwise,
    or (…grid, c) where only diagonals were kept.
    """

    inverse: Inexact[Array, "..."]
    ndim: int = eqx.field(static=True)

    def mv(self, vector: Vector) -> Vector:
        structure = tree.structure(vector)
        b = to_nodes(vector, self.ndim)
        extra = self.inverse.ndim - self.ndim
        if extra == 0:
            out = self.inverse[..., None] * b
        elif extra == 1:
            out = self.inverse * b
        else:
            out = jnp.sum(self.inverse * b[..., None, :], axis=-1)
        return from_nodes(out, structure, self.ndim)

    def transpose(self) -> "NodeInverse":
        if self.inverse.ndim - self.ndim < 2:
            return self
        return NodeInverse(jnp.swapaxes(self.inverse, -1, -2), self.ndim)

    def scaled(self, factor: Scalar) -> "NodeInverse":
        """c B⁻¹ with c multiplied by `factor`."""
        return NodeInverse(factor.astype(self.inverse.dtype) * self.inverse, self.ndim)


class AbstractNodes(eqx.Module):
    """Which entries at a node are inverted."""

    reach: eqx.AbstractVar[int]

    @abc.abstractmethod
    def init(self, operator: lx.AbstractLinearOperator, ndim: int) -> tuple[NodeInverse, Scalar]:
        """B⁻¹, and a bound of the spectral radius of B⁻¹J."""

    def num_probes(self, structure: tree.Structure, ndim: int) -> int:
        """Matvecs that `init` makes."""
        return (self.reach + 1) ** ndim * num_components(structure, ndim)


class NodeBlocks(AbstractNodes):
    """The block of all unknowns at a node: block Jacobi. With one unknown a node, the diagonal.

    **Arguments:**

    - `reach`: how many nodes away, along each axis, an unknown is still coupled to.

    Storage: c numbers an unknown, for c unknowns a node. Work of an update: (reach + 1)^d · c
    matvecs.
    """

    reach: int = eqx.field(static=True, default=1)

    def init(self, operator: lx.AbstractLinearOperator, ndim: int) -> tuple[NodeInverse, Scalar]:
        blocks, others = probed(operator, ndim, self.reach)
        if blocks.shape[-1] == 1:
            return _of_diagonal(blocks[..., 0, 0], others[..., 0, 0], ndim)
        inverse = inverted(blocks)
        rows = jnp.sum(jnp.abs(inverse)[..., :, :, None] * others[..., None, :, :], axis=(-1, -2))
        return NodeInverse(inverse, ndim), 1 + jnp.max(rows)


class NodeDiagonal(AbstractNodes):
    """The diagonal alone: point Jacobi.

    **Arguments:**

    - `reach`: as for `NodeBlocks`.

    Storage: one vector. Work of an update: that of `NodeBlocks`.
    """

    reach: int = eqx.field(static=True, default=1)

    def init(self, operator: lx.AbstractLinearOperator, ndim: int) -> tuple[NodeInverse, Scalar]:
        blocks, others = probed(operator, ndim, self.reach)
        if blocks.shape[-1] == 1:
            return _of_diagonal(blocks[..., 0, 0], others[..., 0, 0], ndim)
        diagonal = jnp.diagonal(blocks, axis1=-2, axis2=-1)
        inside = jnp.sum(jnp.abs(blocks), axis=-1) - jnp.abs(diagonal)
        return _of_diagonal(diagonal, inside + jnp.sum(others, axis=-1), ndim)


def _of_diagonal(diagonal: Array, others: Array, ndim: int) -> tuple[NodeInverse, Scalar]:
    zero = diagonal == 0
    inverse = 1 / jnp.where(zero, jnp.ones_like(diagonal), diagonal)
    return NodeInverse(inverse, ndim), 1 + jnp.max(others * jnp.abs(inverse))


def num_components(structure: tree.Structure, ndim: int) -> int:
    """Unknowns at a node."""
    shapes = [leaf.shape[ndim:] for leaf in jtu.tree_leaves(structure)]
    return int(sum(np.prod(shape, dtype=int) for shape in shapes))


def to_nodes(vector: Vector, ndim: int) -> Inexact[Array, "..."]:
    """The leaves side by side: (…grid, components)."""
    leaves = jtu.tree_leaves(vector)
    flat = [leaf.reshape(*leaf.shape[:ndim], -1) for leaf in leaves]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=-1)


def from_nodes(nodes: Inexact[Array, "..."], structure: tree.Structure, ndim: int) -> Vector:
    """The vector of that structure; undoes `to_nodes`."""
    leaves, treedef = jtu.tree_flatten(structure)
    sizes = [int(np.prod(leaf.shape[ndim:], dtype=int)) for leaf in leaves]
    parts = jnp.split(nodes, np.cumsum(sizes)[:-1], axis=-1) if len(leaves) > 1 else [nodes]
    shaped = [
        part.reshape(leaf.shape).astype(leaf.dtype)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jtu.tree_unflatten(treedef, shaped)


def probed(
    operator: lx.AbstractLinearOperator, ndim: int, reach: int
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
    """(B, S): the blocks at the nodes, (…grid, c, c), and at [p, q] the sum over the other nodes,
    in absolute values by colour, of the entries that couple p to the unknown q there.

    Exact where the entries of a row in one colour have one sign, an underestimate otherwise. One
    matvec after the other, so that no more than the two results is kept.
    """
    structure = operator.in_structure()
    shape = jtu.tree_leaves(structure)[0].shape[:ndim]
    period, c = reach + 1, num_components(structure, ndim)
    dtype = tree.scalar_dtype(structure)
    colours = [np.stack(np.unravel_index(k, (period,) * ndim)) for k in range(period**ndim)]
    offsets = jnp.asarray(np.repeat(colours, c, axis=0), jnp.int32)

    # One array takes both sums, and one component of it changes at a time: a single kernel then
    # holds seed, product and sum.
    both = (2, *shape, c)
    is_inside = lax.broadcasted_iota(jnp.int32, both, 0) == 0

    def add(k, sums):
        lines = [lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(ndim)]
        meets = [line % period == offsets[k, axis] for axis, line in enumerate(lines)]
        here = ft.reduce(jnp.logical_and, meets)[..., None]
        component = lax.broadcasted_iota(jnp.int32, (*(1,) * ndim, c), ndim) == (k % c).astype(
            jnp.int32
        )
        seed = (here & component).astype(dtype)
        out = to_nodes(operator.mv(from_nodes(seed, structure, ndim)), ndim).astype(dtype)
        chosen = jnp.where(is_inside, out[None], jnp.abs(out)[None].astype(dtype))
        chosen = jnp.where(here[None] == is_inside, chosen, jnp.zeros_like(chosen))
        if c == 1:
            return sums + chosen[:, None]
        old = lax.dynamic_index_in_dim(sums, k % c, axis=1, keepdims=False)
        return lax.dynamic_update_index_in_dim(sums, old + chosen, k % c, axis=1)

    sums = lax.fori_loop(0, len(offsets), add, jnp.zeros((2, c, *shape, c), dtype))
    blocks, others = jnp.moveaxis(sums, 1, -1)
    return blocks, others.real


def inverted(blocks: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """The inverses of small matrices in the last two axes, by Gauss–Jordan elimination with partial
    pivoting over all nodes at once; a pivot that is zero counts as one."""
    c = blocks.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(c, dtype=blocks.dtype), blocks.shape)
    table = jnp.concatenate([blocks, eye], axis=-1)
    rows = lax.broadcasted_iota(jnp.int32, (*(1,) * (blocks.ndim - 2), c), blocks.ndim - 2)

    def eliminate(k, table):
        column = jnp.take(table, k, axis=-1)
        k = jnp.asarray(k, jnp.int32)
        size = jnp.where(rows >= k, jnp.abs(column), -jnp.ones_like(jnp.abs(column)))
        pivot = jnp.argmax(size, axis=-1).astype(jnp.int32)[..., None]
        is_k, is_pivot = rows == k, rows == pivot
        row_k = _row(table, is_k)
        row = _row(table, is_pivot)
        table = jnp.where(is_pivot[..., None], row_k[..., None, :], table)
        head = jnp.take(row, k, axis=-1)
        row = row / jnp.where(head == 0, jnp.ones_like(head), head)[..., None]
        column = jnp.take(table, k, axis=-1)[..., None]
        return jnp.where(is_k[..., None], row[..., None, :], table - column * row[..., None, :])

    return lax.fori_loop(0, c, eliminate, table)[..., c:]


def _row(table: Array, which: Any) -> Array:
    return jnp.sum(jnp.where(which[..., None], table, jnp.zeros_like(table)), axis=-2)

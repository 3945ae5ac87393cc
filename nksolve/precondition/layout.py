"""A vector as arrays of shape (*nodes, block): which entries make up the blocks of J."""

import abc
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array

from .. import tree
from ..typing import Vector


class AbstractLayout(eqx.Module):
    """A one-to-one map between the vectors of a space and lists of arrays (*nodes, block).

    Laws: `join(split(v)) == v`; entries that only pad the last block are zero after `split` and
    dropped by `join`.
    """

    @property
    @abc.abstractmethod
    def shapes(self) -> list[tuple[int, ...]]:
        """(*nodes, block) for each part."""

    @property
    @abc.abstractmethod
    def dtypes(self) -> list[np.dtype]:
        """The dtype in which each part is computed: that of its entries, at least float32."""

    @abc.abstractmethod
    def split(self, vector: Vector) -> list[Array]:
        """The parts of a vector."""

    @abc.abstractmethod
    def join(self, parts: Sequence[Array]) -> Vector:
        """The vector with these parts."""


class ByLeaf(AbstractLayout):
    """Each leaf is a part; its last axis is the block. A scalar leaf is one block of one."""

    frozen: tuple = eqx.field(static=True, converter=tree.freeze)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [leaf.shape or (1,) for leaf in self.frozen[0]]

    @property
    def dtypes(self) -> list[np.dtype]:
        return [tree.scalar_dtype(leaf) for leaf in self.frozen[0]]

    def split(self, vector: Vector) -> list[Array]:
        parts = zip(jtu.tree_leaves(vector), self.shapes, self.dtypes, strict=True)
        return [leaf.reshape(shape).astype(dtype) for leaf, shape, dtype in parts]

    def join(self, parts: Sequence[Array]) -> Vector:
        leaves, treedef = self.frozen
        shaped = zip(parts, leaves, strict=True)
        return jtu.tree_unflatten(
            treedef, [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in shaped]
        )


class ByNode(AbstractLayout):
    """The first `node_axes` axes, common to all leaves, are the nodes; the block at a node is every
    entry of every leaf there, leaf after leaf."""

    frozen: tuple = eqx.field(static=True, converter=tree.freeze)
    node_axes: int = eqx.field(static=True)

    def __check_init__(self):
        shapes = [leaf.shape for leaf in self.frozen[0]]
        nodes = {shape[: self.node_axes] for shape in shapes}
        if len(nodes) != 1 or any(len(shape) < self.node_axes for shape in shapes):
            raise ValueError(
                f"The leaves must have their first {self.node_axes} axes, those of the nodes, in "
                f"common, but their shapes are {shapes}. Reshape the unknown, or put it into one "
                "array whose last axis is the block."
            )

    @property
    def nodes(self) -> tuple[int, ...]:
        return self.frozen[0][0].shape[: self.node_axes]

    @property
    def widths(self) -> list[int]:
        """Entries of each leaf at a node."""
        return [math.prod(leaf.shape[self.node_axes :]) for leaf in self.frozen[0]]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [(*self.nodes, sum(self.widths))]

    @property
    def dtypes(self) -> list[np.dtype]:
        return [tree.scalar_dtype(self.frozen[0])]

    def split(self, vector: Vector) -> list[Array]:
        (dtype,) = self.dtypes
        parts = [
            leaf.reshape(*self.nodes, width).astype(dtype)
            for leaf, width in zip(jtu.tree_leaves(vector), self.widths, strict=True)
        ]
        return [jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]]

    def join(self, parts: Sequence[Array]) -> Vector:
        leaves, treedef = self.frozen
        pieces = jnp.split(parts[0], np.cumsum(self.widths)[:-1], axis=-1)
        shaped = zip(pieces, leaves, strict=True)
        return jtu.tree_unflatten(
            treedef, [piece.reshape(leaf.shape).astype(leaf.dtype) for piece, leaf in shaped]
        )


class ByRun(AbstractLayout):
    """Runs of `block` entries in the order of `order`; the last one is filled up with zeros."""

    order: AbstractLayout
    block: int = eqx.field(static=True)

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.order.shapes)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [(-(-self.size // self.block), self.block)]

    @property
    def dtypes(self) -> list[np.dtype]:
        return [np.result_type(*self.order.dtypes)]

    def split(self, vector: Vector) -> list[Array]:
        (dtype,), (shape,) = self.dtypes, self.shapes
        flat = [part.reshape(-1).astype(dtype) for part in self.order.split(vector)]
        flat = jnp.concatenate(flat) if len(flat) > 1 else flat[0]
        if math.prod(shape) > self.size:
            flat = jnp.pad(flat, (0, math.prod(shape) - self.size))
        return [flat.reshape(shape)]

    def join(self, parts: Sequence[Array]) -> Vector:
        flat = parts[0].reshape(-1)[: self.size]
        sizes = [math.prod(shape) for shape in self.order.shapes]
        pieces = zip(jnp.split(flat, np.cumsum(sizes)[:-1]), self.order.shapes, strict=True)
        return self.order.join([piece.reshape(shape) for piece, shape in pieces])


def along_line(structure: tree.Structure, name: str) -> ByNode:
    """The order of a one-dimensional system: node after node along the first axis of all leaves."""
    leaves = jtu.tree_leaves(structure)
    if len(leaves) > 1 and any(leaf.ndim == 0 for leaf in leaves):
        raise ValueError(
            f"`{name}` needs leaves with a common first axis, that of the nodes, but one of them "
            "is a scalar. Put the unknown into one array in the order of the band."
        )
    return ByNode(structure, min(1, leaves[0].ndim))


def check_space(operator: lx.AbstractLinearOperator, name: str) -> tree.Structure:
    """The structure of a square operator whose entries are all real or all complex."""
    structure = operator.in_structure()
    if structure != operator.out_structure():
        raise ValueError(
            f"`{name}` needs a square operator whose unknown and residual have the same structure; "
            f"got {structure} and {operator.out_structure()}."
        )
    kinds = {jnp.issubdtype(x.dtype, jnp.complexfloating) for x in jtu.tree_leaves(structure)}
    if len(kinds) > 1:
        raise ValueError(
            f"`{name}` needs leaves that are all real or all complex, but the unknown mixes them: "
            "keep real and imaginary parts in real leaves."
        )
    return structure


def check_blocks(blocks: Any, shape: tuple[int, ...], dtype: np.dtype, name: str) -> Array:
    """An array of blocks that a user's function returned."""
    blocks = jnp.asarray(blocks)
    if blocks.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, but it has {blocks.shape}.")
    if jnp.iscomplexobj(blocks) and not np.issubdtype(dtype, np.complexfloating):
        raise ValueError(f"{name} must be real, as the unknown is.")
    return blocks.astype(dtype)

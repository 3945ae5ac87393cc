"""Block diagonal scaling: a small dense matrix at each node."""

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array

from .. import tree
from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..typing import Args, Vector, Y
from .base import AbstractPreconditioner
from .blocks import matvec, scaled_inverse, transpose
from .layout import AbstractLayout, ByLeaf, ByNode, ByRun, check_blocks, check_space
from .stencil import AbstractStencil, Colours, as_stencil, pick, push

#: A leaf with one axis is one block; beyond this size it is a mistake.
_LARGEST_LEAF = 512


class BlockJacobi(AbstractPreconditioner):
    """M = the block diagonal of J: M⁻¹v = J_kk⁻¹ v_k, node by node.

    The blocks are the last axis of each leaf (a leaf of shape (m, m, 6) has 6 × 6 blocks at m × m
    nodes), runs of `block` entries of the ravelled unknown, or, by `node_axes`, everything that
    all leaves hold at a node.

    **Arguments:**

    - `block`: length of the runs; the number of unknowns must be divisible by it.
    - `node_axes`: how many leading axes, the same in all leaves, are the nodes: with 2, leaves
      u and v of shape (m, m) have 2 × 2 blocks.
    - `coupling`: which nodes couple, so that the probes can tell the blocks apart: a half-width,
      a tuple of one for each axis of the nodes, `nks.Box` or `nks.Star` (`nks.Star()`: the
      five-point stencil). With 0 all nodes are excited together, which is exact where they do not
      couple and otherwise gives, at each node, the sum of J's blocks in that row ("lumped").
    - `blocks`: instead of probing, `(y, args) -> J_kk`, an array of shape (*nodes, b, b), or with
      the blocks by leaf a PyTree of such with the structure of y.

    A complex unknown counts as complex-linear: of a residual that is not holomorphic the probes
    see one part only.

    Singular blocks are replaced by the identity.

    Storage: b vectors, the inverses. Work: b multiplications and additions an entry; an update
    (colours × b) matvecs in one batch, for each leaf where the blocks are by leaf, and one inverse
    of b × b a node.
    """

    block: int | None = eqx.field(static=True, default=None)
    node_axes: int | None = eqx.field(static=True, default=None, kw_only=True)
    coupling: AbstractStencil | None = eqx.field(
        default=None,
        kw_only=True,
        converter=lambda x: None if x is None else as_stencil(x, "`coupling`"),
    )
    blocks: Callable[[Y, Args], Any] | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        if (self.coupling is None) == (self.blocks is None):
            raise ValueError(
                "`BlockJacobi` needs to know where the blocks come from, one of: "
                "`coupling=nks.Star()` for a five-point stencil, `coupling=(w, ...)` for other "
                "half-widths in nodes, `coupling=0` where nodes do not couple; or `blocks=fn` with "
                "`fn(y, args)` that returns them."
            )
        if self.block is not None and (self.node_axes is not None or self.block < 1):
            raise ValueError(
                "`block` must be at least 1, and `block` and `node_axes` exclude one another; got "
                f"block={self.block}, node_axes={self.node_axes}."
            )

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        structure = check_space(operator, "BlockJacobi")
        if tree.size(structure) == 0:
            return lx.IdentityLinearOperator(operator.out_structure(), structure)
        layout = self._layout(structure)
        if self.blocks is None:
            blocks = self._probed(operator, layout)
        else:
            blocks = self._given(layout, y, args)
        inverses = _BlockDiagonal([scaled_inverse(part) for part in blocks], layout)
        return JacobianOperator(inverses, operator.out_structure(), structure)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        del y, args
        structure = operator.in_structure()
        if self.coupling is None or tree.size(structure) == 0:
            return 0
        return sum(count for _, count in self._colours(self._layout(structure)))

    def _layout(self, structure: tree.Structure) -> AbstractLayout:
        if self.node_axes is not None:
            return ByNode(structure, self.node_axes)
        if self.block is None:
            shapes = [leaf.shape for leaf in jtu.tree_leaves(structure)]
            if any(len(shape) == 1 and shape[0] > _LARGEST_LEAF for shape in shapes):
                raise ValueError(
                    "`BlockJacobi()` takes the last axis of each leaf for a block; a leaf with one "
                    f"axis would be one dense matrix, and the shapes are {shapes}. Give "
                    "`block=b` for runs of b entries, or `node_axes=1` for blocks across leaves."
                )
            return ByLeaf(structure)
        layout = ByRun(ByLeaf(structure), self.block)
        if layout.size % self.block:
            raise ValueError(
                f"`BlockJacobi({self.block})`: the {layout.size} unknowns do not divide into runs "
                f"of {self.block}. Choose a divisor, or pad the unknown."
            )
        return layout

    def _colours(self, layout: AbstractLayout) -> list[tuple[Colours, int]]:
        """For each part, the colour of each entry, and how many there are."""
        assert self.coupling is not None
        found = []
        for *nodes, b in layout.shapes:
            colours, count = self.coupling.colours(tuple(nodes))
            components = jnp.arange(b, dtype=jnp.int32)
            found.append(
                (colours[..., None] * b + components.reshape(*[1] * len(nodes), b), count * b)
            )
        return found

    def _probed(self, operator: lx.AbstractLinearOperator, layout: AbstractLayout) -> list[Array]:
        colours = self._colours(layout)
        ends = list(itertools.accumulate(count for _, count in colours))
        seeds = [c + (end - count) for (c, count), end in zip(colours, ends, strict=True)]

        def mv(parts):
            return layout.split(operator.mv(layout.join(parts)))

        columns = push(mv, seeds, ends[-1], layout.dtypes)
        blocks = []
        for part, (colour, count), end in zip(columns, colours, ends, strict=True):
            *nodes, b = part.shape[1:]
            own = part[end - count : end].reshape(count // b, b, *nodes, b)
            # Component k of a node's colour shows column k of its block.
            own = jnp.moveaxis(own, 1, -1)
            blocks.append(pick(own, colour[..., 0] // b))
        return blocks

    def _given(self, layout: AbstractLayout, y: Y, args: Args) -> list[Array]:
        assert self.blocks is not None
        blocks = jtu.tree_leaves(eqx.filter(self.blocks(y, args), eqx.is_inexact_array))
        wanted = [(*shape, shape[-1]) for shape in layout.shapes]
        if len(blocks) != len(wanted):
            raise ValueError(
                f"`BlockJacobi(blocks=fn)`: fn returned {len(blocks)} arrays instead of "
                f"{len(wanted)}, of shapes {wanted}."
            )
        name = "`BlockJacobi(blocks=fn)`: the array that fn returns"
        return [
            check_blocks(part, shape, dtype, name)
            for part, shape, dtype in zip(blocks, wanted, layout.dtypes, strict=True)
        ]


class _BlockDiagonal(AbstractLinearMap):
    """v → B_k v_k."""

    parts: list[Array]
    layout: AbstractLayout

    def mv(self, vector: Vector) -> Vector:
        return self.layout.join(list(map(matvec, self.parts, self.layout.split(vector))))

    def transpose_mv(self, vector: Vector) -> Vector:
        turned = map(transpose, self.parts)
        return self.layout.join(list(map(matvec, turned, self.layout.split(vector))))

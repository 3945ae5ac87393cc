"""The diagonal of J from a few matvecs."""

import abc
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, Int

from .. import tree
from ..typing import Vector
from .stencil import AbstractStencil, as_stencil, pick, push


class AbstractProbes(eqx.Module):
    """Finds or estimates diag(J) by one batch of matvecs."""

    @abc.abstractmethod
    def diagonal(self, operator: lx.AbstractLinearOperator) -> Vector:
        """diag(J), in the structure of the unknown."""

    @abc.abstractmethod
    def num_probes(self, structure: tree.Structure) -> int:
        """Matvecs that `diagonal` makes."""


class StencilProbes(AbstractProbes):
    """diag(J), exact where the stencil holds: each entry of each leaf is a node.

    **Arguments:**

    - `stencil`: which entries of a leaf couple; a half-width, a tuple of one for each axis,
      `nks.Box` or `nks.Star`. Leaves may couple with one another in any way.

    Matvecs: the colours of the stencil, for each leaf.
    """

    stencil: AbstractStencil = eqx.field(converter=lambda x: as_stencil(x, "`stencil`"))

    def diagonal(self, operator: lx.AbstractLinearOperator) -> Vector:
        leaves, treedef = jtu.tree_flatten(operator.in_structure())
        counts = self._counts(leaves)
        ends = list(itertools.accumulate(counts))
        colours = [
            self.stencil.colours(leaf.shape)[0] + end - count
            for leaf, end, count in zip(leaves, ends, counts, strict=True)
        ]

        def mv(parts):
            return jtu.tree_leaves(operator.mv(jtu.tree_unflatten(treedef, parts)))

        columns = push(mv, colours, sum(counts), [leaf.dtype for leaf in leaves])
        return jtu.tree_unflatten(treedef, map(pick, columns, colours))

    def num_probes(self, structure: tree.Structure) -> int:
        return sum(self._counts(jtu.tree_leaves(structure)))

    def _counts(self, leaves: list[jax.ShapeDtypeStruct]) -> list[int]:
        return [self.stencil.colours(leaf.shape)[1] for leaf in leaves]


class ColouredProbes(AbstractProbes):
    """diag(J) by colours that are known for each entry, leaf after leaf.

    **Arguments:**

    - `colours`: integers, one for each entry of the unknown: entries i ≠ j of one colour must have
      J_ij = 0. The column colours of any Jacobian colouring (asdex: `color_cols`) will do.
    - `num_colours`: how many there are; by default one more than the largest.

    Matvecs: `num_colours`.
    """

    colours: Int[Array, " n"]
    num_colours: int = eqx.field(static=True)

    def __init__(self, colours: Any, num_colours: int | None = None):
        if num_colours is None:
            num_colours = int(np.max(np.asarray(colours), initial=-1)) + 1
        self.colours = jnp.asarray(colours, jnp.int32)
        self.num_colours = num_colours

    def diagonal(self, operator: lx.AbstractLinearOperator) -> Vector:
        structure = operator.in_structure()
        if self.colours.shape != (tree.size(structure),):
            raise ValueError(
                f"The colours must be one integer for each of the {tree.size(structure)} entries "
                f"of the unknown, leaf after leaf, but their shape is {self.colours.shape}."
            )
        leaves, treedef = jtu.tree_flatten(structure)
        parts = jnp.split(self.colours, np.cumsum([leaf.size for leaf in leaves])[:-1])
        colours = [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]

        def mv(seeds):
            return jtu.tree_leaves(operator.mv(jtu.tree_unflatten(treedef, seeds)))

        columns = push(mv, colours, self.num_colours, [leaf.dtype for leaf in leaves])
        return jtu.tree_unflatten(treedef, map(pick, columns, colours))

    def num_probes(self, structure: tree.Structure) -> int:
        del structure
        return self.num_colours


class Hutchinson(AbstractProbes):
    """An estimate of diag(J) where nothing is known of its pattern: the mean of s ⊙ J s over random
    signs s.

    Unbiased; the error of entry i has the variance Σ_{j≠i} |J_ij|² / probes, so it serves where
    the diagonal dominates. The signs are drawn from `seed`, the same at every linearisation.

    **Arguments:**

    - `probes`: how many.
    - `seed`: of the signs.

    Matvecs: `probes`.

    Source: Bekas, Kokiopoulou & Saad, Appl. Numer. Math. 57, 2007, eq. 4.
    """

    probes: int = eqx.field(static=True, default=16)
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        if self.probes < 1:
            raise ValueError(f"`probes` must be at least 1, but it is {self.probes}.")

    def diagonal(self, operator: lx.AbstractLinearOperator) -> Vector:
        leaves, treedef = jtu.tree_flatten(operator.in_structure())
        keys = jax.random.split(jax.random.key(self.seed), max(1, len(leaves)))
        signs = [
            jax.random.rademacher(key, (self.probes, *leaf.shape), jnp.int8).astype(leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=False)
        ]
        signs = jtu.tree_unflatten(treedef, signs)
        columns = jax.vmap(operator.mv)(signs)
        return jtu.tree_map(lambda s, js: jnp.mean(s * js, axis=0), signs, columns)

    def num_probes(self, structure: tree.Structure) -> int:
        del structure
        return self.probes


def as_probes(probes: Any) -> AbstractProbes | None:
    """Probes from what stands for them: a stencil, or an object that carries colours."""
    if probes is None or isinstance(probes, AbstractProbes):
        return probes
    for name in ("colours", "colors"):
        if not isinstance(probes, AbstractStencil) and hasattr(probes, name):
            return ColouredProbes(getattr(probes, name))
    return StencilProbes(as_stencil(probes, "`probes`"))

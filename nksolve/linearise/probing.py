"""Entries of J from matvecs with seed vectors: one batched push through the linearisation."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, Inexact

from .. import tree


def ravel(vector: tree.Vector) -> Inexact[Array, " n"]:
    """The entries of a vector, leaf after leaf, in the dtype that holds them all."""
    dtype = tree.scalar_dtype(vector)
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in jtu.tree_leaves(vector)])


def unravel(flat: Inexact[Array, " n"], structure: tree.Structure) -> tree.Vector:
    """The vector of that structure whose entries these are."""
    leaves, treedef = jtu.tree_flatten(structure)
    splits = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = jnp.split(flat, splits)
    shaped = [
        part.reshape(leaf.shape).astype(leaf.dtype)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jtu.tree_unflatten(treedef, shaped)


def compressed(
    operator: lx.AbstractLinearOperator, colours: np.ndarray, num_colours: int
) -> Inexact[Array, "colours n"]:
    """J S for the seeds S_jc = 1 where column j has colour c: c matvecs in one batch.

    Where columns of one colour share no row, entry (i, j) of J is `out[colours[j], i]` for every
    (i, j) of the pattern. `colours` counts the entries of the unknown leaf after leaf.
    """
    structure = operator.in_structure()
    dtype = tree.scalar_dtype(structure)
    seeds = jnp.asarray(colours, jnp.int32)

    def column(c):
        return ravel(operator.mv(unravel((seeds == c).astype(dtype), structure)))

    return jax.vmap(column)(jnp.arange(num_colours, dtype=jnp.int32))

"""Shadow vectors: what the two-sided methods make their residuals orthogonal to."""

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from .. import tree
from ..typing import Count, Vector
from .basis import Basis
from .orthogonalise import CGS2
from .short_recurrence import Context, Progress

# Any fixed number: solves are reproducible.
_SEED = 1993


def random_like(vector: Vector, i: Count | int) -> Vector:
    """The i-th of a fixed sequence of vectors like `vector`, uniform in (−1, 1), real and imaginary
    part.

    A hash of the index (MurmurHash3's finaliser) in place of `jax.random`, whose generator takes
    0.4 s to compile for the CPU, where a whole BiCGStab takes 0.5 s.
    """
    stream = jnp.asarray(i).astype(jnp.uint32) * jnp.uint32(2)
    leaves, treedef = jtu.tree_flatten(vector)
    drawn, start = [], 0
    for leaf in leaves:
        index = jnp.arange(start, start + leaf.size, dtype=jnp.uint32)
        part = _uniform(index, stream, jnp.finfo(leaf.dtype).dtype)
        if jnp.iscomplexobj(leaf):
            part = lax.complex(part, _uniform(index, stream + jnp.uint32(1), part.dtype))
        drawn.append(part.reshape(leaf.shape))
        start += leaf.size
    return jtu.tree_unflatten(treedef, drawn)


def _uniform(index: Array, stream: Array, dtype: np.dtype) -> Array:
    bits = _mixed(_mixed(index) + _mixed(stream + jnp.uint32(_SEED)))
    wide = np.promote_types(dtype, np.float32)
    return ((bits >> 8).astype(wide) * wide.type(2.0**-23) - wide.type(1)).astype(dtype)


def _mixed(bits: Array) -> Array:
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def shadow_residual(context: Context, progress: Progress) -> Vector:
    """r̃ of a round that starts from r: r itself at first.

    A later round follows a breakdown, which r̃ = r may meet again: there r̃ has half of a random
    direction beside r, so that |⟨r̃, r⟩| ≥ ½ ‖r‖ still.
    """

    def renewed():
        direction = random_like(progress.r, progress.num_steps)
        part = 0.5 * context.norm(progress.r) / context.norm(direction)
        return tree.axpy(part, direction, progress.r)

    return lax.cond(progress.num_steps > 0, renewed, lambda: progress.r)


def shadow_space(vector: Vector, size: int, *, real: bool) -> Basis:
    """An orthonormal basis of a random space of `size` dimensions."""

    def append(i: Count, basis: Basis) -> Basis:
        return CGS2().append(basis, random_like(vector, i), i).basis

    return lax.fori_loop(0, jnp.int32(size), append, Basis.allocate(vector, size, real=real))

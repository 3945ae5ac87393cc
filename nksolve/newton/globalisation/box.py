"""A box lower ≤ y ≤ upper, given by prefixes of y."""

from typing import Any, NamedTuple

import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from ... import tree
from ...typing import Vector


class Box(NamedTuple):
    """The bounds of each entry: trees like y, whose leaves are arrays of the shapes and dtypes of
    its leaves, or scalars. −∞ and ∞ where there is no bound."""

    lower: Vector
    upper: Vector


def box(lower: PyTree, upper: PyTree, variables: Vector) -> Box:
    """The box of y whose inexact arrays are `variables`."""
    return Box(
        _spread(lower, variables, "lower", -np.inf), _spread(upper, variables, "upper", np.inf)
    )


def _spread(bounds: PyTree, variables: Vector, name: str, absent: float) -> Vector:
    def leaf(bound: Any, x: Array) -> Array:
        if jnp.iscomplexobj(x) or jnp.iscomplexobj(bound):
            raise TypeError(
                f"`{name}` bounds a complex unknown, which has no order. Bound its real and "
                "imaginary parts, as two real unknowns."
            )
        bound = jnp.asarray(bound).astype(x.dtype)
        if bound.ndim == 0:
            return bound
        try:
            return jnp.broadcast_to(bound, x.shape)
        except ValueError:
            raise ValueError(
                f"`{name}` has the shape {bound.shape} where y has {x.shape}. Give a number or an "
                "array that broadcasts to that shape."
            ) from None

    def subtree(bound: Any, part: PyTree) -> PyTree:
        bound = absent if bound is None else bound
        return jtu.tree_map(lambda x: leaf(bound, x), part)

    try:
        return jtu.tree_map(subtree, bounds, variables, is_leaf=_is_none)
    except (ValueError, TypeError) as error:
        if str(error).startswith("`"):
            raise
        raise ValueError(
            f"`{name}` must be a prefix of y: a number, an array or None (no bound) for each leaf "
            f"or each subtree of it. {error}"
        ) from None


def check_order(lower: PyTree, upper: PyTree) -> None:
    """Raises `ValueError` where bounds whose values are known here cross, or are NaN."""
    if lower is None or upper is None or _is_traced(lower) or _is_traced(upper):
        return
    below, above = _children(lower), _children(upper)
    if below is None and above is None:
        low, high = np.asarray(lower), np.asarray(upper)
        try:
            crossed = not np.all(low <= high)
        except (ValueError, TypeError):  # shapes or types that do not go together: `box` says so
            return
        if crossed:
            raise ValueError(
                f"`lower` must not exceed `upper`, and neither may be NaN, but they are {lower} "
                f"and {upper}."
            )
        return
    # A leaf stands for every leaf of a subtree.
    below = [lower] * len(above or []) if below is None else below
    above = [upper] * len(below) if above is None else above
    if len(below) == len(above):
        for low, high in zip(below, above, strict=True):
            check_order(low, high)


def _children(bounds: PyTree) -> list[Any] | None:
    """The subtrees of a tree one level down; `None` for a leaf."""
    if jtu.treedef_is_leaf(jtu.tree_structure(bounds)):
        return None
    return jtu.tree_leaves(bounds, is_leaf=lambda x: x is not bounds)


def _is_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def _is_none(x: Any) -> bool:
    return x is None


def is_known(a: PyTree) -> bool:
    """Whether no array of a tree is traced."""
    return not any(_is_traced(x) for x in jtu.tree_leaves(a))


def contains(bounds: Box, y: Vector) -> Array:
    """Whether y lies in the box."""
    inside = jtu.tree_map(lambda x, low, high: jnp.all((low <= x) & (x <= high)), y, *bounds)
    return jnp.stack(jtu.tree_leaves(inside) or [jnp.array(True)]).all()


def projected(bounds: Box, y: Vector) -> Vector:
    """The point of the box that is nearest to y; y is NaN where it is."""
    return jtu.tree_map(jnp.clip, y, *bounds)


def towards(bounds: Box, y: Vector, fraction: float) -> Box:
    """The part of the box that is `fraction` of the way from y to each bound."""
    outside = projected(bounds, y)  # where y is not inside itself
    lower = jtu.tree_map(lambda x, low: x - fraction * (x - low), outside, bounds.lower)
    upper = jtu.tree_map(lambda x, high: x + fraction * (high - x), outside, bounds.upper)
    return Box(lower, upper)


def step_inside(bounds: Box, y: Vector, step: Vector) -> Vector:
    """The step from y to the projection of y + s, such that its sum with y as rounded lies in the
    box too."""

    def leaf(y, s, lower, upper):
        # y + fl(z − y) may differ from z, and lie outside by a rounding of s: one unit of it more
        # or less is then enough.
        s = jnp.clip(y + s, lower, upper) - y
        unit = jnp.finfo(s.dtype).eps * jnp.abs(s)
        reached = y + s
        nudged = jnp.where(reached > upper, s - unit, s)
        return jnp.where(reached < lower, s + unit, nudged)

    return jtu.tree_map(leaf, y, step, *bounds)


def largest_factor(bounds: Box, y: Vector, direction: Vector) -> Any:
    """The largest τ ≤ ∞ for which y + τ d lies in the box, y being a point of it; entries that are
    on their bound and point out of it are not counted."""
    dtype = tree.real_dtype(y)

    def leaf(y, d, lower, upper):
        room = jnp.where(d > 0, upper - y, y - lower)
        counted = (room > 0) & (d != 0)
        ratio = jnp.where(counted, room, jnp.inf) / jnp.where(counted, jnp.abs(d), 1)
        return jnp.min(ratio, initial=jnp.inf).astype(dtype)

    factors = jtu.tree_leaves(jtu.tree_map(leaf, y, direction, *bounds))
    return jnp.min(jnp.stack(factors)) if factors else jnp.full((), jnp.inf, dtype)

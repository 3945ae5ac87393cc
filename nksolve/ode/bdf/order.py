"""Which order and step size come next."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from ... import tree
from ...typing import Count, Flag, Scalar, Vector
from .coefficients import ERROR, MAX_ORDER
from .differences import row


class Choice(NamedTuple):
    """The verdict on a step."""

    accepted: Flag
    order: Count
    num_equal: Count  # steps of this order and size since the last change
    factor: Scalar  # wanted: the next step size over this one


def choose(
    norm_of: Callable[[Vector], Scalar],
    old: Vector,
    new: Vector,
    d: Vector,
    *,
    order: Count,
    num_equal: Count,
    safety: Scalar,
    max_order: int,
) -> Choice:
    """Accepts where the error is within the tolerance; after k + 1 steps of one size and order, the
    order among k − 1, k, k + 1 that allows the longest step.

    `old` are the differences before the step, `new` those after it.

    Source: Shampine & Reichelt 1997, section 2.3; orders and factors are compared as in SciPy.
    """
    dtype = safety.dtype
    coefficients = jnp.asarray(ERROR, dtype)
    error = coefficients[order] * norm_of(d)
    accepted = error <= 1
    count = num_equal + 1
    free = count >= order + 1
    below = coefficients[jnp.maximum(order - 1, 1)] * norm_of(row(new, order))
    above = coefficients[jnp.minimum(order + 1, MAX_ORDER)] * norm_of(
        tree.sub(d, row(old, order + 1))
    )
    below = jnp.where(order > 1, below, jnp.inf)
    above = jnp.where(order < max_order, above, jnp.inf)
    # Over all three alike: a solution that these see as exact (constant, say) lets the step grow
    # without end, and is not to raise the order by the rounding of zero.
    errors = jnp.maximum(jnp.stack([below, error, above]), 1e-30)
    powers = -1 / jnp.stack([order, order + 1, order + 2]).astype(dtype)
    factors = errors**powers
    best = jnp.argmax(factors)
    longest = safety * factors[best]
    held = jnp.ones((), dtype)
    return Choice(
        accepted=accepted,
        # A controller that refuses the step throws this away; constant steps go on with it.
        order=jnp.where(free, order + best.astype(order.dtype) - 1, order),
        num_equal=jnp.where(free, jnp.zeros_like(count), count),
        factor=jnp.where(accepted, jnp.where(free, longest, held), safety * factors[1]),
    )

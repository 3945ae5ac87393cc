"""Carry a preconditioner's state through the Newton loop."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import lineax as lx
from jaxtyping import PyTree

from .. import tree
from ..loops import any_lane
from ..precondition.base import AbstractPreconditioner, Identity
from ..typing import Args, Flag, Y


def carried_arrays(
    preconditioner: AbstractPreconditioner,
    operator: Callable[[], lx.AbstractLinearOperator],
    y: Y,
    args: Args,
) -> PyTree:
    """Zeros for the arrays that a preconditioner keeps between linearisations."""
    if preconditioner.is_rebuilt:
        return None
    shapes = jax.eval_shape(lambda: _arrays(preconditioner.init(operator(), y, args)))
    return tree.zeros_like(shapes)


def refreshed(
    preconditioner: AbstractPreconditioner,
    carried: PyTree,
    operator: lx.AbstractLinearOperator,
    y: Y,
    args: Args,
    *,
    is_first: Flag,
    needed: Flag,
) -> tuple[lx.AbstractLinearOperator, PyTree]:
    """(M⁻¹ at a linearisation, the arrays to carry on); not built where no lane needs it."""
    if isinstance(preconditioner, Identity):
        return preconditioner.as_operator(preconditioner.init(operator, y, args)), carried
    static: list[Any] = []

    def init():
        state = preconditioner.init(operator, y, args)
        static.append(eqx.partition(state, eqx.is_array)[1])
        return _arrays(state)

    def update():
        state = preconditioner.update(eqx.combine(carried, static[0]), operator, y, args)
        return _arrays(state)

    shapes = jax.eval_shape(init)
    if preconditioner.is_rebuilt:
        arrays = lax.cond(any_lane(needed), init, lambda: tree.zeros_like(shapes))
    else:
        fresh = lax.cond(
            any_lane(needed), lambda: lax.cond(is_first, init, update), lambda: carried
        )
        arrays = carried = tree.where(needed, fresh, carried)
    return preconditioner.as_operator(eqx.combine(arrays, static[0])), carried


def _arrays(state: PyTree) -> PyTree:
    return eqx.filter(state, eqx.is_array)

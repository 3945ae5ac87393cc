"""Carry a preconditioner's state through the Newton loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import PyTree

from .. import tree
from ..loops import any_lane
from ..precondition.base import AbstractPreconditioner, Identity
from ..typing import Args, Count, Flag, Y


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


class Refreshed(NamedTuple):
    """A preconditioner at a linearisation."""

    operator: lx.AbstractLinearOperator  # M⁻¹
    carried: PyTree  # the arrays to carry on
    updated: Flag
    num_probes: int  # matvecs of an update
    static: Any  # the rest of the state

    def after(
        self, preconditioner: AbstractPreconditioner, num_steps: Count, solved: Flag
    ) -> PyTree:
        """The arrays to carry on after a linear solve of so many iterations."""
        if preconditioner.is_rebuilt:
            return self.carried
        state = preconditioner.observe(eqx.combine(self.carried, self.static), num_steps)
        return tree.where(solved, _arrays(state), self.carried)


def refreshed(
    preconditioner: AbstractPreconditioner,
    carried: PyTree,
    operator: lx.AbstractLinearOperator,
    y: Y,
    args: Args,
    *,
    is_first: Flag,
    needed: Flag,
) -> Refreshed:
    """M⁻¹ at a linearisation; not built where no lane needs it, or none is due."""
    if isinstance(preconditioner, Identity):
        identity = preconditioner.as_operator(preconditioner.init(operator, y, args))
        return Refreshed(identity, carried, jnp.zeros_like(needed), 0, None)
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
        updated = needed
    else:
        due = preconditioner.is_due(eqx.combine(carried, static[0]), y, args)
        wanted = any_lane(needed & (due | is_first))
        fresh = lax.cond(wanted, lambda: lax.cond(is_first, init, update), lambda: carried)
        arrays = carried = tree.where(needed, fresh, carried)
        updated = needed & wanted
    num_probes = preconditioner.num_probes(operator, y, args)
    inverse = preconditioner.as_operator(eqx.combine(arrays, static[0]))
    return Refreshed(inverse, carried, updated, num_probes, static[0])


def _arrays(state: PyTree) -> PyTree:
    return eqx.filter(state, eqx.is_array)

"""Carry a preconditioner's state through the Newton loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx

from .. import tree
from ..loops import any_lane
from ..precondition.base import AbstractPreconditioner, Identity, Skeleton, join, split
from ..typing import Args, Count, Flag, Y


def carried_arrays(
    preconditioner: AbstractPreconditioner,
    operator: Callable[[], lx.AbstractLinearOperator],
    y: Y,
    args: Args,
) -> list[Any] | None:
    """Zeros for the arrays that a preconditioner keeps between linearisations."""
    if preconditioner.is_rebuilt:
        return None
    shapes = jax.eval_shape(lambda: split(preconditioner.init(operator(), y, args))[0])
    return tree.zeros_like(shapes)


class Refreshed(NamedTuple):
    """A preconditioner at a linearisation."""

    operator: lx.AbstractLinearOperator  # M⁻¹
    carried: list[Any] | None  # the arrays to carry on
    updated: Flag
    num_probes: int | Count  # matvecs of that update
    skeleton: Skeleton | None  # the rest of the state

    def after(
        self, preconditioner: AbstractPreconditioner, num_steps: Count, solved: Flag
    ) -> list[Any] | None:
        """The arrays to carry on after a linear solve of so many iterations."""
        if self.carried is None or self.skeleton is None:
            return self.carried
        state = preconditioner.observe(join(self.carried, self.skeleton), num_steps)
        return tree.where(solved, split(state)[0], self.carried)


def refreshed(
    preconditioner: AbstractPreconditioner,
    carried: list[Any] | None,
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
    skeletons: list[Skeleton] = []

    def init():
        arrays, skeleton = split(preconditioner.init(operator, y, args))
        skeletons.append(skeleton)
        return arrays

    shapes = jax.eval_shape(init)
    skeleton = skeletons[0]
    num_probes = preconditioner.num_probes(operator, y, args)
    if carried is None:
        arrays = lax.cond(any_lane(needed), init, lambda: tree.zeros_like(shapes))
        updated = needed
    else:
        old = join(carried, skeleton)
        due = preconditioner.is_due(old, y, args)
        wanted = any_lane(needed & (due | is_first))
        update = lambda: split(preconditioner.update(old, operator, y, args))[0]
        fresh = lax.cond(wanted, lambda: lax.cond(is_first, init, update), lambda: carried)
        num_update_probes = preconditioner.num_update_probes(old, operator, y, args)
        num_probes = jnp.where(is_first, num_probes, num_update_probes)
        arrays = carried = tree.where(needed, fresh, carried)
        updated = needed & wanted
    inverse = preconditioner.as_operator(join(arrays, skeleton))
    return Refreshed(inverse, carried, updated, num_probes, skeleton)


def matvecs_per_application(
    preconditioner: AbstractPreconditioner, operator: Callable[[], lx.AbstractLinearOperator]
) -> int:
    """Matvecs that an application of M⁻¹ makes at most, without adding the operator's making to the
    program."""
    default = AbstractPreconditioner.matvecs_per_application
    if type(preconditioner).matvecs_per_application is default:
        return 0
    found: list[int] = []
    jax.eval_shape(lambda: found.append(preconditioner.matvecs_per_application(operator())))
    return found[0]

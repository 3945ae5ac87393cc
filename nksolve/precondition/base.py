"""What a preconditioner is: an approximate inverse made from the linearisation."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import PyTree

from ..loops import any_lane
from ..typing import Args, Count, Flag, Y


class AbstractPreconditioner(eqx.Module):
    """Makes a linear operator M⁻¹ ≈ J⁻¹ from the linearisation that the solver already holds.

    A preconditioner is a field of the Krylov solver, so that it reaches Newton, the adjoint and
    `lx.linear_solve` by one road. `y` and `args` are those of the residual; in `lx.linear_solve`,
    which knows neither, both are `None`.

    Laws: `as_operator(state)` has a transpose, which the adjoint uses. Unless it is an iteration
    (`nks.InnerKrylov`), which supplies the same method on Jᵀ, it is linear:
    ⟨M⁻¹v, w⟩ = ⟨v, M⁻ᵀw⟩. It works in the dtype of the operator, whatever that of y.
    """

    @abc.abstractmethod
    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        """The state at the first linearisation; a PyTree."""

    def update(self, state: Any, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        """The state at a later linearisation. A preconditioner that does not override this is made
        anew by `init` at every linearisation and carries nothing from one to the next."""
        del state
        return self.init(operator, y, args)

    @abc.abstractmethod
    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        """M⁻¹ as a Lineax operator from the residual's space to y's."""

    def is_due(self, state: Any, y: Y, args: Args) -> Flag:
        """Whether Newton should `update` at a linearisation. Where one lane of a batch is due, all
        are updated."""
        del state, y, args
        return jnp.array(True)

    def observe(self, state: Any, num_steps: Count) -> Any:
        """The state after a linear solve of so many Krylov iterations with it."""
        del num_steps
        return state

    def chosen(
        self, operator: Callable[[], lx.AbstractLinearOperator], y: Y, args: Args
    ) -> "AbstractPreconditioner":
        """The preconditioner to use with such an operator: this one, but for `nks.Auto`."""
        del operator, y, args
        return self

    def why(self, operator: Callable[[], lx.AbstractLinearOperator], y: Y, args: Args) -> str:
        """What `chosen` chose and for which reason; empty where there was no choice."""
        del operator, y, args
        return ""

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        """Matvecs that `init` makes."""
        del operator, y, args
        return 0

    def num_update_probes(
        self, state: Any, operator: lx.AbstractLinearOperator, y: Y, args: Args
    ) -> int | Count:
        """Matvecs that an `update` of that state makes; those of `init` unless overridden."""
        del state
        return self.num_probes(operator, y, args)

    def matvecs_per_application(self, operator: lx.AbstractLinearOperator) -> int:
        """Matvecs inside one product M⁻¹v; of an iteration that may stop earlier, the most."""
        del operator
        return 0

    @property
    def is_rebuilt(self) -> bool:
        """Whether `update` is `init`."""
        return type(self).update is AbstractPreconditioner.update

    @property
    def is_variable(self) -> bool:
        """Whether M⁻¹ is an iteration, not a linear map: for flexible methods only."""
        return False

    @property
    def keeps_symmetry(self) -> bool:
        """Whether M⁻¹ is symmetric where J is, as `nks.CG` and `nks.MINRES` need it."""
        return True

    @property
    def needs_transpose(self) -> bool:
        """Whether M⁻¹v multiplies by Jᵀ."""
        return False

    def check(self) -> None:
        """Raises where it cannot be the preconditioner of a linear solve."""


class Identity(AbstractPreconditioner):
    """No preconditioning."""

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        del y, args
        return lx.IdentityLinearOperator(operator.out_structure(), operator.in_structure())

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state


class Skeleton(NamedTuple):
    """A state without its arrays."""

    treedef: Any
    static: PyTree


def split(state: PyTree) -> tuple[list[Any], Skeleton]:
    """The arrays of a state as a list, and the rest of it.

    A list, since states of two linearisations hold the same arrays in trees that may not compare
    equal: the linear map of one is not that of the other.
    """
    arrays, static = eqx.partition(state, eqx.is_array)
    leaves, treedef = jtu.tree_flatten(arrays)
    return leaves, Skeleton(treedef, static)


def join(arrays: list[Any], skeleton: Skeleton) -> PyTree:
    """The state that was split."""
    return eqx.combine(jtu.tree_unflatten(skeleton.treedef, arrays), skeleton.static)


def update_where_due(
    preconditioner: AbstractPreconditioner,
    state: Any,
    operator: lx.AbstractLinearOperator,
    y: Y,
    args: Args,
) -> Any:
    """The state of a part of a preconditioner at a later linearisation."""
    if preconditioner.is_rebuilt:
        return preconditioner.init(operator, y, args)
    arrays, skeleton = split(state)
    due = any_lane(preconditioner.is_due(state, y, args))
    update = lambda: split(preconditioner.update(state, operator, y, args))[0]
    return join(lax.cond(due, update, lambda: arrays), skeleton)


def probes_where_due(
    preconditioner: AbstractPreconditioner,
    state: Any,
    operator: lx.AbstractLinearOperator,
    y: Y,
    args: Args,
) -> int | Count:
    """The matvecs that `update_where_due` makes."""
    if preconditioner.is_rebuilt:
        return preconditioner.num_probes(operator, y, args)
    due = any_lane(preconditioner.is_due(state, y, args))
    return due.astype(jnp.int32) * preconditioner.num_update_probes(state, operator, y, args)

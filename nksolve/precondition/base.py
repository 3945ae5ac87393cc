"""What a preconditioner is: an approximate inverse made from the linearisation."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx

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

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        """Matvecs that `init`, or an `update`, makes."""
        del operator, y, args
        return 0

    @property
    def is_rebuilt(self) -> bool:
        """Whether `update` is `init`."""
        return type(self).update is AbstractPreconditioner.update


class Identity(AbstractPreconditioner):
    """No preconditioning."""

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        del y, args
        return lx.IdentityLinearOperator(operator.out_structure(), operator.in_structure())

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

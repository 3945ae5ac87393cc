"""The M⁻¹ ≈ J⁻¹ that the approximate adjoints start from."""

from typing import Any

import lineax as lx

from .. import tree
from ..krylov.system import KrylovState
from ..linearise.lower import working
from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..newton.base import AbstractRootFinder
from ..precondition.base import AbstractPreconditioner, Identity
from ..typing import Args, Vector, Y


class NegativeIdentity(AbstractPreconditioner):
    """M⁻¹ = −I: that of a fixed-point problem, F(z) = g(z) − z with J = ∂g/∂z − I.

    Storage: none. Work: a change of sign.
    """

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        del y, args
        structures = operator.out_structure(), operator.in_structure()
        return JacobianOperator(_Negation(), *structures, frozenset({lx.symmetric_tag}))

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state


class ForwardPreconditioner(AbstractPreconditioner):
    """Stands for the preconditioner of the nonlinear solver's `linear_solver`, made at the root;
    where that has none, for `nks.NegativeIdentity()`.

    For the `preconditioner` of `nks.OneStep`, `nks.Neumann` and `nks.Shared`; nothing else.
    """

    def check(self) -> None:
        raise TypeError(
            "`ForwardPreconditioner()` stands for another solver's preconditioner, and only the "
            "approximate adjoints know that solver: give a Krylov method the preconditioner "
            "itself, such as `nks.Jacobi(...)`, or `nks.Identity()`."
        )

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        self.check()

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        raise TypeError("`ForwardPreconditioner()` has no state.")


class _Negation(AbstractLinearMap):
    def mv(self, vector: Vector) -> Vector:
        return tree.neg(vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        return tree.neg(vector)


class CastMap(AbstractLinearMap):
    """An operator on vectors of a lower precision as a map of wider ones."""

    operator: lx.AbstractLinearOperator

    def mv(self, vector: Vector) -> Vector:
        low = tree.cast_like(vector, self.operator.in_structure())
        return tree.cast_like(self.operator.mv(low), vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        low = tree.cast_like(vector, self.operator.out_structure())
        return tree.cast_like(self.operator.transpose().mv(low), vector)


def check_preconditioner(preconditioner: Any, name: str) -> None:
    """Raises for what is no linear preconditioner."""
    if not isinstance(preconditioner, AbstractPreconditioner):
        raise TypeError(
            f"`{name}(preconditioner)` must be a preconditioner such as `nks.NegativeIdentity()`, "
            f"`nks.ForwardPreconditioner()` or `nks.Jacobi()`, but it is {preconditioner!r}."
        )
    if preconditioner.is_variable:
        raise ValueError(
            f"`{name}` needs a linear preconditioner, whose transpose serves in reverse mode; an "
            "inner Krylov solve is none. Choose another, or the exact `nks.KrylovAdjoint()`."
        )


def resolved_preconditioner(
    preconditioner: AbstractPreconditioner, solver: Any, name: str
) -> AbstractPreconditioner:
    """The preconditioner, the forward solver's in place of `ForwardPreconditioner`."""
    if not isinstance(preconditioner, ForwardPreconditioner):
        return preconditioner
    if not isinstance(solver, AbstractRootFinder):
        raise ValueError(
            f"`{name}(preconditioner=nks.ForwardPreconditioner())` takes the preconditioner of the "
            f"nonlinear solver, but {type(solver).__name__} has none: pass the preconditioner."
        )
    found = solver.linear_solver.preconditioner
    if isinstance(found, Identity):
        return NegativeIdentity()
    check_preconditioner(found, name)
    return found


def split_state(
    preconditioner: AbstractPreconditioner, operator: lx.AbstractLinearOperator, y: Y, args: Args
) -> KrylovState:
    """J and M⁻¹, both on vectors of J's own precision."""
    held = working(operator)
    preconditioner = preconditioner.chosen(lambda: held, y, args)
    check_preconditioner(preconditioner, "the adjoint")
    inverse = preconditioner.as_operator(preconditioner.init(held, y, args))
    return KrylovState(operator, as_inverse(CastMap(inverse), operator))


def as_inverse(inverse: AbstractLinearMap, operator: lx.AbstractLinearOperator) -> JacobianOperator:
    """A map of residuals to steps as an operator."""
    return JacobianOperator(inverse, operator.out_structure(), operator.in_structure())


def check_count(value: Any, least: int, name: str) -> None:
    """Raises for what is no integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, but it is {value!r}.")

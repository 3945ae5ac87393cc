"""A preconditioner given by the user."""

from collections.abc import Callable
from typing import Any

import lineax as lx

from ..typing import Args, Y
from .base import AbstractPreconditioner


class UserPreconditioner(AbstractPreconditioner):
    """M⁻¹ = build(operator, y, args), made anew at every linearisation.

    **Arguments:**

    - `build`: a function of the Jacobian (a `lineax` operator: `operator.mv(v)` is J v), y and
      args that returns M⁻¹ ≈ J⁻¹, either as a `lineax` operator or as a linear function v → M⁻¹v
      of vectors like the residual, which is transposed by `jax.linear_transpose`.

    Storage and work are those of what `build` returns: one application a Krylov iteration.
    """

    build: Callable[[lx.AbstractLinearOperator, Y, Args], Any]

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        built = self.build(operator, y, args)
        if not isinstance(built, lx.AbstractLinearOperator):
            if not callable(built):
                raise TypeError(
                    "`UserPreconditioner(build)`: `build(operator, y, args)` must return a "
                    f"Lineax operator or a function v -> M⁻¹v, but it returned {built!r}."
                )
            built = lx.FunctionLinearOperator(built, operator.out_structure())
        if (built.in_structure(), built.out_structure()) != (
            operator.out_structure(),
            operator.in_structure(),
        ):
            raise ValueError(
                "`UserPreconditioner(build)`: M⁻¹ must map vectors like the residual to vectors "
                f"like y, {operator.out_structure()} to {operator.in_structure()}, but it maps "
                f"{built.in_structure()} to {built.out_structure()}."
            )
        return built

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

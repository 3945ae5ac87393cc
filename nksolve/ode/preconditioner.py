"""A preconditioner given by the user for the matrices of an integrator."""

from collections.abc import Callable
from typing import Any

import lineax as lx

from ..precondition.base import AbstractPreconditioner
from ..precondition.user import UserPreconditioner
from ..typing import Args, ScalarLike, Vector, Y
from .linear import Stage


class StagePreconditioner(AbstractPreconditioner):
    """M⁻¹ = build(t, y, γ, args) ≈ (I − γ ∂f/∂y)⁻¹, with γ in units of time.

    Kept from step to step by CVODE's rules (20 steps, or a change of γ by 30%); `nks.Lagged` around
    it sets others, `nks.Lagged(StagePreconditioner(build), max_age=1)` makes it anew at each step.

    **Arguments:**

    - `build`: returns M⁻¹, either as a `lineax` operator or as a linear function v → M⁻¹v of
      vectors like y, which is transposed by `jax.linear_transpose` for gradients. t, y, γ and args
      are not differentiated in it; what it closes over must not be either.

    **Raises:** `TypeError` outside the integrators of `nksolve.ode`, where there is no γ.

    Storage: the arrays that M⁻¹ holds, carried from step to step. Work: one application a Krylov
    iteration.
    """

    build: Callable[[ScalarLike, Vector, ScalarLike, Args], Any]

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        if not isinstance(args, Stage):
            raise TypeError(
                "`StagePreconditioner` is for the integrators of `nksolve.ode`; elsewhere use "
                "`nks.UserPreconditioner(build)` with `build(operator, y, args)`."
            )
        inverse = self.build(args.t, y, args.gamma, args.args)
        return UserPreconditioner(lambda *_: inverse).init(operator, y, args)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

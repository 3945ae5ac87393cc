"""How the parts of a Newton–Krylov solver go together: what is solved with, and what cannot be."""

from collections.abc import Callable
from typing import Any

import jax
import lineax as lx

from ..krylov.base import AbstractKrylovSolver
from ..linearise.policies import AbstractPolicy
from ..linearise.views import plus_multiple
from .globalisation.base import AbstractGlobalisation


def solved_with(
    globalisation: AbstractGlobalisation, search: Any, operator: lx.AbstractLinearOperator
) -> lx.AbstractLinearOperator:
    """J with what the globalisation adds to it; one of the same form where `search` is `None`."""
    shift = globalisation.shift(search)
    return operator if shift is None else plus_multiple(operator, *shift)


def check_start(
    globalisation: AbstractGlobalisation,
    linear_solver: AbstractKrylovSolver,
    policy: AbstractPolicy,
    operator: Callable[[], lx.AbstractLinearOperator],
) -> None:
    """Raises for parts that need more of J than is promised or there; adds nothing to a program."""

    def check() -> None:
        seen = operator()
        linear_solver.check_operator(seen)
        # A symmetric J is its own transpose, whatever made it.
        if policy.mode != "none" or lx.is_symmetric(seen):
            return
        for part, other in (
            (globalisation, "`nks.Backtracking()` or `nks.Hookstep()`"),
            (linear_solver, "`nks.GMRES()`"),
        ):
            if part.needs_transpose:
                raise ValueError(
                    f"`{type(part).__name__}` multiplies by Jᵀ, which `{type(policy).__name__}` "
                    f"does not give: take {other}, or where JAX can differentiate the residual "
                    "`nks.Linearise()`. A J that is its own transpose is promised by "
                    "`tags=frozenset({lx.symmetric_tag})`."
                )

    jax.eval_shape(check)

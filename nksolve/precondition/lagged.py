"""A preconditioner that is kept for several linearisations."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx

from .. import tree
from ..typing import Args, Count, Flag, Scalar, ScalarLike, Y
from .base import AbstractPreconditioner


class Lagged(AbstractPreconditioner):
    """The M⁻¹ of an earlier linearisation, until it is due: by age, growth or a shift.

    Newton refreshes it at the first linearisation, and at a later one as soon as one of the rules
    that are given says so:

    - `max_age` linear solves were done with it;
    - the last solve took more than `growth` times the iterations of the first one with it;
    - |γ/γ_old − 1| > `max_shift_change`, where γ = `shift(y, args)`, as for I − γJ of a stiff
      integrator.

    With no rule it is made once. A refresh is an `update` of the preconditioner, or its `init`
    where it has no other. Under `vmap` the whole batch is refreshed as soon as one lane is due, so
    that the counters of a lane may differ from those of the lane alone. In the adjoint it is made
    anew at the root.

    **Arguments:**

    - `preconditioner`: what is kept.
    - `max_age`: 1 refreshes at each linearisation.
    - `growth`: mind that a forcing term that tightens makes iterations grow too.
    - `shift`: `(y, args) -> γ`, a real scalar.
    - `max_shift_change`: 0.3 is CVODE's.

    `num_preconditioner_updates` counts refreshes, `num_probes` their matvecs.

    Storage: the state of the preconditioner is carried by the Newton loop, the linearisation too
    where it keeps that (`Chebyshev`, `Multiplicative`, `InnerKrylov`, …). Work: none of its own.

    Source: Hindmarsh et al., ACM Trans. Math. Softw. 31(3), 2005, section 2.1 (age, change of γ).
    """

    preconditioner: AbstractPreconditioner
    max_age: int | None = eqx.field(static=True, default=None)
    growth: ScalarLike | None = None
    shift: Callable[[Y, Args], Scalar] | None = None
    max_shift_change: ScalarLike = 0.3

    def __check_init__(self):
        if self.max_age is not None and self.max_age < 1:
            raise ValueError(f"`Lagged(max_age)` must be at least 1, but it is {self.max_age}.")
        if isinstance(self.growth, (int, float)) and not self.growth >= 1:
            raise ValueError(
                f"`Lagged(growth)` is a ratio of iterations and must be at least 1, but it is "
                f"{self.growth}."
            )

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> "LaggedState":
        return self._fresh(self.preconditioner.init(operator, y, args), operator, y, args)

    def update(
        self, state: "LaggedState", operator: lx.AbstractLinearOperator, y: Y, args: Args
    ) -> "LaggedState":
        kept = self.preconditioner.update(state.kept, operator, y, args)
        return self._fresh(kept, operator, y, args)

    def _fresh(
        self, kept: Any, operator: lx.AbstractLinearOperator, y: Y, args: Args
    ) -> "LaggedState":
        none = jnp.zeros((), jnp.int32)
        gamma = jnp.zeros((), tree.real_dtype(operator.in_structure()))
        # In `lx.linear_solve`, where neither is known, nothing is ever kept.
        if self.shift is not None and not (y is None and args is None):
            gamma = jnp.asarray(self.shift(y, args)).astype(gamma.dtype)
        return LaggedState(kept, none, none, none, gamma)

    def as_operator(self, state: "LaggedState") -> lx.AbstractLinearOperator:
        return self.preconditioner.as_operator(state.kept)

    def is_due(self, state: "LaggedState", y: Y, args: Args) -> Flag:
        due = jnp.array(False)
        if self.max_age is not None:
            due = due | (state.age >= self.max_age)
        if self.growth is not None:
            first = jnp.maximum(state.first_steps, 1).astype(state.gamma.dtype)
            growth = jnp.asarray(self.growth).astype(first.dtype)
            due = due | (state.last_steps.astype(first.dtype) > growth * first)
        if self.shift is not None:
            old, gamma = state.gamma, jnp.asarray(self.shift(y, args)).astype(state.gamma.dtype)
            change = jnp.asarray(self.max_shift_change).astype(old.dtype)
            due = due | ~(jnp.abs(gamma - old) <= change * jnp.abs(old))
        return due

    def observe(self, state: "LaggedState", num_steps: Count) -> "LaggedState":
        num_steps = num_steps.astype(state.age.dtype)
        return LaggedState(
            kept=self.preconditioner.observe(state.kept, num_steps),
            age=state.age + 1,
            first_steps=jnp.where(state.age == 0, num_steps, state.first_steps),
            last_steps=num_steps,
            gamma=state.gamma,
        )

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        return self.preconditioner.num_probes(operator, y, args)

    def num_update_probes(
        self, state: "LaggedState", operator: lx.AbstractLinearOperator, y: Y, args: Args
    ) -> int | Count:
        return self.preconditioner.num_update_probes(state.kept, operator, y, args)

    def matvecs_per_application(self, operator: lx.AbstractLinearOperator) -> int:
        return self.preconditioner.matvecs_per_application(operator)

    @property
    def is_variable(self) -> bool:
        return self.preconditioner.is_variable

    @property
    def keeps_symmetry(self) -> bool:
        return self.preconditioner.keeps_symmetry

    @property
    def needs_transpose(self) -> bool:
        return self.preconditioner.needs_transpose

    def check(self) -> None:
        self.preconditioner.check()


class LaggedState(eqx.Module):
    """What is kept, and what the rules look at."""

    kept: Any
    age: Count  # linear solves since the refresh
    first_steps: Count  # iterations of the first of them
    last_steps: Count
    gamma: Scalar  # at the refresh

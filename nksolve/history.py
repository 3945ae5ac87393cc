"""Per-step records of a solve in buffers of fixed size."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .results import REASONS, code
from .typing import Count, Flag, Scalar


class History(eqx.Module):
    """One row for each trial point, the initial point included; rows past `length` are dropped.

    **Attributes:** (arrays of shape `(length,)`; unused rows hold NaN, 0 or False)

    - `norm`: ‖F‖ at the trial point, in the norm of the convergence test.
    - `eta`: the forcing term of the linear solve that followed (NaN where none did).
    - `num_matvecs`: matvecs of that linear solve.
    - `step_length`: λ of the trial, as a fraction of the Newton direction.
    - `accepted`: whether the trial point was accepted.
    - `reason`: the code of the reason (see `nks.reason_name`): `iterating`, and in the last row
      why the solve stopped (but for `max_steps`, which is known only afterwards). In
      `nks.Robust` the last row of each attempt says why it ended.
    """

    norm: Float[Array, " length"]
    eta: Float[Array, " length"]
    num_matvecs: Int[Array, " length"]
    step_length: Float[Array, " length"]
    accepted: Bool[Array, " length"]
    reason: Int[Array, " length"]

    @staticmethod
    def empty(length: int, dtype: np.dtype) -> "History":
        """No rows."""
        nan = jnp.full((length,), jnp.nan, dtype)
        return History(
            norm=nan,
            eta=nan,
            num_matvecs=jnp.zeros((length,), jnp.int32),
            step_length=nan,
            accepted=jnp.zeros((length,), bool),
            reason=jnp.zeros((length,), jnp.int32) + code(REASONS.iterating),
        )

    def record(
        self,
        row: Count,
        when: Flag,
        *,
        norm: Scalar,
        eta: Scalar,
        num_matvecs: Count,
        step_length: Scalar,
        accepted: Flag,
        reason: REASONS,
    ) -> "History":
        """The history with one row written `when` the flag holds."""
        index = jnp.arange(self.norm.shape[0], dtype=jnp.int32)
        here = (index == row) & when

        def write(old, new):
            return jnp.where(here, new.astype(old.dtype), old)

        return History(
            norm=write(self.norm, norm),
            eta=write(self.eta, eta),
            num_matvecs=write(self.num_matvecs, num_matvecs),
            step_length=write(self.step_length, step_length),
            accepted=write(self.accepted, accepted),
            reason=write(self.reason, code(reason)),
        )

    def ended(self, row: Count, when: Flag, reason: REASONS) -> "History":
        """The history with the reason of one row replaced `when` the flag holds."""
        here = (jnp.arange(self.reason.shape[0], dtype=jnp.int32) == row) & when
        new = jnp.where(here, code(reason).astype(self.reason.dtype), self.reason)
        return eqx.tree_at(lambda h: h.reason, self, new)

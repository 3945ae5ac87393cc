"""Per-step records of a solve in buffers of fixed size."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from . import tree
from .results import REASONS, code
from .typing import Count, Flag, Norm, Scalar, Vector


class PerLeaf(eqx.Module):
    """A history of so many trials with the residual norm of each leaf beside that of all.

    For `history_length=` of a solver: an equation that is never solved shows. Norms are those of
    the convergence test, of the residual with the other leaves set to zero.

    Work: a norm of the residual for each leaf, once a trial.
    """

    length: int = eqx.field(static=True)

    def __check_init__(self):
        if not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"`PerLeaf(length)` must be at least 1, but it is {self.length!r}.")


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
    - `leaf_norms`: ‖F‖ leaf by leaf, by the place of the leaf (`y['u']`, `y.flow`); empty unless
      `nks.PerLeaf` asked for it.
    """

    norm: Float[Array, " length"]
    eta: Float[Array, " length"]
    num_matvecs: Int[Array, " length"]
    step_length: Float[Array, " length"]
    accepted: Bool[Array, " length"]
    reason: Int[Array, " length"]
    leaf_norms: dict[str, Float[Array, " length"]] = eqx.field(default_factory=dict)

    @staticmethod
    def empty(length: int | PerLeaf, dtype: np.dtype, residual: tree.Structure = ()) -> "History":
        """No rows, for residuals of that structure."""
        places: list[str] = []
        if isinstance(length, PerLeaf):
            length, places = length.length, _places(residual)
        nan = jnp.full((length,), jnp.nan, dtype)
        return History(
            norm=nan,
            eta=nan,
            num_matvecs=jnp.zeros((length,), jnp.int32),
            step_length=nan,
            accepted=jnp.zeros((length,), bool),
            reason=jnp.zeros((length,), jnp.int32) + code(REASONS.iterating),
            leaf_norms=dict.fromkeys(places, nan),
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
        value: Vector = (),
        of: Norm = tree.norm2,
    ) -> "History":
        """The history with one row written `when` the flag holds.

        The residual is `value`, and `norm` is `of(value)`.
        """
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
            leaf_norms={
                place: write(old, of(_alone(value, i)))
                for i, (place, old) in enumerate(self.leaf_norms.items())
            },
        )

    def ended(self, row: Count, when: Flag, reason: REASONS) -> "History":
        """The history with the reason of one row replaced `when` the flag holds."""
        here = (jnp.arange(self.reason.shape[0], dtype=jnp.int32) == row) & when
        new = jnp.where(here, code(reason).astype(self.reason.dtype), self.reason)
        return eqx.tree_at(lambda h: h.reason, self, new)


def _places(structure: tree.Structure) -> list[str]:
    """Where each leaf stands: `y['u']`, `y.flow`."""
    return [f"y{jtu.keystr(path)}" for path, _ in jtu.tree_leaves_with_path(structure)]


def _alone(value: Vector, which: int) -> Vector:
    """The vector with all leaves but one set to zero."""
    leaves, treedef = jtu.tree_flatten(value)
    others = [x if i == which else jnp.zeros_like(x) for i, x in enumerate(leaves)]
    return jtu.tree_unflatten(treedef, others)

"""When a nonlinear solve stops, and why."""

import abc
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .. import tree
from ..results import REASONS, first_of
from ..typing import Count, Flag, Scalar, Vector


class Standing(NamedTuple):
    """What a convergence test sees at a trial point; norms are those of the residual test."""

    norm: Scalar  # ‖F‖
    initial_norm: Scalar  # ‖F₀‖
    atol: Scalar
    target: Scalar  # atol + rtol ‖F₀‖
    steps_since_best: Count  # accepted steps since the least ‖F‖ was seen


class AbstractConvergenceTest(eqx.Module):
    """Says whether to stop at a point, and with which reason; success counts at every trial point,
    other reasons at accepted ones."""

    @abc.abstractmethod
    def __call__(self, standing: Standing) -> tuple[Flag, REASONS]:
        """`(stop, reason)`; the reason is `iterating` where `stop` does not hold."""


class ResidualTest(AbstractConvergenceTest):
    """Stops at ‖F‖ ≤ atol + rtol ‖F₀‖, or where that has become unlikely.

    **Arguments:**

    - `divergence`: stop with `diverged` at ‖F‖ > divergence · ‖F₀‖.
    - `patience`: stop with `stagnated` after this many accepted steps without a new least ‖F‖.
    """

    divergence: float = 1e4
    patience: int = 50

    def __check_init__(self):
        if not self.divergence > 1 or self.patience < 1:
            raise ValueError("`divergence` must exceed 1 and `patience` must be at least 1.")

    def __call__(self, standing: Standing) -> tuple[Flag, REASONS]:
        absolute = standing.norm <= standing.atol
        # Nothing is small beside an infinite ‖F₀‖.
        relative = (standing.norm <= standing.target) & jnp.isfinite(standing.initial_norm)
        diverged = standing.norm > self.divergence * standing.initial_norm
        stagnated = standing.steps_since_best >= self.patience
        reason = first_of(
            (absolute, REASONS.residual_atol),
            (relative, REASONS.residual_rtol),
            (diverged, REASONS.diverged),
            (stagnated, REASONS.stagnated),
            otherwise=REASONS.iterating,
        )
        return absolute | relative | diverged | stagnated, reason


def is_finite(point: Vector, norm: Scalar, test_norm: Scalar) -> Flag:
    """Whether a trial may count at all: the point, ‖F‖₂ there and the norm of the residual test.

    F may well be finite, or zero, at a point with an infinite entry, which is no root.
    """
    return jnp.isfinite(tree.max_norm(point)) & jnp.isfinite(norm) & jnp.isfinite(test_norm)


def stands_still(step: Vector, variables: Vector, step_tol: float | None) -> Flag:
    """Whether a step changes no entry by more than `step_tol` of itself; by default the unit
    round-off."""
    tol = tree.eps(variables) if step_tol is None else step_tol
    flags = jtu.tree_map(lambda s, y: jnp.all(jnp.abs(s) <= tol * jnp.abs(y)), step, variables)
    return jnp.stack(jtu.tree_leaves(flags) or [jnp.array(True)]).all()

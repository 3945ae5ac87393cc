"""When a nonlinear solve stops, and why."""

import abc
from typing import NamedTuple

import equinox as eqx

from ..results import REASONS, first_of
from ..typing import Count, Flag, Scalar


class Standing(NamedTuple):
    """What a convergence test sees at an accepted point; norms are those of the residual test."""

    norm: Scalar  # ‖F‖
    initial_norm: Scalar  # ‖F₀‖
    atol: Scalar
    target: Scalar  # atol + rtol ‖F₀‖
    steps_since_best: Count  # accepted steps since the least ‖F‖ was seen


class AbstractConvergenceTest(eqx.Module):
    """Says whether to stop at an accepted point, and with which reason."""

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
        relative = standing.norm <= standing.target
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

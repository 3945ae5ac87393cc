"""A line search for residuals that are gradients."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree

from ... import tree
from ...typing import Scalar, Vector
from ..state import Direction
from .base import AbstractGlobalisation, Judgement, Model, Trial
from .line_search import linear_norm_along


class _Secant(NamedTuple):
    length: Scalar
    previous_length: Scalar
    initial: Scalar  # F(y)ᵀd
    previous: Scalar  # F(y + λ d)ᵀd at the previous length
    trials: Scalar


class CriticalPoint(AbstractGlobalisation[_Secant]):
    """A critical point along d: F(y + λ d)ᵀd = 0 by the secant method.

    Where F = ∇E this is an exact search for the energy E, which is never evaluated; ‖F‖ may grow on
    the way. A trial is accepted where |F(y + λ d)ᵀd| ≤ tolerance |F(y)ᵀd|, and after `max_secants`
    secant steps whatever it brought. One that is not finite halves λ; it fails after `max_trials`
    of them. Nothing here keeps ‖F‖ from growing: `nks.ResidualTest` stops what diverges.

    **Arguments:**

    - `max_secants`: secant steps a search, each of them one evaluation of F.
    - `tolerance`: see above.
    - `min_length`, `max_length`: bounds of λ.

    Source: PETSc's `cp`; Brune, Knepley, Smith & Tu, Composing Scalable Nonlinear Algebraic
    Solvers, SIAM Review 57(4), 2015, §3.1.
    """

    max_secants: int = eqx.field(static=True, default=1)
    tolerance: float = 1e-3
    min_length: float = 1e-12
    max_length: float = 1.0
    max_trials: int = 20

    def __check_init__(self):
        if self.max_secants < 1:
            raise ValueError(f"`max_secants` must be at least 1, but it is {self.max_secants}.")
        if not 0 < self.min_length <= self.max_length:
            raise ValueError("`min_length` must be positive and at most `max_length`.")

    @property
    def is_line_search(self) -> bool:
        return True

    def init(self, variables: Vector, norm: Scalar, workspace: PyTree) -> _Secant:
        del variables, workspace
        one = jnp.ones_like(norm)
        return _Secant(one, 0 * one, 0 * one, 0 * one, 0 * one)

    def start(self, model: Model, state: _Secant) -> _Secant:
        at_zero = -tree.vdot(model.minus_f, model.direction.vector).real
        one = jnp.minimum(jnp.ones_like(at_zero), self.max_length)
        return _Secant(one, 0 * one, at_zero, at_zero, 0 * one)

    def displacement(self, state: _Secant, direction: Vector) -> Vector:
        return tree.scale(state.length, direction)

    def step_length(self, state: _Secant) -> Scalar:
        return state.length

    def held_length(self, state: _Secant) -> Scalar:
        return jnp.ones_like(state.length)  # λ is what the secants found

    def linear_norm(self, state: _Secant, direction: Direction) -> Scalar:
        return linear_norm_along(state.length, direction)

    def judge(self, state: _Secant, trial: Trial) -> Judgement:
        length, trials = state.length, state.trials + 1
        value = tree.vdot(trial.value, trial.direction).real
        value = value.astype(length.dtype)
        finite = jnp.isfinite(trial.merit) & jnp.isfinite(value)
        small = jnp.abs(value) <= self.tolerance * jnp.abs(state.initial)
        slope = (value - state.previous) / (length - state.previous_length)
        proposal = jnp.clip(length - value / slope, self.min_length, self.max_length)
        following = jnp.where(finite & jnp.isfinite(proposal), proposal, 0.5 * length)
        # At a bound the secant can go no further.
        bound = following == length
        accepted = finite & (small | bound | (trials > self.max_secants))
        failed = ~accepted & ~finite & (trials >= self.max_trials)
        return Judgement(
            accepted,
            failed,
            _Secant(
                following,
                jnp.where(finite, length, state.previous_length),
                state.initial,
                jnp.where(finite, value, state.previous),
                trials,
            ),
        )

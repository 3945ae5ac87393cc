"""From the Newton direction to the next trial point: full steps and line searches."""

import abc
from typing import Any, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax.numpy as jnp

from .. import tree
from ..typing import Flag, Scalar, Vector

_State = TypeVar("_State")


class Judgement(NamedTuple):
    """What a globalisation says of a trial point. Not accepted and not failed: try again."""

    accepted: Flag
    failed: Flag
    state: Any


class AbstractGlobalisation(eqx.Module, Generic[_State]):
    """Turns a direction into trial points and judges them.

    The merit is φ(λ) = ‖F(y + λ d)‖₂ / ‖F(y)‖₂, so that everything is free of scale; the slope is
    that of ½φ² at 0, FᵀJd/‖F‖², which is −1 for an exact Newton direction.

    Laws: a trial point that is not finite is never accepted; a trial that is not accepted leaves y
    as it was.
    """

    @abc.abstractmethod
    def start(self, slope: Scalar) -> _State:
        """The state of the search along a new direction."""

    @abc.abstractmethod
    def displacement(self, state: _State, direction: Vector) -> Vector:
        """The step from y to the next trial point."""

    @abc.abstractmethod
    def step_length(self, state: _State) -> Scalar:
        """The length of that step as a fraction of the direction."""

    @abc.abstractmethod
    def judge(self, state: _State, merit: Scalar) -> Judgement:
        """Judges the trial point, whose φ is `merit` (infinite where F is not finite)."""


class _Search(NamedTuple):
    """The last trial and the one before it; λ = 0 stands for none."""

    slope: Scalar
    length: Scalar
    previous_length: Scalar
    previous_merit: Scalar
    trials: Scalar


class AbstractLineSearch(AbstractGlobalisation[_Search]):
    """A search along the direction: trial points y + λ d with λ shrinking from 1."""

    def start(self, slope: Scalar) -> _Search:
        one = jnp.ones_like(slope)
        return _Search(slope, one, 0 * one, one, 0 * one)

    def displacement(self, state: _Search, direction: Vector) -> Vector:
        return tree.scale(state.length, direction)

    def step_length(self, state: _Search) -> Scalar:
        return state.length


class FullStep(AbstractLineSearch):
    """y + d, always: Newton's method as it stands. Fails only where F is not finite."""

    def judge(self, state: _Search, merit: Scalar) -> Judgement:
        finite = jnp.isfinite(merit)
        return Judgement(finite, ~finite, state)


class Backtracking(AbstractLineSearch):
    """Backtracking on ½‖F‖² by quadratic, then cubic interpolation. The default.

    Accepts ½φ(λ)² ≤ ½ + α λ slope; otherwise λ becomes the minimiser of the quadratic (first) or
    cubic (later) model, kept within [0.1 λ, 0.5 λ]. A trial that is not finite halves λ. Fails
    after `max_trials` trials or below `min_length`.

    Source: Dennis & Schnabel, Numerical Methods for Unconstrained Optimization and Nonlinear
    Equations, SIAM 1996, algorithm A6.3.1; as PETSc's `bt`.
    """

    alpha: float = 1e-4
    min_length: float = 1e-12
    max_trials: int = 40

    def judge(self, state: _Search, merit: Scalar) -> Judgement:
        slope, length = state.slope, state.length
        value = 0.5 * merit**2
        accepted = value <= 0.5 + self.alpha * length * slope
        excess = value - 0.5 - length * slope
        quadratic = -slope * length**2 / (2 * excess)
        proposal = jnp.where(state.previous_length > 0, _cubic_minimiser(state, excess), quadratic)
        shorter = jnp.clip(proposal, 0.1 * length, 0.5 * length)
        shorter = jnp.where(jnp.isfinite(merit) & jnp.isfinite(shorter), shorter, 0.5 * length)
        return _retried(state, merit, accepted, shorter, self.min_length, self.max_trials)


class Parabolic(AbstractLineSearch):
    """Backtracking by the three-point parabola through ‖F‖² at 0 and the last two trials.

    Accepts φ(λ) ≤ 1 − α λ. The first reduction halves λ; later ones take the minimiser of the
    parabola within [0.1 λ, 0.5 λ]. Needs no slope. Fails after `max_trials` trials.

    Source: Kelley, Solving Nonlinear Equations with Newton's Method, SIAM 2003, §1.6.
    """

    alpha: float = 1e-4
    min_length: float = 1e-12
    max_trials: int = 20

    def judge(self, state: _Search, merit: Scalar) -> Judgement:
        length, previous = state.length, state.previous_length
        accepted = merit <= 1 - self.alpha * length
        at_length, at_previous = merit**2 - 1, state.previous_merit**2 - 1
        curvature = previous * at_length - length * at_previous
        gradient = length**2 * at_previous - previous**2 * at_length
        vertex = jnp.clip(-gradient / (2 * curvature), 0.1 * length, 0.5 * length)
        shorter = jnp.where(curvature >= 0, 0.1 * length, vertex)
        usable = (previous > 0) & jnp.isfinite(merit) & jnp.isfinite(state.previous_merit)
        shorter = jnp.where(usable & jnp.isfinite(shorter), shorter, 0.5 * length)
        return _retried(state, merit, accepted, shorter, self.min_length, self.max_trials)


def _cubic_minimiser(state: _Search, excess: Scalar) -> Scalar:
    length, previous, slope = state.length, state.previous_length, state.slope
    previous_excess = 0.5 * state.previous_merit**2 - 0.5 - previous * slope
    t1, t2 = excess / length**2, previous_excess / previous**2
    a = (t1 - t2) / (length - previous)
    b = (-previous * t1 + length * t2) / (length - previous)
    root = jnp.sqrt(jnp.maximum(b**2 - 3 * a * slope, jnp.zeros_like(a)))
    return jnp.where(a == 0, -slope / (2 * b), (-b + root) / (3 * a))


def _retried(
    state: _Search,
    merit: Scalar,
    accepted: Flag,
    shorter: Scalar,
    min_length: float,
    max_trials: int,
) -> Judgement:
    finite = jnp.isfinite(merit)
    accepted = accepted & finite
    trials = state.trials + 1
    failed = ~accepted & ((trials >= max_trials) | (shorter < min_length))
    # A trial that is not finite is no point to interpolate through.
    previous_length = jnp.where(finite, state.length, state.previous_length)
    previous_merit = jnp.where(finite, merit, state.previous_merit)
    search = _Search(state.slope, shorter, previous_length, previous_merit, trials)
    return Judgement(accepted, failed, search)

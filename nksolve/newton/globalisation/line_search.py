"""Line searches: trial points y + λ d along the Newton direction."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import PyTree

from ... import tree
from ...typing import Flag, Scalar, Vector
from ..state import Direction
from .base import AbstractGlobalisation, Judgement, Model, Trial


class Search(NamedTuple):
    """The last trial and the one before it; λ = 0 stands for none."""

    slope: Scalar
    length: Scalar
    previous_length: Scalar
    previous_merit: Scalar
    trials: Scalar


class AbstractLineSearch(AbstractGlobalisation[Search]):
    """A search along the direction: trial points y + λ d with λ shrinking from 1.

    With the merit φ(λ) = ‖F(y + λ d)‖₂/‖F(y)‖₂ the slope is that of ½φ² at 0, FᵀJd/‖F‖², which is
    −1 for an exact Newton direction.
    """

    @property
    def is_line_search(self) -> bool:
        return True

    def init(self, variables: Vector, norm: Scalar, workspace: PyTree) -> Search:
        del variables, workspace
        return begun(-jnp.ones_like(norm))

    def start(self, model: Model, state: Search) -> Search:
        del state
        return begun(model.direction.slope)

    def displacement(self, state: Search, direction: Vector) -> Vector:
        return tree.scale(state.length, direction)

    def step_length(self, state: Search) -> Scalar:
        return state.length

    def linear_norm(self, state: Search, direction: Direction) -> Scalar:
        return linear_norm_along(state.length, direction)


class FullStep(AbstractLineSearch):
    """y + d, always: Newton's method as it stands. Fails only where F is not finite."""

    def judge(self, state: Search, trial: Trial) -> Judgement:
        finite = jnp.isfinite(trial.merit)
        return Judgement(finite, ~finite, state)


class Damped(AbstractLineSearch):
    """y + λ d with a constant λ: fails only where F is not finite.

    **Arguments:**

    - `length`: λ, in (0, 1].
    """

    length: float = 0.5

    def __check_init__(self):
        if not 0 < self.length <= 1:
            raise ValueError(f"`length` must lie in (0, 1], but it is {self.length}.")

    def init(self, variables: Vector, norm: Scalar, workspace: PyTree) -> Search:
        return self._shortened(super().init(variables, norm, workspace))

    def start(self, model: Model, state: Search) -> Search:
        return self._shortened(super().start(model, state))

    def held_length(self, state: Search) -> Scalar:
        return jnp.ones_like(state.length)  # λ was chosen before any trial

    def judge(self, state: Search, trial: Trial) -> Judgement:
        finite = jnp.isfinite(trial.merit)
        return Judgement(finite, ~finite, state)

    def _shortened(self, state: Search) -> Search:
        return state._replace(length=jnp.full_like(state.length, self.length))


class Backtracking(AbstractLineSearch):
    """Backtracking on ½‖F‖² by quadratic, then cubic interpolation. The default.

    Accepts ½φ(λ)² ≤ ½ + α λ slope; otherwise λ becomes the minimiser of the quadratic (first) or
    cubic (later) model, kept within [0.1 λ, 0.5 λ]. A trial that is not finite halves λ. Fails
    after `max_trials` trials or below `min_length`.

    A search begins at λ = 1, or at `growth` times the λ that was accepted before where that is
    less: a long way of short steps does not cost the same rejected trials again and again.
    `math.inf` always begins at 1.

    Source: Dennis & Schnabel, Numerical Methods for Unconstrained Optimization and Nonlinear
    Equations, SIAM 1996, algorithm A6.3.1; as PETSc's `bt`.
    """

    alpha: float = 1e-4
    min_length: float = 1e-12
    max_trials: int = 40
    growth: float = 2.0

    def __check_init__(self):
        check_growth(self.growth)

    def start(self, model: Model, state: Search) -> Search:
        return begun(model.direction.slope, first_length(state, self.growth))

    def judge(self, state: Search, trial: Trial) -> Judgement:
        slope, length, merit = state.slope, state.length, trial.merit
        accepted = 0.5 * merit**2 <= 0.5 + self.alpha * length * slope
        shorter = interpolated(state, merit)
        return retried(state, merit, accepted, shorter, self.min_length, self.max_trials)


class Parabolic(AbstractLineSearch):
    """Backtracking by the three-point parabola through ‖F‖² at 0 and the last two trials.

    Accepts φ(λ) ≤ 1 − α λ. The first reduction halves λ; later ones take the minimiser of the
    parabola within [0.1 λ, 0.5 λ]. Needs no slope. Fails after `max_trials` trials.

    Source: Kelley, Solving Nonlinear Equations with Newton's Method, SIAM 2003, §1.6.
    """

    alpha: float = 1e-4
    min_length: float = 1e-12
    max_trials: int = 20

    def judge(self, state: Search, trial: Trial) -> Judgement:
        length, previous, merit = state.length, state.previous_length, trial.merit
        accepted = merit <= 1 - self.alpha * length
        at_length, at_previous = merit**2 - 1, state.previous_merit**2 - 1
        curvature = previous * at_length - length * at_previous
        gradient = length**2 * at_previous - previous**2 * at_length
        vertex = jnp.clip(-gradient / (2 * curvature), 0.1 * length, 0.5 * length)
        shorter = jnp.where(curvature >= 0, 0.1 * length, vertex)
        usable = (previous > 0) & jnp.isfinite(merit) & jnp.isfinite(state.previous_merit)
        shorter = jnp.where(usable & jnp.isfinite(shorter), shorter, 0.5 * length)
        return retried(state, merit, accepted, shorter, self.min_length, self.max_trials)


def begun(slope: Scalar, length: Scalar | None = None) -> Search:
    """A search with that first length, by default 1."""
    one = jnp.ones_like(slope)
    return Search(slope, one if length is None else length, 0 * one, one, 0 * one)


def first_length(state: Search, growth: float) -> Scalar:
    """1, or `growth` times the length that the search before ended with."""
    longest = growth * state.previous_length
    return jnp.minimum(jnp.where(state.previous_length > 0, longest, 1), 1)


def check_growth(growth: float) -> None:
    """Raises where lengths could never grow again."""
    if not growth > 1:
        raise ValueError(f"`growth` must exceed 1, but it is {growth}.")


def linear_norm_along(length: Scalar, direction: Direction) -> Scalar:
    """‖F + λ J d‖/‖F‖."""
    # ‖F + λJd‖² = (1−λ)²‖F‖² + 2λ(1−λ) Fᵀ(F + Jd) + λ²‖F + Jd‖²
    square = (
        (1 - length) ** 2
        + 2 * length * (1 - length) * (1 + direction.slope)
        + (length * direction.residual) ** 2
    )
    return jnp.sqrt(jnp.maximum(square, 0))


def interpolated(state: Search, merit: Scalar) -> Scalar:
    """The minimiser of the quadratic or, from the second reduction on, cubic model of ½φ², within
    [0.1 λ, 0.5 λ]; λ/2 after a trial that is not finite."""
    slope, length = state.slope, state.length
    excess = 0.5 * merit**2 - 0.5 - length * slope
    quadratic = -slope * length**2 / (2 * excess)
    proposal = jnp.where(state.previous_length > 0, _cubic_minimiser(state, excess), quadratic)
    shorter = jnp.clip(proposal, 0.1 * length, 0.5 * length)
    return jnp.where(jnp.isfinite(merit) & jnp.isfinite(shorter), shorter, 0.5 * length)


def _cubic_minimiser(state: Search, excess: Scalar) -> Scalar:
    length, previous, slope = state.length, state.previous_length, state.slope
    previous_excess = 0.5 * state.previous_merit**2 - 0.5 - previous * slope
    t1, t2 = excess / length**2, previous_excess / previous**2
    a = (t1 - t2) / (length - previous)
    b = (-previous * t1 + length * t2) / (length - previous)
    root = jnp.sqrt(jnp.maximum(b**2 - 3 * a * slope, jnp.zeros_like(a)))
    return jnp.where(a == 0, -slope / (2 * b), (-b + root) / (3 * a))


def retried(
    state: Search,
    merit: Scalar,
    accepted: Flag,
    shorter: Scalar,
    min_length: float,
    max_trials: int,
) -> Judgement:
    """The verdict on a trial with that merit, and the search with a shorter one."""
    finite = jnp.isfinite(merit)
    accepted = accepted & finite
    trials = state.trials + 1
    failed = ~accepted & ((trials >= max_trials) | (shorter < min_length))
    # A trial that is not finite is no point to interpolate through.
    previous_length = jnp.where(finite, state.length, state.previous_length)
    previous_merit = jnp.where(finite, merit, state.previous_merit)
    search = Search(state.slope, shorter, previous_length, previous_merit, trials)
    return Judgement(accepted, failed, search)

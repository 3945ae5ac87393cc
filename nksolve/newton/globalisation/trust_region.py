"""Trust regions: the radius, and the dogleg path."""

import abc
from typing import NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import PyTree

from ... import tree
from ...loops import any_lane
from ...results import REASONS
from ...typing import Scalar, Vector
from ..state import Direction
from .base import AbstractGlobalisation, Judgement, Model, Trial


class Step(NamedTuple):
    """A step of the subspace: its lengths, and what the linear model promises of it."""

    length: Scalar  # ‖s‖
    full: Scalar  # ‖d‖
    linear_norm: Scalar  # ‖F + J s‖/‖F‖
    is_full: Scalar  # whether it is d itself


class RegionState(NamedTuple):
    """The radius, and the subspace in which steps are found."""

    radius: Scalar
    trials: Scalar
    subspace: PyTree


class AbstractTrustRegion(AbstractGlobalisation[RegionState]):
    """Steps of bounded length that reduce ‖F + J s‖, the bound fitted to how well that is ‖F‖.

    With ρ = (1 − φ²)/(1 − m²), φ = ‖F(y + s)‖/‖F‖ and m = ‖F + J s‖/‖F‖, a trial is accepted where
    ρ > `accept`. The radius becomes a quarter of ‖s‖ where ρ < 1/4 or F is not finite, and doubles
    where ρ > 3/4 on the boundary. It is kept from step to step; the first is `initial_radius` ‖d‖.
    A rejected trial takes another step in the subspace that is there: no product with J. Fails
    (`trust_region_failed`) after `max_trials` trials, or where the radius falls below `min_radius`
    of ‖d‖.

    Source: Nocedal & Wright, Numerical Optimization, 2nd ed., algorithms 4.1 and 11.5.
    """

    initial_radius: eqx.AbstractVar[float]
    accept: eqx.AbstractVar[float]
    min_radius: eqx.AbstractVar[float]
    max_trials: eqx.AbstractVar[int]

    def failure(self, state: RegionState) -> REASONS:
        del state
        return REASONS.trust_region_failed

    @abc.abstractmethod
    def nothing(self, variables: Vector, norm: Scalar, workspace: PyTree) -> PyTree:
        """A subspace of zeros."""

    @abc.abstractmethod
    def subspace(self, model: Model) -> PyTree:
        """The subspace at a point."""

    @abc.abstractmethod
    def step(self, subspace: PyTree, radius: Scalar) -> Step:
        """The step of that radius."""

    @abc.abstractmethod
    def vector(self, subspace: PyTree, radius: Scalar, direction: Vector) -> Vector:
        """That step as a vector."""

    def init(self, variables: Vector, norm: Scalar, workspace: PyTree) -> RegionState:
        infinite = jnp.full_like(norm, jnp.inf)
        return RegionState(infinite, jnp.zeros_like(norm), self.nothing(variables, norm, workspace))

    def start(self, model: Model, state: RegionState) -> RegionState:
        fresh = lambda: self.subspace(model)
        subspace = lax.cond(any_lane(model.wanted), fresh, lambda: state.subspace)
        first = self.initial_radius * self.step(subspace, state.radius).full
        radius = jnp.where(jnp.isfinite(state.radius), state.radius, first)
        return RegionState(radius, jnp.zeros_like(radius), subspace)

    def displacement(self, state: RegionState, direction: Vector) -> Vector:
        return self.vector(state.subspace, state.radius, direction)

    def step_length(self, state: RegionState) -> Scalar:
        step = self.step(state.subspace, state.radius)
        return jnp.where(step.full > 0, step.length / step.full, jnp.ones_like(step.full))

    def linear_norm(self, state: RegionState, direction: Direction) -> Scalar:
        return self.step(state.subspace, state.radius).linear_norm

    def judge(self, state: RegionState, trial: Trial) -> Judgement:
        step, merit = self.step(state.subspace, state.radius), trial.merit
        finite = jnp.isfinite(merit)
        promised = 1 - step.linear_norm**2
        gained = 1 - merit**2
        # Where nothing is promised, as at the initial point, any decrease will do.
        ratio = jnp.where(promised > 0, gained / promised, jnp.sign(gained))
        accepted = finite & (ratio > self.accept) & (merit < 1)
        poor = ~finite | ~(ratio >= 0.25)
        good = (ratio > 0.75) & ~step.is_full
        radius = jnp.where(good, 2 * state.radius, state.radius)
        radius = jnp.where(poor, 0.25 * step.length, radius)
        trials = jnp.where(accepted, jnp.zeros_like(state.trials), state.trials + 1)
        tiny = radius < self.min_radius * step.full
        failed = ~accepted & ((trials >= self.max_trials) | tiny)
        return Judgement(accepted, failed, RegionState(radius, trials, state.subspace))


class _Path(NamedTuple):
    """The two corners of the dogleg path, with inner products.

    c is the Cauchy point, d the direction; A their images under J, f the residual, of length 1.
    """

    cauchy: Vector
    cc: Scalar
    cd: Scalar
    dd: Scalar
    f_ac: Scalar
    f_ad: Scalar
    ac_ac: Scalar
    ac_ad: Scalar
    ad_ad: Scalar


class Dogleg(AbstractTrustRegion):
    """Powell's dogleg: from y to the Cauchy point, from there to y + d, as far as the radius goes.

    The Cauchy point −(‖g‖²/‖J g‖²) g with g = JᵀF minimises ‖F + J s‖ along the steepest descent of
    ‖F‖². It needs Jᵀ, the transpose of the same linearisation.

    **Arguments:**

    - `initial_radius`: the first radius, in units of the first ‖d‖.
    - `accept`, `min_radius`, `max_trials`: when a trial is accepted, and when the search fails.

    Storage: one vector (c). Work: for each direction one product with Jᵀ and two with J; none for a
    rejected trial.

    Source: Powell, in Rabinowitz (ed.), Numerical Methods for Nonlinear Algebraic Equations, 1970;
    with inexact directions Pawlowski, Simonis, Walker & Shadid, SIAM J. Numer. Anal. 46(4), 2008;
    radius: Nocedal & Wright, Numerical Optimization, 2nd ed., algorithms 4.1 and 11.5.
    """

    initial_radius: float = 1.0
    accept: float = 1e-3
    min_radius: float = 1e-12
    max_trials: int = 40

    def __check_init__(self):
        if not self.initial_radius > 0:
            raise ValueError(f"`initial_radius` must be positive, but it is {self.initial_radius}.")
        if not 0 <= self.accept < 0.25:
            raise ValueError(f"`accept` must lie in [0, 1/4), but it is {self.accept}.")

    def products(self, state: RegionState) -> tuple[int, int]:
        del state
        return 2, 1

    @property
    def needs_transpose(self) -> bool:
        return True

    def nothing(self, variables: Vector, norm: Scalar, workspace: PyTree) -> _Path:
        del workspace
        return _Path(tree.zeros_like(variables), *(jnp.zeros_like(norm) for _ in range(8)))

    def subspace(self, model: Model) -> _Path:
        dot = lambda a, b: tree.vdot(a, b).real.astype(model.norm.dtype)
        unit = tree.scale(-1 / model.norm, model.minus_f)
        gradient = tree.conj(model.operator.transpose().mv(tree.conj(unit)))
        image = model.operator.mv(gradient)
        length = dot(gradient, gradient) / dot(image, image)
        # A zero gradient, or one that J maps to zero: the path is the straight line to y + d.
        length = jnp.where(jnp.isfinite(length), length, jnp.zeros_like(length))
        cauchy = tree.scale(-length * model.norm, gradient)
        d = model.direction.vector
        ac = tree.scale(-length, image)
        ad = tree.scale(1 / model.norm, model.operator.mv(d))
        return _Path(
            cauchy,
            dot(cauchy, cauchy),
            dot(cauchy, d),
            dot(d, d),
            dot(unit, ac),
            dot(unit, ad),
            dot(ac, ac),
            dot(ac, ad),
            dot(ad, ad),
        )

    def step(self, subspace: _Path, radius: Scalar) -> Step:
        p = subspace
        a, b = _coefficients(p, radius)
        square = 1 + 2 * (a * p.f_ac + b * p.f_ad)
        square = square + a * a * p.ac_ac + 2 * a * b * p.ac_ad + b * b * p.ad_ad
        length = jnp.sqrt(a * a * p.cc + 2 * a * b * p.cd + b * b * p.dd)
        full = jnp.sqrt(p.dd)
        return Step(length, full, jnp.sqrt(jnp.maximum(square, 0)), b >= 1)

    def vector(self, subspace: _Path, radius: Scalar, direction: Vector) -> Vector:
        a, b = _coefficients(subspace, radius)
        # Not 0 · d where d is infinite.
        along = tree.where(b > 0, tree.scale(b, direction), tree.zeros_like(direction))
        return tree.axpy(a, subspace.cauchy, along)


def _coefficients(path: _Path, radius: Scalar) -> tuple[Scalar, Scalar]:
    """(a, b) of the step a c + b d."""
    cc, cd, dd = path.cc, path.cd, path.dd
    curvature, slope = dd - 2 * cd + cc, cd - cc
    room = jnp.maximum(radius**2 - cc, 0)
    # The positive root of ‖c + t (d − c)‖ = radius, in the form that does not cancel.
    root = jnp.sqrt(jnp.maximum(slope**2 + curvature * room, 0))
    t = jnp.where(slope > 0, room / (slope + root), (root - slope) / curvature)
    t = jnp.clip(jnp.where(jnp.isfinite(t), t, jnp.zeros_like(t)), 0, 1)
    outside = cc >= radius**2
    inside = jnp.sqrt(dd) <= radius  # as a radius of ‖d‖ is made: its square may be less than dd
    zero, one = jnp.zeros_like(cc), jnp.ones_like(cc)
    shrunk = radius / jnp.sqrt(jnp.where(outside, cc, one))
    a = jnp.where(inside, zero, jnp.where(outside, shrunk, 1 - t))
    b = jnp.where(inside, one, jnp.where(outside, zero, t))
    return a, b

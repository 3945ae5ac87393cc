"""Pseudo-transient continuation: implicit Euler steps whose length grows as ‖F‖ falls."""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ... import tree
from ...typing import Scalar, ScalarLike, Vector
from ..state import Direction
from .base import AbstractGlobalisation, Judgement, Model, Shift, Trial


class Past(NamedTuple):
    """What a rule for the step length sees at an accepted point.

    **Attributes:**

    - `merit`: ‖F_{k+1}‖/‖F_k‖.
    - `initial`: ‖F_{k+1}‖/‖F₀‖.
    - `point`: y_{k+1}.
    - `step`: s_k = y_{k+1} − y_k.
    - `delta`: δ_k, with which it was taken.
    """

    merit: Scalar
    initial: Scalar
    point: Vector
    step: Vector
    delta: Scalar


class AbstractStepRule(eqx.Module):
    """How δ changes from step to step."""

    @abc.abstractmethod
    def init(self, variables: Vector) -> PyTree:
        """The state before the first step."""

    @abc.abstractmethod
    def following(self, past: Past, delta_0: Scalar, state: PyTree) -> tuple[Scalar, PyTree]:
        """δ_{k+1}, and the state."""


class SER(AbstractStepRule):
    """Switched evolution relaxation: δ_{k+1} = δ_k ‖F_k‖/‖F_{k+1}‖.

    Source: Mulder & van Leer, J. Comput. Phys. 59, 1985; Kelley & Keyes, SIAM J. Numer. Anal.
    35(2), 1998, (1.4).
    """

    def init(self, variables: Vector) -> None:
        return None

    def following(self, past: Past, delta_0: Scalar, state: None) -> tuple[Scalar, None]:
        return past.delta / past.merit, None


class _Previous(NamedTuple):
    step: Vector
    delta: Scalar


class TTE(AbstractStepRule):
    """Temporal truncation error: δ_{k+1} = √(2 tolerance/max |u″|/(1 + |u|)) ≤ `growth` δ_k.

    u″ is the second divided difference of the last three points, so that δ²|u″|/(2(1 + |u|)), the
    truncation error of implicit Euler, stays at `tolerance`. The first step is followed by δ₀.

    **Arguments:**

    - `tolerance`: of that error.
    - `growth`: most growth from step to step.

    Storage: one vector.

    Source: Kelley & Keyes, SIAM J. Numer. Anal. 35(2), 1998, (1.6).
    """

    tolerance: float = 0.75
    growth: float = 10.0

    def __check_init__(self):
        if not self.tolerance > 0 or not self.growth > 1:
            raise ValueError("`tolerance` must be positive and `growth` above 1.")

    def init(self, variables: Vector) -> _Previous:
        dtype = tree.real_dtype(variables)
        return _Previous(tree.zeros_like(variables), jnp.full((), jnp.inf, dtype))

    def following(self, past: Past, delta_0: Scalar, state: _Previous) -> tuple[Scalar, _Previous]:
        def largest(step, before, u):
            slopes = step / past.delta.astype(step.dtype) - before / state.delta.astype(step.dtype)
            second = 2 * jnp.abs(slopes) / (past.delta + state.delta)
            return jnp.max(second / (1 + jnp.abs(u)), initial=0)

        leaves = jtu.tree_leaves(jtu.tree_map(largest, past.step, state.step, past.point))
        worst = jnp.max(jnp.stack(leaves)) if leaves else jnp.zeros_like(past.delta)
        following = jnp.sqrt(2 * self.tolerance / worst).astype(past.delta.dtype)
        following = jnp.minimum(following, self.growth * past.delta)
        following = jnp.where(jnp.isfinite(state.delta), following, delta_0)
        return following, _Previous(past.step, past.delta)


class _Transient(NamedTuple):
    delta: Scalar
    norm: Scalar  # ‖F‖ at y
    initial: Scalar  # ‖F₀‖
    rule: PyTree
    trials: Scalar


class PseudoTransient(AbstractGlobalisation[_Transient]):
    """(M/δ_k + J_k) s_k = −F_k, y_{k+1} = y_k + s_k, with δ_k growing as ‖F‖ falls.

    A step is one of implicit Euler, linearised, of M u̇ = −F(u). For small δ it follows that flow to
    a steady state, and only to a stable one; for large δ it is Newton's. Choose it where F is such
    a right-hand side and a line search ends at another solution, or in a local minimum of ‖F‖:
    ‖F‖ may grow on the way. The sign of F matters: −F must drive u towards the root.

    The shift is added to the one linearisation; the preconditioner is built from the shifted
    matrix. A trial that is not finite is tried again with δ/4 (the direction scaled by 1/4, which
    is what that comes to for a small δ); it fails after `max_trials` of them.

    **Arguments:**

    - `delta_0`: the first δ, in units of the pseudo-time of M u̇ = −F(u).
    - `rule`: `nks.SER()` or `nks.TTE()`.
    - `mass`: M, positive: a tree like y with its diagonal, or a Lineax operator; the identity by
      default.
    - `max_delta`: the largest δ; 1e10 δ₀ by default.

    Storage: one vector with `TTE`. Work: that of a Newton step.

    Source: Kelley & Keyes, SIAM J. Numer. Anal. 35(2), 1998; with a mass matrix Coffey, Kelley &
    Keyes, SIAM J. Sci. Comput. 25(2), 2003.
    """

    delta_0: ScalarLike = 1e-3
    rule: AbstractStepRule = SER()
    mass: Any = None
    max_delta: ScalarLike | None = None
    max_trials: int = 20

    def __check_init__(self):
        if isinstance(self.delta_0, int | float) and not self.delta_0 > 0:
            raise ValueError(f"`delta_0` must be positive, but it is {self.delta_0}.")

    def init(self, variables: Vector, norm: Scalar, workspace: PyTree) -> _Transient:
        del workspace
        delta = jnp.asarray(self.delta_0).astype(norm.dtype)
        infinite = jnp.full_like(norm, jnp.inf)
        return _Transient(delta, infinite, infinite, self.rule.init(variables), 0 * norm)

    def start(self, model: Model, state: _Transient) -> _Transient:
        initial = jnp.where(jnp.isfinite(state.initial), state.initial, model.norm)
        return state._replace(norm=model.norm, initial=initial, trials=0 * state.trials)

    def displacement(self, state: _Transient, direction: Vector) -> Vector:
        return tree.scale(0.25**state.trials, direction)

    def step_length(self, state: _Transient) -> Scalar:
        return 0.25**state.trials

    def linear_norm(self, state: _Transient, direction: Direction) -> Scalar:
        # That of the shifted system: what its residual was.
        return direction.residual

    def judge(self, state: _Transient, trial: Trial) -> Judgement:
        merit = trial.merit
        finite = jnp.isfinite(merit)
        is_first = merit == 0
        length = 0.25**state.trials
        delta_0 = jnp.asarray(self.delta_0).astype(merit.dtype)
        past = Past(
            merit,
            merit * state.norm / state.initial,
            trial.point,
            tree.scale(length, trial.direction),
            length * state.delta,
        )
        following, rule = self.rule.following(past, delta_0, state.rule)
        most = 1e10 * delta_0 if self.max_delta is None else jnp.asarray(self.max_delta)
        following = jnp.clip(following, 1e-10 * delta_0, most.astype(merit.dtype))
        new = state._replace(delta=following.astype(merit.dtype), rule=rule)
        kept = state._replace(trials=state.trials + 1)
        accepted = finite & ~is_first
        out = tree.where(accepted, new, tree.where(is_first, state, kept))
        return Judgement(finite, ~finite & (kept.trials >= self.max_trials), out)

    def shift(self, state: _Transient | None) -> Shift:
        delta = jnp.asarray(self.delta_0) if state is None else state.delta
        return Shift(1 / delta, self.mass)

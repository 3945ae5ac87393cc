"""Deuflhard's affine covariant damping: the simplified Newton correction judges a trial point."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ... import tree
from ...precondition.base import Skeleton, join, split
from ...typing import Count, Flag, Scalar, Vector
from ..state import Direction
from .base import AbstractGlobalisation, Judgement, Linear, Model, Trial
from .line_search import linear_norm_along


class _Search(NamedTuple):
    length: Scalar  # λ
    trials: Scalar
    full: Scalar  # ‖d‖
    eta: Scalar  # to which d was found
    simplified: Vector  # Δx̄ of the last trial
    shortened: Scalar  # ‖Δx̄‖
    started: Flag  # whether there was a step before
    old: list[Any] | None  # the arrays of J and M⁻¹ at y
    workspace: PyTree
    work: tuple[Count, Count, Count]  # of the last judgement


class NLEQErr(AbstractGlobalisation[_Search]):
    """y + λ d with λ from the error: accepted where the simplified Newton correction is shorter.

    At a trial point Δx̄ = −J(y)⁻¹F(y + λ d), with J of the point where d was found, estimates how
    far the root is. With θ = ‖Δx̄‖/‖d‖ a trial is accepted where θ < 1; otherwise λ becomes
    min(μ', λ/2), μ' = ½ λ²‖d‖/‖Δx̄ − (1 − λ) d‖. The first λ of a later step is min(1, μ),
    μ = λ_p ‖d_p‖ ‖Δx̄‖/(‖Δx̄ − d‖ ‖d‖), p for the step before. Nothing here changes when F is
    multiplied by a regular matrix (affine covariance), as a badly scaled residual is; ‖F‖ may grow
    on the way. Success is still that of the residual test.

    It keeps two linearisations, and each trial costs a linear solve to the forcing tolerance of d,
    ‖F + J Δx̄‖ ≤ η ‖F‖. θ and μ' are as exact as η lets them be: choose η ≤ 1e-3, as
    `forcing=nks.ConstantForcing(1e-4)`. Without the re-expansion λ' ≥ 4 λ of the original, which
    may cycle, and without its switch to quasi-Newton steps.

    **Arguments:**

    - `initial_length`: the first λ; 1 for mildly nonlinear problems, 1e-2 or 1e-4 for harder ones.
    - `min_length`: fails (`line_search_failed`) where λ would fall below that.
    - `max_trials`: or after so many trials along a direction.

    Storage: a second linearisation, its preconditioner and Krylov workspace, one vector (Δx̄). Work:
    a Krylov solve for each trial, the accepted one included.

    Source: Deuflhard, Newton Methods for Nonlinear Problems, Springer 2004, §3.3.2, algorithm
    NLEQ-ERR; without re-expansion as PETSc's `nleqerr`.
    """

    initial_length: float = 1.0
    min_length: float = 1e-12
    max_trials: int = 40

    def __check_init__(self):
        if not 0 < self.min_length <= self.initial_length <= 1:
            raise ValueError(
                "`initial_length` must lie in [min_length, 1] and `min_length` be positive, but "
                f"they are {self.initial_length} and {self.min_length}."
            )

    def init(self, variables: Vector, norm: Scalar, workspace: PyTree) -> _Search:
        one, none = jnp.ones_like(norm), jnp.zeros((), jnp.int32)
        return _Search(
            length=jnp.full_like(norm, self.initial_length),
            trials=0 * one,
            full=one,
            eta=0 * one,
            simplified=tree.zeros_like(variables),
            shortened=one,
            started=jnp.array(False),
            old=None,
            workspace=workspace,
            work=(none, none, none),
        )

    def remember(self, state: _Search, linear: Callable[[], Linear]) -> _Search:
        return state._replace(old=tree.zeros_like(_structure(linear)[0]))

    def start(self, model: Model, state: _Search) -> _Search:
        d = model.direction.vector
        full = tree.norm2(d).astype(model.norm.dtype)
        taken = state.length * state.full  # λ_p ‖d_p‖
        apart = tree.norm2(tree.sub(state.simplified, d)).astype(full.dtype)
        predicted = taken * state.shortened / (apart * full)
        predicted = jnp.where(jnp.isnan(predicted), jnp.ones_like(full), predicted)
        first = jnp.full_like(full, self.initial_length)
        length = jnp.where(state.started, jnp.clip(predicted, self.min_length, 1), first)
        return _Search(
            length=length,
            trials=0 * state.trials,
            full=full,
            eta=model.direction.eta,
            simplified=state.simplified,
            shortened=state.shortened,
            started=jnp.ones_like(state.started),
            old=split(model.linear)[0],
            # What it holds belongs to the same J: a recycled space serves the simplified solves.
            workspace=model.workspace,
            work=state.work,
        )

    def displacement(self, state: _Search, direction: Vector) -> Vector:
        return tree.scale(state.length, direction)

    def step_length(self, state: _Search) -> Scalar:
        return state.length

    def linear_norm(self, state: _Search, direction: Direction) -> Scalar:
        return linear_norm_along(state.length, direction)

    def judge(self, state: _Search, trial: Trial) -> Judgement:
        length, is_first = state.length, trial.merit == 0
        finite = jnp.isfinite(trial.merit)
        wanted = trial.running & finite & ~is_first
        assert state.old is not None
        assert trial.linear is not None
        linear = trial.linear()
        old = join(state.old, _structure(lambda: linear)[1])
        norm = tree.norm2(trial.value)
        out = linear.solver.run(
            old,
            tree.neg(trial.value),
            real=linear.real,
            norm=norm,
            tolerance=jnp.where(wanted, state.eta * norm, jnp.inf),
            workspace=state.workspace,
        )
        shortened = tree.norm2(out.value).astype(norm.dtype)
        theta = shortened / state.full
        bend = tree.axpy(-(1 - length), trial.direction, out.value)
        bend = tree.norm2(bend).astype(norm.dtype)
        accepted = is_first | (wanted & (theta < 1))
        shorter = jnp.minimum(0.5 * length**2 * state.full / bend, 0.5 * length)
        shorter = jnp.where(finite & (shorter > 0), shorter, 0.5 * length)
        trials = state.trials + 1
        failed = ~accepted & ((trials >= self.max_trials) | (length <= self.min_length))
        done = tree.count(wanted)
        work = (
            done * out.num_matvecs,
            done * out.num_transposed_matvecs,
            done * out.num_preconditioner_applications,
        )
        new = state._replace(
            length=jnp.where(accepted, length, jnp.maximum(shorter, self.min_length)),
            trials=trials,
            simplified=tree.where(wanted, out.value, state.simplified),
            shortened=jnp.where(wanted, shortened, state.shortened),
            workspace=out.workspace,
            work=work,
        )
        return Judgement(accepted, failed, new)

    def work(self, state: _Search) -> tuple[Count, Count, Count]:
        return state.work


def _structure(linear: Callable[[], Linear]) -> tuple[list[jax.ShapeDtypeStruct], Skeleton]:
    """The shapes of the arrays of J and M⁻¹, and the rest of them, which is the same at every
    point: nothing is computed."""
    found: list[Skeleton] = []

    def make():
        here = linear()
        arrays, skeleton = split(here.solver.prepare(here.operator, here.point, here.args))
        found.append(skeleton)
        return arrays

    return jax.eval_shape(make), found[0]

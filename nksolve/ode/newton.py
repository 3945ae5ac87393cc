"""The simplified Newton iteration of an implicit stage, in the step size controller's norm."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from diffrax import AbstractSolver, with_stepsize_controller_tols

from .. import tree
from ..linearise.views import divided
from ..loops import any_lane
from ..typing import Count, Flag, Norm, Scalar, ScalarLike, Vector
from .linear import AbstractStageLinear
from .work import Work

# Diffrax puts its controller's tolerances where a root finder holds this.
CONTROLLERS = with_stepsize_controller_tols(optx.Chord)().rtol


class SimplifiedNewton(eqx.Module):
    """w ← w − W⁻¹ (w − γ F(base + w)), with W = I − γ ∂F/∂y from one point for a whole step.

    An iteration Δw has converged when the error that it leaves, estimated from the measured rate θ
    of contraction, is small against what the step size controller allows:

        θ/(1 − θ) ‖Δw‖ ≤ κ,    or ‖Δw‖ at the rounding level of y,

    in the controller's weighted norm. At the first iteration of a stage the quotient of the stage
    before stands for the unknown one, to the power 0.8. It is given up, and the step rejected, when
    θ ≥ 1, when at this rate `max_steps` will not do, or when a value is not finite.

    **Arguments:**

    - `rtol`, `atol`, `norm`: those of the step size controller by default. Diffrax has none to
      hand over where steps are constant: `SimplifiedNewton.alone()` brings its own.
    - `kappa`: κ. Smaller costs iterations, larger lets their error into the error estimate.
    - `max_steps`: most iterations of a stage.

    Source: Hairer & Wanner, Solving Ordinary Differential Equations II, 2nd ed., §IV.8.
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Norm
    kappa: ScalarLike
    max_steps: int = eqx.field(static=True)
    #: Whether the tolerances are the step size controller's, so that it can be told what to do.
    is_controlled: bool = eqx.field(static=True)

    def __init__(
        self,
        rtol: ScalarLike = CONTROLLERS,
        atol: ScalarLike = CONTROLLERS,
        norm: Norm = CONTROLLERS,
        kappa: ScalarLike = 1e-2,
        max_steps: int = 10,
    ):
        self.rtol = rtol
        self.atol = atol
        self.norm = norm
        self.kappa = kappa
        self.max_steps = max_steps
        self.is_controlled = all(value is CONTROLLERS for value in (rtol, atol, norm))

    def __check_init__(self):
        if self.max_steps < 1:
            raise ValueError(f"`max_steps` must be positive, but it is {self.max_steps}.")
        for name in ("rtol", "atol", "kappa"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not value >= 0:
                raise ValueError(f"`{name}` must not be negative, but it is {value}.")

    @classmethod
    def alone(
        cls,
        rtol: ScalarLike | None = None,
        atol: ScalarLike | None = None,
        norm: Norm = optx.rms_norm,
        *,
        kappa: ScalarLike = 1e-2,
        max_steps: int = 10,
    ) -> "SimplifiedNewton":
        """With tolerances of its own, for constant steps: by default 1e-8 and 1e-8, and 1e-5 and
        1e-5 where JAX has no float64."""
        least = 1e-8 if tree.float_dtype().itemsize == 8 else 1e-5
        rtol = least if rtol is None else rtol
        atol = least if atol is None else atol
        return cls(rtol, atol, norm, kappa, max_steps)

    def scale(self, y: Vector) -> Vector:
        """atol + rtol |y|, what an error is measured in."""

        def one(x):
            size = jnp.abs(x)
            allowed = jnp.asarray(self.atol) + jnp.asarray(self.rtol) * size
            return jnp.broadcast_to(allowed, x.shape).astype(size.dtype)

        return jtu.tree_map(one, y)


class Verdict(NamedTuple):
    """On an iteration."""

    quotient: Scalar  # θ/(1 − θ)
    converged: Flag
    diverged: Flag


def judge(
    norm: Scalar,
    previous: Scalar,
    *,
    count: Count,
    max_steps: int,
    target: Scalar,
    floor: Scalar,
    first_quotient: Scalar,
) -> Verdict:
    """The verdict on iteration number `count` (from 0) from ‖Δw‖ and that of the one before."""
    theta = norm / previous
    quotient = jnp.where(theta < 1, theta / (1 - theta), jnp.inf)
    quotient = jnp.where(count == 0, first_quotient, quotient)
    finite = jnp.isfinite(norm)
    converged = finite & ((quotient * norm <= target) | (norm <= floor))
    left = (max_steps - 1 - count).astype(norm.dtype)
    hopeless = (theta >= 1) | (theta**left * quotient * norm > target)
    hopeless = jnp.where(count == 0, left <= 0, hopeless)
    return Verdict(quotient, converged, ~converged & (hopeless | ~finite))


class StageSolution(NamedTuple):
    """A stage's iteration, at work and at its end."""

    w: Vector  # z − base
    norm: Scalar  # ‖Δw‖ of the last iteration
    rate: Scalar  # θ/(1 − θ) as last measured, at most 1; that of the stage before at first
    contraction: Scalar  # the largest θ measured, 0 where there was none
    count: Any
    converged: Flag
    diverged: Flag
    work: Work
    workspace: Any


def solve_stage(
    newton: SimplifiedNewton,
    increment: Callable[[Vector], Vector],
    linear: AbstractStageLinear,
    base: Vector,
    guess: Vector,
    gamma: Scalar,
    scale: Vector,
    *,
    rate: Scalar,
    wanted: Flag,
    workspace: Any,
    value: Vector | None = None,
    residual: Callable[[Vector, Vector], Vector] | None = None,
    linear_share: float = 0.05,
) -> StageSolution:
    """Solves w = γ F(base + w). Where it is not `wanted`, the guess comes back.

    `value` is F at the guess, where that is known. `residual(w, F)` stands in the place of
    w − γ F, for another equation. `linear_share` of what Newton's test asks is asked of a Krylov
    method.
    """
    dtype = rate.dtype
    norm_of = lambda v: newton.norm(divided(v, scale)).astype(dtype)
    # What the rounding of y leaves no hope to get below.
    floor = 4 * tree.eps(base) * norm_of(base)
    target = jnp.maximum(jnp.asarray(newton.kappa).astype(dtype), floor)
    start = StageSolution(
        w=guess,
        norm=jnp.ones((), dtype),
        rate=rate,
        contraction=jnp.zeros((), dtype),
        count=jnp.zeros((), jnp.int32),
        converged=~wanted,
        diverged=jnp.zeros_like(wanted),
        work=Work.of(),
        workspace=workspace,
    )

    def running(at: StageSolution) -> Flag:
        return ~at.converged & ~at.diverged & (at.count < newton.max_steps)

    if residual is None:
        residual = lambda w, f: tree.sub(w, tree.scale(gamma, f))
    known = int(value is not None)

    def increment_at(at: StageSolution) -> Vector:
        there = lambda: increment(tree.add(base, at.w))
        # All lanes that are active are at the same iteration.
        return there() if value is None else lax.cond(any_lane(at.count > 0), there, lambda: value)

    def body(at: StageSolution) -> StageSolution:
        active = running(at)
        r = residual(at.w, increment_at(at))
        tolerance = jnp.where(active, linear_share * target, jnp.inf)
        step, workspace = linear.correction(r, tolerance, at.workspace)
        norm = norm_of(step.value)
        verdict = judge(
            norm,
            at.norm,
            count=at.count,
            max_steps=newton.max_steps,
            target=target,
            floor=floor,
            first_quotient=jnp.maximum(at.rate, 1e-10) ** 0.8,
        )
        first = at.count == 0
        new = StageSolution(
            w=tree.sub(at.w, step.value),
            norm=norm,
            rate=jnp.where(first, at.rate, jnp.minimum(verdict.quotient, jnp.ones((), dtype))),
            contraction=jnp.maximum(at.contraction, jnp.where(first, 0.0, norm / at.norm)),
            count=at.count + 1,
            converged=verdict.converged,
            diverged=verdict.diverged,
            work=at.work.plus(
                Work.of(
                    num_fn_evals=1 - known * tree.count(first),
                    num_newton_steps=1,
                    num_matvecs=step.num_matvecs,
                    num_preconditioner_applications=step.num_applications,
                )
            ),
            workspace=None,
        )
        return tree.where(active, new, at._replace(workspace=None))._replace(workspace=workspace)

    return lax.while_loop(lambda at: any_lane(running(at)), body, start)


def check_tolerances(newton: SimplifiedNewton, solver: AbstractSolver) -> None:
    """Raises where the tolerances were to be the controller's and Diffrax brought none."""
    if newton.rtol is CONTROLLERS or newton.atol is CONTROLLERS or newton.norm is CONTROLLERS:
        raise ValueError(
            f"{type(solver).__name__} has no tolerances: Diffrax hands on those of an adaptive "
            "step size controller in `diffeqsolve`. With constant steps, or outside "
            "`diffeqsolve`, pass `root_finder=nks.ode.SimplifiedNewton.alone()`."
        )

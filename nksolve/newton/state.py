"""What NewtonKrylov carries from one trial to the next."""

from typing import NamedTuple

import jax.numpy as jnp
import lineax as lx
from jaxtyping import PyTree

from .. import tree
from ..history import History
from ..krylov.base import KrylovResult
from ..results import REASONS
from ..typing import Aux, Count, Flag, Scalar, Vector


class Direction(NamedTuple):
    """d, from J d ≈ −F."""

    vector: Vector
    slope: Scalar  # FᵀJd / ‖F‖₂²
    residual: Scalar  # ‖F + J d‖₂ / ‖F‖₂
    eta: Scalar

    @staticmethod
    def found(
        operator: lx.AbstractLinearOperator,
        minus_f: Vector,
        norm: Scalar,
        linear: KrylovResult,
        eta: Scalar,
    ) -> "Direction":
        """That of a linear solve with J for −F to the tolerance η ‖F‖, ‖F‖ = `norm`."""
        descent = linear.descent
        if descent is None:
            descent = tree.vdot(minus_f, operator.mv(linear.value)).real
        # FᵀJd < 0, as a descent direction's must be.
        slope = -jnp.abs(descent / norm / norm)
        slope = jnp.where(slope < 0, slope, -jnp.ones_like(slope))
        return Direction(linear.value, slope, linear.residual_norm / norm, eta)


class Best(NamedTuple):
    """The point of least ‖F‖₂ among those evaluated; the root once there is one."""

    point: Vector
    norm: Scalar
    test_norm: Scalar
    aux: Aux


class Counters(NamedTuple):
    """The counters of the stats, under their names there."""

    num_steps: Count
    num_rejected_steps: Count
    num_linearisations: Count
    num_matvecs: Count
    num_transposed_matvecs: Count
    num_preconditioner_applications: Count
    num_preconditioner_updates: Count
    num_probes: Count
    num_linear_failures: Count

    def after(
        self,
        running: Flag,
        stepped: Flag,
        verdict: "Verdict",
        linear: KrylovResult,
        products: tuple[Count | int, Count | int],
        judging: tuple[Count | int, Count | int, Count | int],
        update: tuple[Flag, Count | int],
    ) -> "Counters":
        """Those after a trial, which is a step where it `stepped`, and its linear solve.

        `products` are those with J and Jᵀ for a direction, `judging` those and applications of M⁻¹
        for the verdict, `update` says whether M⁻¹ was made anew, and by how many matvecs.
        """
        solved, updated = tree.count(verdict.solve), tree.count(update[0])
        slope = solved if linear.descent is None else 0
        matvecs = linear.num_matvecs + slope + solved * products[0] + judging[0]
        transposed = linear.num_transposed_matvecs + solved * products[1] + judging[1]
        applications = linear.num_preconditioner_applications + judging[2]
        failed = verdict.solve & (linear.result != lx.RESULTS.successful)
        return Counters(
            num_steps=self.num_steps + tree.count(stepped & verdict.accepted),
            num_rejected_steps=self.num_rejected_steps + tree.count(stepped & ~verdict.accepted),
            num_linearisations=self.num_linearisations + tree.count(running),
            num_matvecs=self.num_matvecs + matvecs,
            num_transposed_matvecs=self.num_transposed_matvecs + transposed,
            num_preconditioner_applications=self.num_preconditioner_applications + applications,
            num_preconditioner_updates=self.num_preconditioner_updates + updated,
            num_probes=self.num_probes + updated * update[1],
            num_linear_failures=self.num_linear_failures + tree.count(failed),
        )


class NewtonState(NamedTuple):
    """The state of a solve. Norms are 2-norms, but for the test norms."""

    trial: Count  # trial points so far, the initial one included; the same for every lane
    direction: Direction
    search: PyTree  # of the globalisation
    norm: Scalar  # ‖F(y)‖₂
    initial_norm: Scalar  # ‖F(y₀)‖ in the norm of the residual test
    best: Best
    steps_since_best: Count
    forcing: PyTree
    preconditioner: PyTree
    workspace: PyTree
    reason: REASONS
    counters: Counters
    history: History | None
    meter: PyTree


class Verdict(NamedTuple):
    """On a trial point."""

    accepted: Flag
    solve: Flag  # a new direction is wanted
    improved: Flag  # the best point so far
    steps_since_best: Count
    reason: REASONS
    search: PyTree

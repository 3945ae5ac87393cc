"""How W x = b is solved in the stages of a step, with W = I − γ A."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import lineax as lx

from .. import tree
from ..adjoint.base import stop_gradient
from ..krylov.base import AbstractKrylovSolver
from ..krylov.direct import AbstractDirect
from ..krylov.system import KrylovState
from ..linearise.views import divided, scaled, times
from ..newton.preconditioning import carried_arrays, refreshed
from ..precondition.base import Identity
from ..precondition.lagged import Lagged
from ..typing import Args, Count, Flag, Scalar, ScalarLike, Vector


class Stage(NamedTuple):
    """What a preconditioner's hooks get in the place of `args`.

    **Attributes:**

    - `t`: the time of the linearisation.
    - `gamma`: h γ, in units of time: the matrix is I − gamma ∂f/∂y.
    - `args`: those of `diffeqsolve`.
    """

    t: ScalarLike
    gamma: ScalarLike
    args: Args


class Correction(NamedTuple):
    """W⁻¹ r and what it cost."""

    value: Vector
    num_matvecs: Count
    num_applications: Count


class AbstractStageLinear(eqx.Module):
    """W of a step, with what solves with it. Nothing of it is differentiated.

    `correction` serves Newton's iteration, `solve` and `solve_transposed` the derivatives: they are
    for the W of another point, that of a converged stage.
    """

    @abc.abstractmethod
    def workspace(self) -> Any:
        """The memory of a correction."""

    @abc.abstractmethod
    def correction(self, r: Vector, tolerance: Scalar, workspace: Any) -> tuple[Correction, Any]:
        """(W⁻¹ r with ‖r − W d‖ at most `tolerance` in the weighted root-mean-square norm, the
        workspace)."""

    @abc.abstractmethod
    def at(self, operator: lx.AbstractLinearOperator, z: Vector) -> KrylovState:
        """W at another point, with an inverse or a preconditioner for it."""

    @abc.abstractmethod
    def tight(self, state: KrylovState, b: Vector) -> Vector:
        """W⁻¹ b, to the tolerance of derivatives, for the W of such a state or its transpose."""


class DirectStageLinear(AbstractStageLinear):
    """By a factorisation: of W for a step's corrections, anew for a derivative's solve."""

    operator: lx.AbstractLinearOperator
    inverse: lx.AbstractLinearOperator
    solver: AbstractDirect
    stage: Stage

    def workspace(self) -> Any:
        return None

    def correction(self, r: Vector, tolerance: Scalar, workspace: Any) -> tuple[Correction, Any]:
        del tolerance
        none = jnp.zeros((), jnp.int32)
        return Correction(self.inverse.mv(r), none, none + 1), workspace

    def at(self, operator: lx.AbstractLinearOperator, z: Vector) -> KrylovState:
        return self.solver.prepare(operator, z, self.stage)

    def tight(self, state: KrylovState, b: Vector) -> Vector:
        return state.preconditioner.mv(b)


class KrylovStageLinear(AbstractStageLinear):
    """By a Krylov method with the step's preconditioner.

    A correction is solved for in the units of the error weights, to a twentieth of what Newton's
    test asks; a derivative to `adjoint_rtol` relative to its right-hand side.
    """

    operator: lx.AbstractLinearOperator
    inverse: lx.AbstractLinearOperator
    solver: AbstractKrylovSolver
    scale: Vector
    adjoint_rtol: Scalar

    def workspace(self) -> Any:
        return self.solver.workspace(tree.zeros_like(self.operator.in_structure()), real=True)

    def correction(self, r: Vector, tolerance: Scalar, workspace: Any) -> tuple[Correction, Any]:
        return self.measured(r, tolerance, workspace)[1:]

    def measured(
        self, r: Vector, tolerance: Scalar, workspace: Any
    ) -> tuple[Scalar, Correction, Any]:
        """The weighted root-mean-square norm of r − W d, and the correction d."""
        state = KrylovState(scaled(self.operator, self.scale), scaled(self.inverse, self.scale))
        size = jnp.sqrt(jnp.asarray(float(max(tree.size(r), 1)), tolerance.dtype))
        out = self.solver.run(
            state,
            divided(r, self.scale),
            tolerance=tolerance * size,
            real=True,
            workspace=workspace,
        )
        # A Krylov method answers a right-hand side with NaN by zero, which must not be taken for
        # convergence.
        value = tree.axpy(0.0, r, times(out.value, self.scale))
        counts = out.num_matvecs, out.num_preconditioner_applications
        norm = out.residual_norm.astype(size.dtype) / size
        return norm, Correction(value, *counts), out.workspace

    def at(self, operator: lx.AbstractLinearOperator, z: Vector) -> KrylovState:
        del z
        return KrylovState(operator, self.inverse)

    def tight(self, state: KrylovState, b: Vector) -> Vector:
        norm = tree.norm2(b)
        tolerance = self.adjoint_rtol.astype(norm.dtype) * norm
        return self.solver.run(state, b, tolerance=tolerance, real=True, norm=norm).value


class Prepared(NamedTuple):
    """The linear solves of a step."""

    linear: AbstractStageLinear
    carried: Any  # arrays of the preconditioner, for the next step
    updated: Flag


def prepare(
    solver: AbstractKrylovSolver,
    operator: lx.AbstractLinearOperator,
    y: Vector,
    stage: Stage,
    *,
    scale: Vector,
    carried: Any,
    is_first: Flag,
    adjoint_rtol: Scalar,
) -> Prepared:
    """What solves with W in a step that begins at y."""
    operator, y, stage, scale = stop_gradient((operator, y, stage, scale))
    solver = lagged(solver.chosen(lambda: operator, y, stage))
    if isinstance(solver, AbstractDirect):
        inverse = solver.prepare(operator, y, stage).preconditioner
        linear = DirectStageLinear(operator, inverse, solver, stage)
        return Prepared(stop_gradient(linear), carried, jnp.array(True))
    kept = solver.preconditioner
    needed = jnp.array(True)
    fresh = refreshed(kept, carried, operator, y, stage, is_first=is_first, needed=needed)
    linear = KrylovStageLinear(operator, fresh.operator, solver, scale, adjoint_rtol)
    carried = fresh.after(kept, jnp.zeros((), jnp.int32), needed)
    return Prepared(stop_gradient(linear), stop_gradient(carried), fresh.updated)


def nothing_carried(
    solver: AbstractKrylovSolver,
    operator: Callable[[], lx.AbstractLinearOperator],
    y: Vector,
    stage: Stage,
) -> Any:
    """Zeros for the arrays that a preconditioner carries from step to step."""
    solver = lagged(solver.chosen(operator, y, stage))
    if isinstance(solver, AbstractDirect):
        return None
    return carried_arrays(solver.preconditioner, operator, y, stage)


def lagged(solver: AbstractKrylovSolver) -> AbstractKrylovSolver:
    """The solver with its preconditioner kept from step to step by CVODE's rules: for at most 20
    steps, and as long as h γ changes by no more than 30%. One that has an `update` of its own is
    left alone."""
    kept = solver.preconditioner
    if isinstance(solver, AbstractDirect) or not kept.is_rebuilt or isinstance(kept, Identity):
        return solver
    kept = Lagged(kept, max_age=20, shift=lambda y, stage: stage.gamma)
    return eqx.tree_at(lambda s: s.preconditioner, solver, kept)

"""The plain fixed-point iteration."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import PyTree

from .. import tree
from ..history import PerLeaf
from ..krylov.base import AbstractKrylovSolver, check_tolerances
from ..krylov.gmres import GMRES
from ..linearise.policies import AbstractPolicy, Linearise
from ..loops import AbstractProgressMeter, NoProgressMeter
from ..newton.convergence import AbstractConvergenceTest, ResidualTest
from ..newton.report import StepReport
from ..newton.reuse import AbstractReuse, Relinearise
from ..typing import Flag, Norm, ScalarLike, Vector
from .base import AbstractIteration, Proposal, Trial


class Picard(AbstractIteration):
    """Damped fixed-point iteration: y ← y + β F(y), that is y ← (1 − β) y + β g(y) for F = g − y.

    Converges where the eigenvalues of I + β ∂F/∂y lie in the unit disc, at the rate of the largest.
    The cheapest step there is: where g contracts by a half or better it is hard to beat.

    **Arguments:**

    - `rtol`, `atol`: success is ‖F‖ ≤ atol + rtol ‖F₀‖ at the returned point.
    - `damping`: β. For a residual that is not g(y) − y its sign matters: β ∂F/∂y must be near −I.
    - `norm`: the norm of the residual test; the 2-norm by default.
    - `convergence`: the residual test and when to give up.
    - `linear_solver`: for derivatives.
    - `policy`: what a linearisation stores, for derivatives.
    - `history_length`, `progress_meter`, `verbose`: as for `nks.NewtonKrylov`.

    Storage: 2 vectors (the proposed point and the best one). Work of a step: one evaluation.
    """

    rtol: ScalarLike
    atol: ScalarLike
    damping: ScalarLike = 1.0
    norm: Norm = tree.norm2
    convergence: AbstractConvergenceTest = ResidualTest()
    linear_solver: AbstractKrylovSolver = GMRES()
    policy: AbstractPolicy = Linearise()
    history_length: int | PerLeaf = eqx.field(static=True, default=0)
    progress_meter: AbstractProgressMeter = NoProgressMeter()
    verbose: bool | Callable[[StepReport], None] = eqx.field(static=True, default=False)

    reuse: ClassVar[AbstractReuse] = Relinearise()

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)

    def memory(self, variables: Vector) -> PyTree:
        """Nothing."""
        return ()

    def propose(self, memory: PyTree, trial: Trial, wanted: Flag) -> Proposal:
        """y + β F(y)."""
        step = tree.axpy(self.damping, trial.linearisation.value, trial.point)
        return Proposal(step, memory)

    def report(self, memory: PyTree) -> dict[str, Any]:
        """Nothing."""
        return {}

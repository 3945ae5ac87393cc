"""The hookstep: the best step of bounded length in the Krylov space that is there."""

from ...krylov.base import AbstractKrylovSolver
from ...krylov.fgmres import FGMRES
from ...krylov.gmres import GMRES
from ...precondition.base import Identity
from .bounded import AbstractBoundedStep


class Hookstep(AbstractBoundedStep):
    """min ‖F + J s‖ over the s of the Krylov space with ‖s‖ ≤ radius.

    With the Arnoldi relation J Z = V H̄ of the linear solve, s = Z y and ‖F + J s‖ = ‖β e₁ − H̄ y‖:
    a problem of the size of the space, solved through the singular values of H̄,
    y(μ) = (H̄ᴴH̄ + μ RᴴR)⁻¹ H̄ᴴ β e₁ with ‖Z y‖ = ‖R y‖, μ by bisection. No product with J or Jᵀ, and
    a rejected trial takes another μ. It is the Levenberg–Marquardt step within that space.

    Needs the basis: `nks.FGMRES`, or `nks.GMRES` without preconditioner. After a restart only the
    basis of the last cycle exists, which does not hold d: the step is then d shortened to the
    radius. Choose `restart` so that a solve rarely needs a second cycle.

    **Arguments:** as `nks.Dogleg`.

    Storage: m vectors (Z). Work: a Gram matrix of Z (m² inner products in one pass) and an SVD of
    (m + 1) × m for each direction; one combination of m vectors a trial.

    Source: Dennis & Schnabel, Numerical Methods for Unconstrained Optimization and Nonlinear
    Equations, SIAM 1996, §6.4.1; in the Krylov space Viswanath, J. Fluid Mech. 580, 2007; radius:
    Nocedal & Wright, Numerical Optimization, 2nd ed., algorithm 4.1.
    """

    initial_radius: float = 1.0
    accept: float = 1e-3
    min_radius: float = 1e-12
    max_trials: int = 40

    def check(self, linear_solver: AbstractKrylovSolver) -> None:
        plain = isinstance(linear_solver.preconditioner, Identity)
        if isinstance(linear_solver, FGMRES) or (plain and isinstance(linear_solver, GMRES)):
            return
        raise ValueError(
            "`Hookstep` needs the search directions of an Arnoldi process: `linear_solver=` must "
            "be `nks.FGMRES(preconditioner=...)`, or `nks.GMRES()` without a preconditioner, but "
            f"it is `{type(linear_solver).__name__}` with preconditioner "
            f"`{type(linear_solver.preconditioner).__name__}`. `nks.Dogleg` goes with all of them."
        )

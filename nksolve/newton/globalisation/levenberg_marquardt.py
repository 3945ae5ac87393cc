"""Levenberg–Marquardt: damped least-squares steps in the Golub–Kahan space of LSMR."""

from ...krylov.base import AbstractKrylovSolver
from ...krylov.lsmr import LSMR
from .bounded import AbstractBoundedStep


class LevenbergMarquardt(AbstractBoundedStep):
    """min ‖F + J s‖² + μ ‖s‖², with the μ that makes ‖s‖ the radius; also where J is singular.

    LSMR finds d, of least norm among the solutions of min ‖F + J d‖, by products with J and Jᵀ of
    the one linearisation. Where ‖d‖ is at most the radius it is the step. Otherwise the step is the
    Levenberg–Marquardt step in the Golub–Kahan space that LSMR built, J V = U B with B lower
    bidiagonal and U beginning with −F/‖F‖: s = V y with y(μ) = (BᵀB + μ I)⁻¹ Bᵀ e₁ ‖F‖, from the
    singular values of B for any μ, which is found by bisection. A rejected trial takes another μ:
    no product with J or Jᵀ. The space begins with JᵀF (without a preconditioner), so that a step
    promises at least what the Cauchy point does.

    Goes with `nks.LSMR(kept=m)`, which keeps V. Where a solve took more than m iterations d may lie
    outside the space: the step is then the better of d shortened and the best of the space. With a
    preconditioner the space is that of J M⁻¹, s = M⁻¹V y, and ‖s‖ is still what is bounded.

    **Arguments:** as `nks.Dogleg`.

    Reports `trust_region_failed` where no step will do, and `linear_solve_failed` where F is
    orthogonal to the range of J (‖F + J d‖ > 0.999 ‖F‖): a local minimum of ‖F‖, or a saddle.

    Storage: m vectors (V) beside those of LSMR. Work: a Gram matrix of V (m² inner products in one
    pass) and an SVD of (m + 1) × m for each direction; one combination of m vectors a trial.

    Source: Moré, in Watson (ed.), Numerical Analysis, Lecture Notes in Mathematics 630, 1978; in a
    Golub–Kahan space Calvetti & Reichel, BIT 43(2), 2003 (for Tikhonov); radius: Nocedal & Wright,
    Numerical Optimization, 2nd ed., algorithm 4.1.
    """

    initial_radius: float = 1.0
    accept: float = 1e-3
    min_radius: float = 1e-12
    max_trials: int = 40

    def check(self, linear_solver: AbstractKrylovSolver) -> None:
        way = "`linear_solver=nks.LSMR(kept=30)`"
        if not isinstance(linear_solver, LSMR):
            raise ValueError(
                "`LevenbergMarquardt` takes its steps in the Golub–Kahan space that LSMR keeps: "
                f"pass {way}, not `{type(linear_solver).__name__}`. `nks.Dogleg` goes with all "
                "methods, `nks.Hookstep` with GMRES."
            )
        if linear_solver.kept == 0:
            raise ValueError(f"`LevenbergMarquardt` needs the vectors of `LSMR`: pass {way}.")
        damp = linear_solver.damp
        if not (isinstance(damp, int | float) and damp == 0):
            raise ValueError(
                "`LevenbergMarquardt` finds the damping itself: pass LSMR without `damp`."
            )

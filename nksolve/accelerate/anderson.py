"""Anderson's mixing."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from .. import tree
from ..history import PerLeaf
from ..krylov.base import AbstractKrylovSolver, check_tolerances
from ..krylov.gmres import GMRES
from ..linearise.policies import AbstractPolicy, Linearise
from ..loops import AbstractProgressMeter, NoProgressMeter
from ..newton.convergence import AbstractConvergenceTest, ResidualTest
from ..newton.report import StepReport
from ..newton.reuse import AbstractReuse, Relinearise
from ..typing import Count, Flag, Norm, ScalarLike, Vector
from .base import AbstractIteration, Proposal, Trial
from .qr_window import AbstractColumnFilter, ConditionFilter, Window


class AndersonMemory(NamedTuple):
    """The newest differences, and the point they lead to."""

    window: Window
    point: Vector
    residual: Vector
    points: Count  # accepted so far


class Anderson(AbstractIteration):
    """Anderson acceleration: y ← y + β f − (ΔY + β ΔF) γ with γ = argmin ‖f − ΔF γ‖₂, f = F(y).

    ΔY and ΔF hold the differences of the last `depth` + 1 points and of their residuals. For a
    linear F it is GMRES of `depth` steps in disguise, for as long as the window holds every
    difference; afterwards it goes on where GMRES restarts. One evaluation a step and no
    derivative: of use where Picard's iteration contracts slowly, or diverges in few directions.

    **Arguments:**

    - `rtol`, `atol`: success is ‖F‖ ≤ atol + rtol ‖F₀‖ at the returned point.
    - `depth`: the most differences kept, m; no more than there are unknowns.
    - `damping`: β. For a residual that is not g(y) − y its sign and size matter: β ∂F/∂y should be
      near −I, as in `nks.Picard`.
    - `delay`: the number of plain damped steps before the first difference is kept.
    - `filter`: which differences take part: `ConditionFilter()` (the default) or `AngleFilter()`.
      Those that are zero or not finite never do.
    - `norm`: the norm of the residual test; the 2-norm by default. γ is that of the 2-norm.
    - `convergence`: the residual test and when to give up.
    - `linear_solver`: for derivatives.
    - `policy`: what a linearisation stores, for derivatives.
    - `history_length`, `progress_meter`, `verbose`: as for `nks.NewtonKrylov`.

    `stats["num_dropped"]` counts the differences that the filter dropped before their time. Complex
    unknowns count as pairs of real ones: γ is real, since F need not be holomorphic.

    Storage: 2 m + 4 vectors. Work of a step: one evaluation, four passes over ΔF, one over ΔY.

    Source: Anderson, J. ACM 12, 1965; Walker & Ni, SIAM J. Numer. Anal. 49, 2011; Toth & Kelley,
    SIAM J. Numer. Anal. 53, 2015.
    """

    rtol: ScalarLike
    atol: ScalarLike
    depth: int = eqx.field(static=True, default=5)
    damping: ScalarLike = 1.0
    delay: int = eqx.field(static=True, default=0)
    filter: AbstractColumnFilter = ConditionFilter()
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
        if self.depth < 1 or self.delay < 0:
            raise ValueError(
                "`Anderson` keeps at least one difference after a delay of no less than 0 steps, "
                f"but it got depth {self.depth} and delay {self.delay}. `nks.Picard` keeps none."
            )
        if not isinstance(self.filter, AbstractColumnFilter):
            raise TypeError(f"`filter` must be a column filter, but it is {self.filter!r}.")

    def memory(self, variables: Vector) -> PyTree:
        """No differences."""
        size = max(1, min(self.depth, tree.size(variables) * _reals(variables)))
        zero, none = tree.zeros_like(variables), jnp.zeros((), jnp.int32)
        window = Window.allocate(variables, size)
        return AndersonMemory(window, zero, zero, none), none

    def propose(self, memory: PyTree, trial: Trial, wanted: Flag) -> Proposal:
        """Mixes the accepted points."""
        old, dropped = memory
        x, f, accepted = trial.point, trial.linearisation.value, trial.accepted
        usable = accepted & (old.points > self.delay)
        f = tree.where(accepted, f, old.residual)
        x = tree.where(accepted, x, old.point)
        df, dx = tree.sub(f, old.residual), tree.sub(x, old.point)
        window, factor = old.window.append(
            df, tree.axpy(self.damping, df, dx), f, usable, self.filter
        )
        step = tree.sub(tree.scale(self.damping, f), window.combine(factor.solution, f))
        held = _number(old.window.used[:-1]) + tree.count(usable)
        dropped = dropped + jnp.where(wanted, held - _number(window.used), 0)
        new = AndersonMemory(window, x, f, old.points + tree.count(accepted))
        return Proposal(tree.add(x, step), (new, dropped))

    def report(self, memory: PyTree) -> dict[str, Any]:
        """How many differences were dropped."""
        return {"num_dropped": memory[1]}


def _number(flags: Bool[Array, " m"]) -> Count:
    return jnp.sum(flags, dtype=jnp.int32)


def _reals(vector: Vector) -> int:
    return 2 if jnp.issubdtype(tree.scalar_dtype(vector), jnp.complexfloating) else 1

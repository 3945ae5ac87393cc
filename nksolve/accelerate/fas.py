"""The full approximation scheme: multigrid for the nonlinear equations themselves."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jax import lax
from jaxtyping import PyTree

from .. import tree
from ..history import PerLeaf
from ..krylov.base import AbstractKrylovSolver, check_tolerances
from ..krylov.gmres import GMRES
from ..linearise.linearisation import Linearisation
from ..linearise.policies import AbstractPolicy, Linearise
from ..loops import AbstractProgressMeter, NoProgressMeter, any_lane
from ..newton.convergence import AbstractConvergenceTest, ResidualTest
from ..newton.report import StepReport
from ..newton.scaling.units import refusal
from ..precondition.cycle import FCycle
from ..precondition.multigrid import Multigrid, grid_of
from ..typing import Args, Flag, Norm, ScalarLike, Vector
from .base import AbstractIteration, Proposal, Trial, Work
from .fas_cycle import Scheme, cycle


class FAS(AbstractIteration):
    """Full approximation scheme: cycles of nonlinear smoothing and coarse-grid correction.

    On each grid F(u) = τ is smoothed: linearised at u once a sweep, and u ← u + S(τ − F(u)) with
    the linear smoother S of that linearisation. The next grid then solves
    F_c(w) = F_c(û) + R(τ − F(u)) from û, the restricted u, and u ← u + P(w − û). On the coarsest
    grid Newton's method with a dense J. No Krylov space, no forcing terms; one step is one cycle,
    which near a root of an elliptic equation reduces the error by a factor that does not depend on
    the mesh width. It has no globalisation: from far away use `nks.NewtonKrylov`, or grid
    sequencing.

    **Arguments:**

    - `rtol`, `atol`: success is ‖F‖ ≤ atol + rtol ‖F₀‖ at the returned point.
    - `multigrid`: the grids, as for the preconditioner: residuals, transfer, smoother, and the
      number of sweeps and of visits of a cycle (`VCycle` or `WCycle`).
    - `norm`: the norm of the residual test.
    - `coarse_steps`: Newton steps on the coarsest grid in each visit.
    - `convergence`: the residual test and when to give up.
    - `linear_solver`: for derivatives; `GMRES(preconditioner=multigrid)` by default.
    - `policy`: what a linearisation on the finest grid stores.
    - `history_length`, `progress_meter`, `verbose`: as for `nks.NewtonKrylov`.

    Counters are of the finest grid: a cycle takes `pre + post + 1` linearisations there, which
    `num_probes` and `num_matvecs` count the products of.

    Storage: 4 vectors and one linearisation on each grid (a third more in two dimensions); no
    basis. Work of a cycle: `pre + post + 1` evaluations of `fn`, and for each sweep the smoother's
    probes and matvecs.

    Source: Brandt, Math. Comp. 31, 1977, section 5; Briggs, Henson & McCormick, A Multigrid
    Tutorial, 2nd ed., 2000, chapter 6.
    """

    rtol: ScalarLike
    atol: ScalarLike
    multigrid: Multigrid
    norm: Norm
    coarse_steps: int = eqx.field(static=True)
    convergence: AbstractConvergenceTest
    linear_solver: AbstractKrylovSolver
    policy: AbstractPolicy
    history_length: int | PerLeaf = eqx.field(static=True)
    progress_meter: AbstractProgressMeter
    verbose: bool | Callable[[StepReport], None] = eqx.field(static=True)

    def __init__(
        self,
        rtol: ScalarLike,
        atol: ScalarLike,
        multigrid: Multigrid,
        *,
        norm: Norm = tree.norm2,
        coarse_steps: int = 2,
        convergence: AbstractConvergenceTest | None = None,
        linear_solver: AbstractKrylovSolver | None = None,
        policy: AbstractPolicy | None = None,
        history_length: int | PerLeaf = 0,
        progress_meter: AbstractProgressMeter | None = None,
        verbose: bool | Callable[[StepReport], None] = False,
    ):
        check_tolerances(rtol, atol)
        if not isinstance(multigrid, Multigrid):
            raise TypeError(f"`multigrid` must be a `Multigrid`, but it is {multigrid!r}.")
        if isinstance(multigrid.cycle, FCycle) or coarse_steps < 1:
            raise ValueError(
                "`FAS` runs V- and W-cycles with at least one of `coarse_steps`; it got "
                f"{type(multigrid.cycle).__name__} and {coarse_steps}."
            )
        self.rtol, self.atol, self.multigrid, self.norm = rtol, atol, multigrid, norm
        self.coarse_steps = coarse_steps
        self.convergence = ResidualTest() if convergence is None else convergence
        preconditioned = GMRES(preconditioner=multigrid)
        self.linear_solver = preconditioned if linear_solver is None else linear_solver
        self.policy = Linearise() if policy is None else policy
        self.history_length, self.verbose = history_length, verbose
        self.progress_meter = NoProgressMeter() if progress_meter is None else progress_meter

    def memory(self, variables: Vector) -> PyTree:
        """Nothing."""
        return ()

    def propose(self, memory: PyTree, trial: Trial, wanted: Flag) -> Proposal:
        """One cycle."""
        proposed = lax.cond(any_lane(wanted), lambda: self._cycle(trial), lambda: trial.point)
        structure = tree.structure(trial.point)
        linearised = self._num_linearisations(structure)
        num_probes, num_matvecs = self._products(structure)
        return Proposal(proposed, memory, Work(linearised, linearised, num_matvecs, num_probes))

    def report(self, memory: PyTree) -> dict[str, Any]:
        """Nothing."""
        return {}

    def _cycle(self, trial: Trial) -> Vector:
        multigrid, u, args = self.multigrid, trial.point, trial.args
        structure = tree.structure(u)
        structures = multigrid.structures(structure)
        at: list[Callable[[Vector], Linearisation]] = [trial.linearise]
        for depth, coarse in enumerate(structures[1:]):
            args = multigrid.coarse_args(args, coarse)
            at.append(_CoarseResidual(multigrid, depth, args, coarse, trial.static))
        grid = grid_of(multigrid.grid, structure)
        scheme = Scheme(at, structures, grid, multigrid, self.coarse_steps)
        return cycle(scheme, 0, u, tree.zeros_like(u), trial.linearisation)

    def _num_linearisations(self, structure: PyTree) -> int:
        """Those of a cycle on the finest grid, after the one at its start."""
        if len(self.multigrid.structures(structure)) == 1:
            return self.coarse_steps
        return self.multigrid.cycle.pre + self.multigrid.cycle.post

    def _products(self, structure: PyTree) -> tuple[int, int]:
        """(probes, matvecs) of a cycle on the finest grid."""
        grid = grid_of(self.multigrid.grid, structure)
        smoother, cycle = self.multigrid.smoother, self.multigrid.cycle
        if len(self.multigrid.structures(structure)) == 1:
            return tree.size(structure) * self.coarse_steps, 0
        sweeps = cycle.pre + cycle.post
        degree = len(smoother.coefficients(len(grid)))
        return sweeps * smoother.nodes.num_probes(structure, len(grid)), sweeps * degree


class _CoarseResidual(eqx.Module):
    """u → the linearisation of a coarser grid's residual there."""

    multigrid: Multigrid
    depth: int = eqx.field(static=True)
    args: Args
    structure: PyTree = eqx.field(static=True)
    rest: PyTree

    def __call__(self, u: Vector) -> Linearisation:
        y = eqx.combine(u, self.rest)
        return self.multigrid.linearised(self.depth, y, self.args, self.structure)


@refusal.register
def _(part: FAS, congruent: bool) -> str:
    return "its coarse residuals are in the units of the problem. Scale the problem itself."

"""The full approximation scheme: multigrid for the nonlinear equations themselves."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import PyTree

from .. import tree
from ..krylov.base import AbstractKrylovSolver, check_tolerances
from ..krylov.gmres import GMRES
from ..linearise.linearisation import AbstractLinearisable, Linearisation, linearise
from ..linearise.policies import AbstractPolicy, Linearise
from ..loops import any_lane
from ..newton.base import AbstractRootFinder
from ..newton.convergence import AbstractConvergenceTest, ResidualTest, Standing
from ..precondition.cycle import FCycle
from ..precondition.multigrid import Multigrid, grid_of
from ..results import REASONS, first_of, is_success, to_optimistix
from ..typing import Args, Aux, Count, Flag, Fn, Norm, Scalar, ScalarLike, Vector, Y
from .fas_cycle import Scheme, cycle


class _Best(NamedTuple):
    """The point of least ‖F‖₂ so far; the root once there is one."""

    point: Vector
    norm: Scalar
    test_norm: Scalar
    aux: Aux


class FASState(NamedTuple):
    """The state of a solve."""

    trial: Count  # points so far, the initial one included
    proposed: Vector  # by the last cycle
    best: _Best
    initial_norm: Scalar
    steps_since_best: Count
    reason: REASONS
    num_steps: Count
    num_linearisations: Count
    num_matvecs: Count
    num_probes: Count


class FAS(AbstractRootFinder):
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

    def init(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: frozenset[object],
    ) -> FASState:
        if options:
            raise ValueError(f"`FAS` takes no options, but got {sorted(options)}.")
        variables = eqx.filter(y, eqx.is_inexact_array)
        if tree.structure(variables) != f_struct:
            raise ValueError(
                "A root find needs as many equations as unknowns, in the same PyTree of the same "
                f"shapes and dtypes. y is {tree.structure(variables)}, the residual {f_struct}."
            )
        infinite = jnp.full((), jnp.inf, tree.real_dtype(variables))
        none = jnp.zeros((), jnp.int32)
        best = _Best(variables, infinite, jnp.nan * infinite, tree.zeros_like(aux_struct))
        return FASState(
            none, variables, best, infinite, none, REASONS.iterating, none, none, none, none
        )

    def step(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: FASState,
        tags: frozenset[object],
    ) -> tuple[Y, FASState, Aux]:
        """Judges the point that the last cycle proposed; if it is no root, runs the next cycle."""
        running = state.reason == REASONS.iterating
        variables, static = eqx.partition(y, eqx.is_inexact_array)
        trial = tree.where(running, state.proposed, variables)
        lin = self._linearise(fn, eqx.combine(trial, static), args, tags)
        norm, test_norm = tree.norm2(lin.value), self.norm(lin.value)
        is_first = state.trial == 0
        finite = jnp.isfinite(norm) & jnp.isfinite(test_norm)
        accepted = running & finite
        least = accepted & (norm < state.best.norm)
        since_best = jnp.where(least, 0, state.steps_since_best + tree.count(accepted))
        initial_norm = jnp.where(is_first, test_norm, state.initial_norm)
        atol = jnp.asarray(self.atol).astype(norm.dtype)
        target = atol + jnp.asarray(self.rtol).astype(norm.dtype) * initial_norm
        stop, reason = self.convergence(Standing(test_norm, initial_norm, atol, target, since_best))
        reason = first_of(
            (~running, state.reason),
            (~finite, REASONS.nonfinite),
            (stop, reason),
            otherwise=REASONS.iterating,
        )
        wanted = accepted & ~stop
        proposed = lax.cond(
            any_lane(wanted),
            lambda: self._cycle(fn, trial, static, args, lin, tags),
            lambda: trial,
        )
        improved = least | (accepted & stop & is_success(reason))
        structure = tree.structure(variables)
        linearised = self._num_linearisations(structure)
        num_probes, num_matvecs = self._products(structure)
        new = FASState(
            trial=state.trial + 1,
            proposed=tree.where(wanted, proposed, trial),
            best=tree.where(improved, _Best(trial, norm, test_norm, lin.aux), state.best),
            initial_norm=initial_norm,
            steps_since_best=since_best,
            reason=reason,
            num_steps=state.num_steps + tree.count(accepted & ~is_first),
            num_linearisations=(
                state.num_linearisations + tree.count(running) + linearised * tree.count(wanted)
            ),
            num_matvecs=state.num_matvecs + num_matvecs * tree.count(wanted),
            num_probes=state.num_probes + num_probes * tree.count(wanted),
        )
        return eqx.combine(tree.where(accepted, trial, variables), static), new, new.best.aux

    def terminate(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: FASState,
        tags: frozenset[object],
    ) -> tuple[Flag, optx.RESULTS]:
        return jnp.asarray(state.reason != REASONS.iterating), to_optimistix(state.reason)

    def postprocess(
        self,
        fn: Fn,
        y: Y,
        aux: Aux,
        args: Args,
        options: dict[str, Any],
        state: FASState,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        none = jnp.zeros((), jnp.int32)
        evals = self.policy.evals_per_matvec * (state.num_matvecs + state.num_probes)
        exhausted = state.reason == REASONS.iterating
        stats = {
            "num_steps": state.num_steps,
            "num_rejected_steps": none,
            "num_linearisations": state.num_linearisations,
            "num_matvecs": state.num_matvecs,
            "num_transposed_matvecs": none,
            "num_preconditioner_applications": none,
            "num_preconditioner_updates": none,
            "num_probes": state.num_probes,
            "num_linear_failures": none,
            "num_fn_evals": state.num_linearisations + evals,
            "residual_norm": state.best.test_norm,
            "initial_residual_norm": state.initial_norm,
            "reason": REASONS.where(exhausted, REASONS.max_steps, state.reason),
        }
        static = eqx.filter(y, eqx.is_inexact_array, inverse=True)
        return eqx.combine(state.best.point, static), state.best.aux, stats

    def _cycle(
        self,
        fn: Fn,
        u: Vector,
        static: PyTree,
        args: Args,
        lin: Linearisation,
        tags: frozenset[object],
    ) -> Vector:
        multigrid, structure = self.multigrid, tree.structure(u)
        structures = multigrid.structures(structure)
        at = [lambda u: self._linearise(fn, eqx.combine(u, static), args, tags)]
        for depth, coarse in enumerate(structures[1:]):
            args = multigrid.coarse_args(args, coarse)
            at.append(_CoarseResidual(multigrid, depth, args, coarse, static))
        grid = grid_of(multigrid.grid, structure)
        scheme = Scheme(at, structures, grid, multigrid, self.coarse_steps)
        return cycle(scheme, 0, u, tree.zeros_like(lin.value), lin)

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

    def _linearise(self, fn: Fn, y: Y, args: Args, tags: frozenset[object]) -> Linearisation:
        # Only the derivative with respect to y is wanted: args are closed over.
        target = fn if isinstance(fn, AbstractLinearisable) else lambda y, _: fn(y, args)
        return linearise(target, y, has_aux=True, policy=self.policy, tags=tags)


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

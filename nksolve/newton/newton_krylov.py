"""Inexact Newton with Krylov solves, a globalisation, and one linearisation for each trial."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import PyTree

from .. import tree
from ..history import History, PerLeaf
from ..krylov.base import AbstractKrylovSolver, KrylovState, check_tolerances
from ..krylov.basis import as_real_space
from ..krylov.gmres import GMRES
from ..linearise.linearisation import AbstractLinearisable, Linearisation, linearise
from ..linearise.lower import working
from ..linearise.policies import AbstractPolicy, Linearise
from ..linearise.tags import holomorphic_tag
from ..loops import AbstractProgressMeter, NoProgressMeter
from ..results import REASONS, first_of, is_success, to_optimistix
from ..typing import Args, Aux, Flag, Fn, Norm, Scalar, ScalarLike, Vector, Y
from .base import AbstractRootFinder, check_square
from .composition import check_start, solved_with
from .convergence import AbstractConvergenceTest, ResidualTest, Standing, is_finite, stands_still
from .forcing import AbstractForcing, Progress
from .globalisation.base import AbstractGlobalisation, Linear, Model, Trial, merit
from .globalisation.line_search import Backtracking
from .preconditioning import carried_arrays, matvecs_per_application, refreshed
from .report import Choice, StepReport, print_choice, told
from .state import Best, Counters, Direction, NewtonState, Verdict
from .tightened import Tightened


class NewtonKrylov(AbstractRootFinder):
    """Newton–Krylov: J_k d_k ≈ −F_k by a Krylov method to ‖F_k + J_k d_k‖ ≤ η_k ‖F_k‖.

    Each trial point y_k + λ d_k is tried by linearising there, which gives its residual and the
    next Jacobian in one evaluation of `fn`: K accepted full steps evaluate it K + 1 times, each
    rejected trial once more, and no matvec evaluates it (with `nks.Linearise`). Success is
    ‖F‖ ≤ atol + rtol ‖F₀‖ at the returned point. On failure the point of least ‖F‖₂ among those
    evaluated is returned, with the reason in `stats["reason"]`.

    An `optimistix.AbstractRootFinder`: works in `nks.root_find` and in `optx.root_find` (whose
    `max_steps` counts the evaluation of the initial point too).

    **Arguments:**

    - `rtol`, `atol`: tolerances of the residual test.
    - `norm`: the norm of that test; the 2-norm by default. Forcing terms and slopes use the 2-norm.
    - `linear_solver`: a Krylov method with its preconditioner; its own tolerances serve elsewhere.
    - `forcing`: how tight each linear solve is.
    - `globalisation`: how a step is found along the direction.
    - `convergence`: the residual test and when to give up.
    - `policy`: what a linearisation stores; see `nks.Linearise`.
    - `step_tol`: give up (`step_small`) where a step changes no entry of y by more than `step_tol`
      of itself; the unit round-off of y by default.
    - `history_length`: keep records of so many trials in `stats["history"]`; 0 for none,
      `nks.PerLeaf(n)` for records of n trials with the norm of each leaf.
    - `progress_meter`: a meter of `equinox.internal` (`TextProgressMeter()`, …), stepping with
      log ‖F‖.
    - `verbose`: print a line at each trial, or call `verbose(report)` with an `nks.StepReport`.
      Both are absent from the compiled program unless asked for.

    Storage: the Krylov workspace, one linearisation, 3 vectors (y, d, the best point) and aux.
    Work of a step: one evaluation of `fn`, the matvecs of one Krylov solve.

    Source: Knoll & Keyes, J. Comput. Phys. 193, 2004; Eisenstat & Walker, SIAM J. Sci. Comput.
    17(1), 1996; Kelley, Solving Nonlinear Equations with Newton's Method, SIAM 2003, chapter 3.
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Norm = tree.norm2
    linear_solver: AbstractKrylovSolver = GMRES()
    forcing: AbstractForcing = Tightened()
    globalisation: AbstractGlobalisation = Backtracking()
    convergence: AbstractConvergenceTest = ResidualTest()
    policy: AbstractPolicy = Linearise()
    step_tol: float | None = None
    history_length: int | PerLeaf = eqx.field(static=True, default=0)
    progress_meter: AbstractProgressMeter = NoProgressMeter()
    verbose: bool | Callable[[StepReport], None] = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        if not isinstance(self.linear_solver, AbstractKrylovSolver):
            raise TypeError(
                "`linear_solver` must be one of nksolve's Krylov methods, such as `nks.GMRES()`, "
                f"but it is {self.linear_solver!r}. Lineax's solvers can neither stop at a forcing "
                "term nor take a preconditioner along."
            )
        self.globalisation.check(self.linear_solver.underlying)

    def init(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: frozenset[object],
    ) -> NewtonState:
        if options:
            raise ValueError(
                f"`NewtonKrylov` takes no options, but got {sorted(options)}: what can be chosen "
                "is a field of the solver."
            )
        variables = eqx.filter(y, eqx.is_inexact_array)
        check_square(tree.structure(variables), f_struct)
        dtype = tree.real_dtype(variables)
        operator = lambda: self._solved_with(fn, y, args, tags, None)
        linear_solver = self.linear_solver.chosen(operator, y, args)
        check_start(self.globalisation, linear_solver, self.policy, operator)
        if self.verbose is True:
            print_choice(self.linear_solver.why(operator, y, args))
        workspace = linear_solver.workspace(
            self.policy.solve_space(variables), real=_real(variables, tags)
        )
        one, infinite = jnp.ones((), dtype), jnp.full((), jnp.inf, dtype)
        none = jnp.zeros((), jnp.int32)
        return NewtonState(
            trial=none,
            direction=Direction(tree.zeros_like(variables), -one, one, 0 * one),
            search=self.begun_search(fn, y, args, workspace, tags),
            norm=infinite,
            initial_norm=infinite,
            best=Best(variables, infinite, jnp.nan * one, tree.zeros_like(aux_struct)),
            steps_since_best=none,
            forcing=self.forcing.init(dtype),
            preconditioner=carried_arrays(linear_solver.preconditioner, operator, y, args),
            workspace=workspace,
            reason=REASONS.iterating,
            counters=Counters(*(none for _ in Counters._fields)),
            history=(
                History.empty(self.history_length, dtype, f_struct) if self.history_length else None
            ),
            meter=self.progress_meter.init(),
        )

    def step(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: NewtonState,
        tags: frozenset[object],
    ) -> tuple[Y, NewtonState, Aux]:
        """One trial: linearise there and judge it; if it stands and is no root, find a direction.

        A lane that has stopped keeps the step zero and repeats itself: nothing of it changes.
        """
        running = state.reason == REASONS.iterating
        variables, static = eqx.partition(y, eqx.is_inexact_array)
        step = self.globalisation.displacement(state.search, state.direction.vector)
        trial = tree.add(variables, tree.where(running, step, tree.zeros_like(step)))
        point = eqx.combine(trial, static)
        lin = self._linearise(fn, point, args, tags)
        norm, test_norm = tree.norm2(lin.value), self.norm(lin.value)
        here = lambda: self._linear(
            solved_with(self.globalisation, state.search, lin.operator), point, args, tags
        )
        verdict = self._judge(state, running, trial, lin.value, norm, test_norm, here)

        # Where no direction is wanted the tolerance is infinite, and the solver does nothing.
        eta, forcing = self.forcing.eta(self._progress(state, norm, test_norm), state.forcing)
        wide = solved_with(self.globalisation, verdict.search, lin.operator)
        operator = working(wide)
        wide = None if operator is wide else wide
        linear_solver = self.linear_solver.chosen(lambda: operator, point, args)
        preconditioner = refreshed(
            linear_solver.preconditioner,
            state.preconditioner,
            operator,
            point,
            args,
            is_first=state.trial == 0,
            needed=verdict.solve,
        )
        minus_f = tree.neg(lin.value)
        solved = KrylovState(operator, preconditioner.operator, wide)
        linear = linear_solver.run(
            solved,
            minus_f,
            real=_real(variables, tags),
            norm=norm,
            tolerance=jnp.where(verdict.solve, eta * norm, jnp.inf),
            workspace=state.workspace,
        )
        found = Direction.found(lin.operator, minus_f, norm, linear, eta)
        left = linear.workspace, linear.num_restarts, verdict.solve, solved
        model = Model(lin.operator, minus_f, norm, found, *left)

        variables = tree.where(verdict.accepted, trial, variables)
        direction = tree.where(verdict.solve, found, state.direction)
        search = self.globalisation.start(model, verdict.search)
        search = tree.where(verdict.solve, search, verdict.search)
        next_step = self.globalisation.displacement(search, direction.vector)
        reason = first_of(
            (verdict.reason != REASONS.iterating, verdict.reason),
            (verdict.solve & ~(found.residual < 0.999), REASONS.linear_solve_failed),
            (stands_still(next_step, variables, self.step_tol), REASONS.step_small),
            otherwise=REASONS.iterating,
        )
        new = state._replace(
            trial=state.trial + 1,
            direction=direction,
            search=tree.where(running, search, state.search),
            norm=jnp.where(verdict.accepted, norm, state.norm),
            initial_norm=jnp.where(state.trial == 0, test_norm, state.initial_norm),
            best=tree.where(verdict.improved, Best(trial, norm, test_norm, lin.aux), state.best),
            steps_since_best=verdict.steps_since_best,
            forcing=tree.where(verdict.solve, forcing, state.forcing),
            preconditioner=preconditioner.after(
                linear_solver.preconditioner, linear.num_steps, verdict.solve
            ),
            workspace=linear.workspace,
            reason=reason,
            counters=state.counters.after(
                running,
                running & (state.trial > 0),
                verdict,
                linear,
                self.globalisation.products(state.search),
                self.globalisation.work(verdict.search),
                (preconditioner.updated, preconditioner.num_probes),
            ),
        )
        length = self.globalisation.step_length(state.search)
        row = {
            "norm": test_norm,
            "eta": jnp.where(linear.num_matvecs > 0, direction.eta, jnp.nan),
            "num_matvecs": linear.num_matvecs,
            "step_length": jnp.where(state.trial == 0, jnp.zeros_like(length), length),
            "accepted": verdict.accepted,
        }
        new = told(self, state, new, running, row, lin.value)
        return eqx.combine(variables, static), new, new.best.aux

    def terminate(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: NewtonState,
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
        state: NewtonState,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        self.progress_meter.close(state.meter)
        counters = state.counters
        exhausted = state.reason == REASONS.iterating
        stats = {
            **counters._asdict(),
            "num_fn_evals": (
                counters.num_linearisations
                + self.policy.evals_per_matvec
                * (counters.num_matvecs + counters.num_transposed_matvecs + counters.num_probes)
            ),
            "residual_norm": state.best.test_norm,
            "initial_residual_norm": state.initial_norm,
            "reason": REASONS.where(exhausted, REASONS.max_steps, state.reason),
        }
        operator = lambda: self._solved_with(fn, y, args, tags, state.search)
        linear_solver = self.linear_solver.chosen(operator, y, args)
        stats |= linear_solver.report(state.workspace)
        if why := self.linear_solver.why(operator, y, args):
            stats["choice"] = Choice(why)
        if inner := matvecs_per_application(linear_solver.preconditioner, operator):
            # Those of an inner iteration are not counted; this is the most that they can be.
            most = inner * counters.num_preconditioner_applications
            stats["num_inner_matvecs"] = most
            stats["num_fn_evals"] += self.policy.evals_per_matvec * most
        if state.history is not None:
            stats["history"] = state.history
        static = eqx.filter(y, eqx.is_inexact_array, inverse=True)
        return eqx.combine(state.best.point, static), state.best.aux, stats

    def begun_search(
        self, fn: Fn, y: Y, args: Args, workspace: PyTree, tags: frozenset[object]
    ) -> PyTree:
        """The state of the globalisation before a first point."""
        variables = eqx.filter(y, eqx.is_inexact_array)
        one = jnp.ones((), tree.real_dtype(variables))
        search = self.globalisation.init(variables, one, workspace)

        def linear() -> Linear:
            found = self._linearise(fn, y, args, tags).operator
            return self._linear(solved_with(self.globalisation, search, found), y, args, tags)

        return self.globalisation.remember(search, linear)

    def target(self, initial_norm: Scalar) -> Scalar:
        """atol + rtol ‖F₀‖."""
        atol = jnp.asarray(self.atol).astype(initial_norm.dtype)
        return atol + jnp.asarray(self.rtol).astype(initial_norm.dtype) * initial_norm

    def _linearise(self, fn: Fn, y: Y, args: Args, tags: frozenset[object]) -> Linearisation:
        # Only the derivative with respect to y is wanted: args are closed over.
        target = fn if isinstance(fn, AbstractLinearisable) else lambda y, _: fn(y, args)
        return linearise(target, y, has_aux=True, policy=self.policy, tags=tags)

    def _solved_with(
        self, fn: Fn, y: Y, args: Args, tags: frozenset[object], search: PyTree
    ) -> lx.AbstractLinearOperator:
        """The operator of the linear systems at a point."""
        found = self._linearise(fn, y, args, tags).operator
        return working(solved_with(self.globalisation, search, found))

    def _linear(self, operator: Any, y: Y, args: Args, tags: frozenset[object]) -> Linear:
        solver = self.linear_solver.chosen(lambda: working(operator), y, args)
        real = _real(eqx.filter(y, eqx.is_inexact_array), tags)
        return Linear(solver, operator, y, args, real)

    def _judge(
        self,
        state: NewtonState,
        running: Flag,
        trial: Vector,
        value: Vector,
        norm: Scalar,
        test_norm: Scalar,
        linear: Callable[[], Linear],
    ) -> Verdict:
        is_first = jnp.isinf(state.norm)
        finite = is_finite(trial, norm, test_norm)
        phi = merit(norm, state.norm, finite)  # 0 at the initial point
        judged = self.globalisation.judge(
            state.search,
            Trial(trial, value, phi, state.direction.vector, running, linear),
        )
        tried = running & finite
        stands, least = tried & judged.accepted, tried & (norm < state.best.norm)
        since_best = jnp.where(least, 0, state.steps_since_best + tree.count(stands))
        initial_norm = jnp.where(state.trial == 0, test_norm, state.initial_norm)
        atol = jnp.asarray(self.atol).astype(norm.dtype)
        stop, reason = self.convergence(
            Standing(test_norm, initial_norm, atol, self.target(initial_norm), since_best)
        )
        # A root is one, whatever the globalisation thinks of the way there.
        accepted = stands | (tried & is_success(reason))
        failed = running & ~accepted & (judged.failed | is_first)
        return Verdict(
            accepted=accepted,
            solve=accepted & ~stop,
            improved=least | (accepted & stop & is_success(reason)),
            steps_since_best=since_best,
            reason=first_of(
                (~running, state.reason),
                (accepted & stop, reason),
                (failed & ~finite, REASONS.nonfinite),
                (failed, self.globalisation.failure(state.search)),
                otherwise=REASONS.iterating,
            ),
            search=judged.state,
        )

    def _progress(self, state: NewtonState, norm: Scalar, test_norm: Scalar) -> Progress:
        initial_norm = jnp.where(state.trial == 0, test_norm, state.initial_norm)
        return Progress(
            is_first=jnp.isinf(state.norm),
            norm=norm,
            previous_norm=state.norm,
            linear_norm=state.norm * self.globalisation.linear_norm(state.search, state.direction),
            previous_eta=state.direction.eta,
            target=self.target(initial_norm) / test_norm,
            length=self.globalisation.held_length(state.search),
        )


def _real(variables: Vector, tags: frozenset[object]) -> bool:
    return as_real_space(variables, holomorphic_tag in tags)

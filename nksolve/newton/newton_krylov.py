"""Inexact Newton with Krylov solves, a globalisation, and one linearisation for each trial."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import PyTree

from .. import tree
from ..history import History
from ..krylov.base import AbstractKrylovSolver, KrylovResult, KrylovState, check_tolerances
from ..krylov.basis import as_real_space
from ..krylov.gmres import GMRES
from ..linearise.linearisation import AbstractLinearisable, Linearisation, linearise
from ..linearise.policies import AbstractPolicy, Linearise
from ..linearise.tags import holomorphic_tag
from ..loops import AbstractProgressMeter, NoProgressMeter
from ..precondition.base import Identity
from ..results import REASONS, first_of, is_success, to_optimistix
from ..typing import Args, Aux, Count, Flag, Fn, Norm, Scalar, ScalarLike, Vector, Y
from .base import AbstractRootFinder
from .convergence import AbstractConvergenceTest, ResidualTest, Standing
from .forcing import AbstractForcing, EisenstatWalker2, Progress
from .line_search import AbstractGlobalisation, Backtracking
from .preconditioning import carried_arrays, refreshed
from .report import StepReport, emit, print_report


class _Direction(NamedTuple):
    """d, from J d ≈ −F."""

    vector: Vector
    norm: Scalar  # ‖d‖₂
    slope: Scalar  # FᵀJd / ‖F‖₂²
    residual: Scalar  # ‖F + J d‖₂
    eta: Scalar


class _Best(NamedTuple):
    """The point of least ‖F‖₂ among those evaluated; the root once there is one."""

    point: Vector
    norm: Scalar
    test_norm: Scalar
    aux: Aux


class _Counters(NamedTuple):
    num_steps: Count
    num_rejected_steps: Count
    num_linearisations: Count
    num_matvecs: Count
    num_preconditioner_applications: Count
    num_preconditioner_updates: Count
    num_linear_failures: Count


class _State(NamedTuple):
    trial: Count  # trial points so far, the initial one included; the same for every lane
    direction: _Direction
    search: PyTree  # of the globalisation
    norm: Scalar  # ‖F(y)‖₂
    initial_norm: Scalar  # ‖F(y₀)‖ in the norm of the residual test
    best: _Best
    steps_since_best: Count
    forcing: PyTree
    preconditioner: PyTree
    workspace: PyTree
    reason: REASONS
    counters: _Counters
    history: History | None
    meter: PyTree


class _Verdict(NamedTuple):
    """On a trial point."""

    accepted: Flag
    solve: Flag  # a new direction is wanted
    improved: Flag  # the best point so far
    reason: REASONS
    search: PyTree


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
    - `step_tol`: give up (`step_small`) where a step falls below `step_tol` ‖y‖; the unit
      round-off of y by default.
    - `history_length`: keep records of so many trials in `stats["history"]`; 0 for none.
    - `progress_meter`: an Equinox progress meter, stepping with log ‖F‖.
    - `verbose`: print a line at each trial, or call `verbose(report)` with an `nks.StepReport`.
      Both are absent from the compiled program unless asked for.

    Storage: the Krylov workspace, one linearisation, 3 vectors. Work of a step: one evaluation of
    `fn`, the matvecs of one Krylov solve.

    Source: Knoll & Keyes, J. Comput. Phys. 193, 2004; Eisenstat & Walker, SIAM J. Sci. Comput.
    17(1), 1996; Kelley, Solving Nonlinear Equations with Newton's Method, SIAM 2003, chapter 3.
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Norm = tree.norm2
    linear_solver: AbstractKrylovSolver = GMRES()
    forcing: AbstractForcing = EisenstatWalker2()
    globalisation: AbstractGlobalisation = Backtracking()
    convergence: AbstractConvergenceTest = ResidualTest()
    policy: AbstractPolicy = Linearise()
    step_tol: float | None = None
    history_length: int = eqx.field(static=True, default=0)
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

    def init(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        f_struct: Vector,
        aux_struct: Aux,
        tags: frozenset[object],
    ) -> _State:
        if options:
            raise ValueError(
                f"`NewtonKrylov` takes no options, but got {sorted(options)}: what can be chosen "
                "is a field of the solver."
            )
        variables = eqx.filter(y, eqx.is_inexact_array)
        _check_square(tree.structure(variables), f_struct)
        dtype = tree.real_dtype(variables)
        zeros = tree.zeros_like(variables)
        one, infinite = jnp.ones((), dtype), jnp.full((), jnp.inf, dtype)
        none = jnp.zeros((), jnp.int32)
        return _State(
            trial=none,
            direction=_Direction(zeros, 0 * one, -one, infinite, 0 * one),
            search=self.globalisation.start(-one),
            norm=infinite,
            initial_norm=infinite,
            best=_Best(variables, infinite, infinite, tree.zeros_like(aux_struct)),
            steps_since_best=none,
            forcing=self.forcing.init(dtype),
            preconditioner=carried_arrays(
                self.linear_solver.preconditioner,
                lambda: self._linearise(fn, y, args, tags).operator,
                y,
                args,
            ),
            workspace=self.linear_solver.workspace(variables, real=_real(variables, tags)),
            reason=REASONS.iterating,
            counters=_Counters(*(none for _ in _Counters._fields)),
            history=History.empty(self.history_length, dtype) if self.history_length else None,
            meter=self.progress_meter.init(),
        )

    def step(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: _State,
        tags: frozenset[object],
    ) -> tuple[Y, _State, Aux]:
        """One trial: linearise there and judge it; if it stands and is no root, find a direction.

        A lane that has stopped keeps the step zero and repeats itself: nothing of it changes.
        """
        running = state.reason == REASONS.iterating
        variables, static = eqx.partition(y, eqx.is_inexact_array)
        step = self.globalisation.displacement(state.search, state.direction.vector)
        trial = tree.add(variables, tree.where(running, step, tree.zeros_like(step)))
        lin = self._linearise(fn, eqx.combine(trial, static), args, tags)
        norm, test_norm = tree.norm2(lin.value), self.norm(lin.value)
        verdict = self._judge(state, running, norm, test_norm)

        # Where no direction is wanted the tolerance is infinite, and the solver does nothing.
        eta, forcing = self.forcing.eta(self._progress(state, norm, test_norm), state.forcing)
        preconditioner, carried = refreshed(
            self.linear_solver.preconditioner,
            state.preconditioner,
            lin.operator,
            eqx.combine(trial, static),
            args,
            is_first=state.trial == 0,
            needed=verdict.solve,
        )
        system = KrylovState(lin.operator, preconditioner).system(_real(variables, tags))
        minus_f = tree.where(verdict.solve, tree.neg(lin.value), tree.zeros_like(lin.value))
        linear = self.linear_solver.solve(
            system,
            minus_f,
            tolerance=jnp.where(verdict.solve, eta * norm, jnp.inf),
            workspace=state.workspace,
        )
        slope = _slope(system, minus_f, linear, norm)
        found = _Direction(
            linear.value, tree.norm2(linear.value), slope, linear.residual_norm, eta
        )

        variables = tree.where(verdict.accepted, trial, variables)
        direction = tree.where(verdict.solve, found, state.direction)
        search = tree.where(verdict.solve, self.globalisation.start(slope), verdict.search)
        new = state._replace(
            trial=state.trial + 1,
            direction=direction,
            search=tree.where(running, search, state.search),
            norm=jnp.where(verdict.accepted, norm, state.norm),
            initial_norm=jnp.where(state.trial == 0, test_norm, state.initial_norm),
            best=tree.where(verdict.improved, _Best(trial, norm, test_norm, lin.aux), state.best),
            steps_since_best=jnp.where(
                verdict.improved, 0, state.steps_since_best + tree.count(verdict.accepted)
            ),
            forcing=tree.where(verdict.solve, forcing, state.forcing),
            preconditioner=carried,
            workspace=linear.workspace,
            reason=self._reason(verdict, running, linear, norm, direction, search, variables),
            counters=_counted(state, verdict, running, linear, self.linear_solver),
        )
        new = self._tell(state, new, running, test_norm, linear, verdict.accepted)
        return eqx.combine(variables, static), new, new.best.aux

    def terminate(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: _State,
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
        state: _State,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        self.progress_meter.close(state.meter)
        exhausted = state.reason == REASONS.iterating
        reason = REASONS.where(exhausted, REASONS.max_steps, state.reason)
        counters = state.counters._asdict()
        num_evals = (
            counters["num_linearisations"] + self.policy.evals_per_matvec * counters["num_matvecs"]
        )
        stats = {
            **counters,
            "num_fn_evals": num_evals,
            "num_transposed_matvecs": jnp.zeros_like(num_evals),
            "residual_norm": state.best.test_norm,
            "initial_residual_norm": state.initial_norm,
            "reason": reason,
        }
        if state.history is not None:
            stats["history"] = state.history
        static = eqx.filter(y, eqx.is_inexact_array, inverse=True)
        return eqx.combine(state.best.point, static), state.best.aux, stats

    def _linearise(
        self, fn: Fn, y: Y, args: Args, tags: frozenset[object]
    ) -> Linearisation:
        # Only the derivative with respect to y is wanted: args are closed over.
        def residual(y, _):
            return fn(y, args)

        target = fn if isinstance(fn, AbstractLinearisable) else residual
        return linearise(target, y, has_aux=True, policy=self.policy, tags=tags)

    def _judge(
        self, state: _State, running: Flag, norm: Scalar, test_norm: Scalar
    ) -> _Verdict:
        is_first = state.trial == 0
        finite = jnp.isfinite(norm) & jnp.isfinite(test_norm)
        merit = jnp.where(finite, norm / state.norm, jnp.inf)  # 0 at the initial point
        judged = self.globalisation.judge(state.search, merit)
        accepted = running & finite & judged.accepted
        failed = running & ~accepted & (judged.failed | is_first)
        improved = running & finite & (norm < state.best.norm)
        initial_norm = jnp.where(is_first, test_norm, state.initial_norm)
        since_best = jnp.where(improved, 0, state.steps_since_best + 1)
        stop, reason = self.convergence(
            Standing(
                test_norm,
                initial_norm,
                jnp.asarray(self.atol).astype(norm.dtype),
                jnp.asarray(self.rtol).astype(norm.dtype),
                since_best,
            )
        )
        reason = first_of(
            (~running, state.reason),
            (accepted & stop, reason),
            (failed & ~finite, REASONS.nonfinite),
            (failed, REASONS.line_search_failed),
            otherwise=REASONS.iterating,
        )
        return _Verdict(
            accepted=accepted,
            solve=accepted & ~stop,
            improved=improved | (accepted & is_success(reason)),
            reason=reason,
            search=judged.state,
        )

    def _progress(self, state: _State, norm: Scalar, test_norm: Scalar) -> Progress:
        # ‖F + λ J d‖² = (1−λ)²‖F‖² + 2λ(1−λ) Fᵀr + λ²‖r‖², r = F + J d
        length = self.globalisation.step_length(state.search)
        previous, direction = state.norm, state.direction
        ratio = direction.residual / previous
        square = (
            (1 - length) ** 2
            + 2 * length * (1 - length) * (1 + direction.slope)
            + (length * ratio) ** 2
        )
        target = jnp.asarray(self.atol).astype(norm.dtype) + (
            jnp.asarray(self.rtol).astype(norm.dtype) * state.initial_norm
        )
        return Progress(
            is_first=state.trial == 0,
            norm=norm,
            previous_norm=previous,
            linear_norm=previous * jnp.sqrt(jnp.maximum(square, 0)),
            previous_eta=direction.eta,
            target=jnp.where(state.trial == 0, 0, target / test_norm),
        )

    def _reason(
        self,
        verdict: _Verdict,
        running: Flag,
        linear: KrylovResult,
        norm: Scalar,
        direction: _Direction,
        search: PyTree,
        variables: Vector,
    ) -> REASONS:
        useless = verdict.solve & ~(linear.residual_norm < 0.999 * norm)
        tol = tree.eps(variables) if self.step_tol is None else self.step_tol
        length = self.globalisation.step_length(search)
        small = length * direction.norm <= tol * tree.norm2(variables)
        return first_of(
            (verdict.reason != REASONS.iterating, verdict.reason),
            (useless, REASONS.linear_solve_failed),
            (small & running, REASONS.step_small),
            otherwise=REASONS.iterating,
        )

    def _tell(
        self,
        old: _State,
        new: _State,
        running: Flag,
        test_norm: Scalar,
        linear: KrylovResult,
        accepted: Flag,
    ) -> _State:
        """Record, print, and move the meter, where asked to."""
        first = old.trial == 0
        length = self.globalisation.step_length(old.search)
        length = jnp.where(first, jnp.zeros_like(length), length)
        eta = jnp.where(accepted & (linear.num_matvecs > 0), new.direction.eta, jnp.nan)
        if new.history is not None:
            history = new.history.record(
                old.trial,
                running,
                norm=test_norm,
                eta=eta,
                num_matvecs=linear.num_matvecs,
                step_length=length,
                accepted=accepted,
                reason=new.reason,
            )
            new = new._replace(history=history)
        if self.verbose:
            receiver = print_report if self.verbose is True else self.verbose
            emit(
                receiver, running, old.trial, test_norm, eta, linear.num_matvecs, length, accepted,
                new.reason,
            )
        if not isinstance(self.progress_meter, NoProgressMeter):
            progress = self._fraction(new)
            new = new._replace(meter=self.progress_meter.step(old.meter, progress))
        return new

    def _fraction(self, state: _State) -> Scalar:
        """How far ‖F‖ has come towards the tolerance, in logarithms."""
        initial = state.initial_norm
        target = jnp.asarray(self.atol).astype(initial.dtype) + (
            jnp.asarray(self.rtol).astype(initial.dtype) * initial
        )
        done = jnp.log(state.best.test_norm / initial) / jnp.log(target / initial)
        done = jnp.where(jnp.isfinite(done), jnp.clip(done, 0.0, 1.0), 0.0)
        return jnp.where(is_success(state.reason), jnp.ones_like(done), done)


def _real(variables: Vector, tags: frozenset[object]) -> bool:
    return as_real_space(variables, holomorphic_tag in tags)


def _slope(system, minus_f: Vector, linear: KrylovResult, norm: Scalar) -> Scalar:
    """FᵀJd/‖F‖²; negative, as a descent direction's must be."""
    descent = linear.descent
    if descent is None:
        descent = tree.vdot(minus_f, system.mv(linear.value)).real
    slope = -jnp.abs(descent / norm / norm)
    return jnp.where(slope < 0, slope, -jnp.ones_like(slope))


def _counted(
    state: _State,
    verdict: _Verdict,
    running: Flag,
    linear: KrylovResult,
    linear_solver: AbstractKrylovSolver,
) -> _Counters:
    old, is_first = state.counters, state.trial == 0
    solved = tree.count(verdict.solve)
    extra = solved if linear.descent is None else jnp.zeros_like(solved)
    has_preconditioner = not isinstance(linear_solver.preconditioner, Identity)
    failed = verdict.solve & (linear.result != lx.RESULTS.successful)
    return _Counters(
        num_steps=old.num_steps + tree.count(verdict.accepted & ~is_first),
        num_rejected_steps=old.num_rejected_steps + tree.count(running & ~verdict.accepted & ~is_first),
        num_linearisations=old.num_linearisations + tree.count(running),
        num_matvecs=old.num_matvecs + linear.num_matvecs + extra,
        num_preconditioner_applications=(
            old.num_preconditioner_applications + linear.num_preconditioner_applications
        ),
        num_preconditioner_updates=(
            old.num_preconditioner_updates + (solved if has_preconditioner else 0)
        ),
        num_linear_failures=old.num_linear_failures + tree.count(failed),
    )


def _check_square(variables: Vector, residual: Vector) -> None:
    if variables == residual:
        return

    def describe(structure):
        return jtu.tree_map(lambda x: f"{x.dtype}{list(x.shape)}", structure)

    raise ValueError(
        "A root find needs as many equations as unknowns, in the same PyTree of the same shapes "
        f"and dtypes. y is {describe(variables)}, the residual is {describe(residual)}. Reshape or "
        "cast what `fn` returns to match y."
    )

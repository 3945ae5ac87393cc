"""Statistics of a solve as SUNDIALS prints them, in Diffrax's `sol.stats`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.extend.core import Jaxpr

from ..typing import Args, Y
from .work import Work


class WithStats(dfx.AbstractAdjoint):
    """Puts what a solve cost into `sol.stats`, summed over all attempted steps.

        dfx.diffeqsolve(..., adjoint=nks.ode.WithStats())

    A rejected step takes back the state of the solver, its counters included, so that those of
    `sol.solver_state` are of the accepted steps only. This adjoint counts every attempt and is
    otherwise the one that it holds: values and derivatives are those without it. The names are
    those of `nks.ode.Work`; Diffrax's own (`num_steps`, `num_accepted_steps`, `num_rejected_steps`,
    `max_steps`) stay. Under `vmap` every lane has its own.

    `num_fn_evals` holds also those by which the controller chooses a first step, where `dt0` is
    `None`; not those of events, and not those of derivatives. Where terms are many (IMEX), one
    evaluation is what the solver counts as one.

    **Arguments:**

    - `adjoint`: `dfx.RecursiveCheckpointAdjoint`, `dfx.DirectAdjoint`, `dfx.ForwardMode` or
      `dfx.ImplicitAdjoint`.

    **Raises:** `TypeError` for a solver whose state has no field `work`, and for an adjoint that
    solves again in reverse (`dfx.BacksolveAdjoint`, which has no place for integers).

    Storage: seven integers. Work: seven additions a step.
    """

    adjoint: dfx.AbstractAdjoint = dfx.RecursiveCheckpointAdjoint()

    def __check_init__(self):
        if isinstance(self.adjoint, (dfx.BacksolveAdjoint, WithStats)):
            raise TypeError(
                f"WithStats cannot be put around {type(self.adjoint).__name__}: use "
                "`dfx.RecursiveCheckpointAdjoint()`, `dfx.DirectAdjoint()`, `dfx.ForwardMode()` or "
                "`dfx.ImplicitAdjoint()`."
            )

    # Diffrax passes everything by name, and more in later versions.
    def loop(self, **keywords: Any) -> Any:
        solver, controller = keywords["solver"], keywords["stepsize_controller"]
        state = keywords["init_state"]
        before = _work_of(solver, state.solver_state)
        start = _work_of_first_step(keywords)
        if isinstance(controller, (dfx.ConstantStepSize, dfx.StepTo)):
            # Nothing is rejected, and Diffrax asks whether it is a `StepTo`.
            final, others = self.adjoint.loop(**keywords)
            after = _work_of(solver, final.solver_state)
            spent = Work(*(b - a for a, b in zip(before, after, strict=True)))
        else:
            adaptive = isinstance(controller, dfx.AbstractAdaptiveStepSizeController)
            tally = (_AdaptiveTally if adaptive else _Tally)(controller)  # pyright: ignore
            keywords |= {
                "solver": _Telling(solver),
                "stepsize_controller": tally,
                "event": _unwrapped_in(keywords["event"]),
                "init_state": _with_controller_state(
                    state, _TallyState(state.controller_state, Work.of())
                ),
            }
            final, others = self.adjoint.loop(**keywords)
            spent = final.controller_state.work
            final = _with_controller_state(final, final.controller_state.inner)
        return final, {**others, **start.plus(spent)._asdict()}


class _Telling(dfx.AbstractWrappedSolver, dfx.AbstractAdaptiveSolver):
    """Hands the work of each attempt to the controller, beside the error estimate."""

    solver: dfx.AbstractSolver

    @property
    def term_structure(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.term_structure

    @property
    def interpolation_cls(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self) -> Any:
        return self.solver.term_compatible_contr_kwargs

    def order(self, terms: Any) -> Any:
        return self.solver.order(terms)

    def strong_order(self, terms: Any) -> Any:
        return self.solver.strong_order(terms)

    def error_order(self, terms: Any) -> Any:
        return self.solver.error_order(terms)

    def func(self, terms: Any, t0: Any, y0: Y, args: Args) -> Any:
        return self.solver.func(terms, t0, y0, args)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Y, args: Args) -> Any:
        return self.solver.init(terms, t0, t1, y0, args)

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Y,
        args: Args,
        solver_state: Any,
        made_jump: Any,
    ) -> tuple[Any, Any, Any, Any, Any]:
        y1, error, dense, state, result = self.solver.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        # Diffrax looks for NaN in all of it, and so turns integers into floats.
        pairs = zip(solver_state.work, state.work, strict=True)
        spent = [(after - before).astype(jnp.float32) for before, after in pairs]
        return y1, (error, spent), dense, state, result


class _TallyState(NamedTuple):
    inner: Any
    work: Work


class _Tally(dfx.AbstractStepSizeController):
    """The controller, adding up the work of accepted and rejected attempts."""

    controller: dfx.AbstractStepSizeController

    def wrap(self, direction: Any) -> "_Tally":
        return _Tally(self.controller.wrap(direction))

    def init(self, *args: Any, **keywords: Any) -> tuple[Any, _TallyState]:
        t1, state = self.controller.init(*args, **keywords)
        return t1, _TallyState(state, Work.of())

    def adapt_step_size(self, *args: Any) -> tuple[Any, Any, Any, Any, _TallyState, Any]:
        return _adapted(self.controller, *args)


class _AdaptiveTally(dfx.AbstractAdaptiveStepSizeController):
    """The same, of an adaptive controller."""

    controller: dfx.AbstractAdaptiveStepSizeController

    @property
    def rtol(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.controller.rtol

    @property
    def atol(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.controller.atol

    @property
    def norm(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.controller.norm

    def wrap(self, direction: Any) -> "_AdaptiveTally":
        return _AdaptiveTally(self.controller.wrap(direction))  # pyright: ignore

    def init(self, *args: Any, **keywords: Any) -> tuple[Any, _TallyState]:
        t1, state = self.controller.init(*args, **keywords)
        return t1, _TallyState(state, Work.of())

    def adapt_step_size(self, *args: Any) -> tuple[Any, Any, Any, Any, _TallyState, Any]:
        return _adapted(self.controller, *args)


def _adapted(controller: Any, *args: Any) -> tuple[Any, Any, Any, Any, _TallyState, Any]:
    *points, error, error_order, state = args
    error, spent = error
    work = state.work.plus(Work.of(**dict(zip(Work._fields, _integers(spent), strict=True))))
    *out, inner, result = controller.adapt_step_size(*points, error, error_order, state.inner)
    keep, t0, t1, made_jump = out
    return keep, t0, t1, made_jump, _TallyState(inner, work), result


def _integers(values: list[Any]) -> list[Any]:
    return [x.astype(jnp.int32) for x in values]


def _unwrapped_in(event: dfx.Event | None) -> dfx.Event | None:
    """The event with conditions that get the user's solver and controller to see."""
    if event is None:
        return None
    conditions = jtu.tree_map(_Unwrapping, event.cond_fn, is_leaf=callable)
    return eqx.tree_at(lambda e: e.cond_fn, event, conditions, is_leaf=lambda x: x is None)


class _Unwrapping(eqx.Module):
    condition: Callable[..., Any]

    def __call__(self, t: Any, y: Y, args: Args, **keywords: Any) -> Any:
        names = {"solver": "solver", "stepsize_controller": "controller"}
        inner = {name: getattr(keywords[name], field) for name, field in names.items()}
        return self.condition(t, y, args, **{**keywords, **inner})


def _with_controller_state(state: Any, controller_state: Any) -> Any:
    is_none = lambda x: x is None
    return eqx.tree_at(lambda s: s.controller_state, state, controller_state, is_leaf=is_none)


def _work_of(solver: dfx.AbstractSolver, state: Any) -> Work:
    work = getattr(state, "work", None)
    if isinstance(solver, dfx.HalfSolver) or not isinstance(work, Work):
        raise TypeError(
            f"WithStats needs a solver that counts: the state of {type(solver).__name__} has no "
            "field `work`, or it makes steps that nobody counts. `nks.ode.ImplicitEuler`, "
            "`nks.ode.Kvaerno3/4/5` and the other solvers of `nks.ode` have it; of your own, let "
            "`init` start with `work=nks.ode.Work.of()` and `step` add to it."
        )
    return work


def _work_of_first_step(keywords: dict[str, Any]) -> Work:
    """What the controller's `init` evaluated to choose the first step, seen from its program."""
    solver, controller = keywords["solver"], keywords["stepsize_controller"]
    called = keywords["dt0"] is None or not keywords["passed_controller_state"]
    if not called:
        return Work.of()
    terms, y0, args = keywords["terms"], keywords["init_state"].y, keywords["args"]

    def choose(t0, t1, y0):
        marked = lambda *given: _marked(solver.func(*given))
        order = solver.error_order(terms)
        t1, _ = controller.init(terms, t0, t1, y0, keywords["dt0"], args, marked, order)
        return t1

    jaxpr = jax.make_jaxpr(choose)(keywords["t0"], keywords["t1"], y0).jaxpr
    return Work.of(num_fn_evals=_executions(jaxpr))


_MARK = "nksolve_rhs"


def _marked(value: Any) -> Any:
    def identity(x):
        return x

    identity.__name__ = _MARK
    return jax.jit(identity)(value)


def _executions(jaxpr: Jaxpr) -> int:
    """How often the marked evaluations run."""
    count = 0
    for eqn in jaxpr.eqns:
        if eqn.params.get("name") == _MARK:
            count += 1
            continue
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in jtu.tree_leaves(list(eqn.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                count += times * _executions(getattr(inner, "jaxpr", inner))
    return count


def _is_program(x: Any) -> bool:
    return hasattr(x, "eqns")


_LINES = (
    ("Steps", "num_accepted_steps"),
    ("Rejected steps", "num_rejected_steps"),
    ("Right-hand side evaluations", "num_fn_evals"),
    ("Linearisations", "num_linearisations"),
    ("Newton iterations", "num_newton_steps"),
    ("Krylov matvecs", "num_matvecs"),
    ("Preconditioner set-ups", "num_preconditioner_updates"),
    ("Preconditioner solves", "num_preconditioner_applications"),
    ("Convergence failures", "num_convergence_failures"),
)


def format_stats(solution: dfx.Solution) -> str:
    """The statistics of a solve as a table, a line each; of a batch the sums over its lanes.

    **Arguments:**

    - `solution`: what `diffeqsolve` returned, with `adjoint=nks.ode.WithStats()`.

    **Raises:** `ValueError` without those statistics, or under `jit`.
    """
    stats = solution.stats
    if not set(Work._fields) <= set(stats):
        raise ValueError(
            "This solve kept no such statistics: pass `adjoint=nks.ode.WithStats()` to "
            "`diffeqsolve`."
        )
    if any(isinstance(stats[name], jax.core.Tracer) for _, name in _LINES):
        raise ValueError("`format_stats` reads numbers: call it outside `jit`, on the result.")
    rows = [(label, int(np.sum(stats[name]))) for label, name in _LINES]
    width = max(len(label) for label, _ in rows)
    digits = max(len(str(number)) for _, number in rows)
    return "\n".join(f"{label:<{width}} = {number:>{digits}}" for label, number in rows)

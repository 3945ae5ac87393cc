"""Newton–Krylov with another solver inside: right and left nonlinear preconditioning."""

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from equinox import AbstractVar
from jaxtyping import Array

from .. import tree
from ..linearise.linearisation import AbstractLinearisable, Linearisation, linearise
from ..linearise.policies import AbstractPolicy
from ..newton.base import AbstractWrapper
from ..newton.convergence import Standing, is_finite
from ..newton.newton_krylov import NewtonKrylov
from ..newton.state import Best, Counters, NewtonState
from ..precondition.base import join, split
from ..results import REASONS, is_success
from ..typing import Args, Aux, Count, Flag, Fn, Scalar, Vector, Y
from .nonlinear_preconditioner import (
    InnerWork,
    NonlinearPreconditioner,
    check_around,
    displacement,
)


class Tried(NamedTuple):
    """A trial point after the preconditioner has been there.

    **Attributes:**

    - `point`: where F was evaluated, `value` and `aux`: what it is there.
    - `moved`: whether that is not the point that Newton's method asked for.
    - `linearisation`: what Newton's method is given.
    - `start_norm`: the test norm of F at the point asked for.
    - `work`: of the inner solver.
    - `in_matvec`: evaluations of F beyond the first in a matvec that computes everything again.
    """

    point: Vector
    value: Vector
    aux: Aux
    moved: Flag
    linearisation: Linearisation
    start_norm: Scalar
    work: InnerWork
    in_matvec: Count | int


class PreconditionedState(NamedTuple):
    """The state of Newton's method, the best point by ‖F‖₂, the work of the inner solver, and
    evaluations inside matvecs that Newton's method has not counted."""

    newton: NewtonState
    best: Best
    work: InnerWork
    further: Count


class AbstractNonlinearlyPreconditioned(AbstractWrapper):
    """Newton–Krylov with another solver inside.

    Success is ‖F‖ ≤ atol + rtol ‖F(y₀)‖ of the residual itself at the returned point, with N(y₀)
    for y₀ where F is not finite at y₀; on failure the point of least ‖F‖₂ among those evaluated
    (but for those inside of N) is returned, with the reason.
    """

    solver: AbstractVar[NewtonKrylov]
    preconditioner: AbstractVar[NonlinearPreconditioner]
    #: Linearisations of F at a trial beyond the one that Newton's method counts.
    num_beyond: ClassVar[int] = 0

    def __check_init__(self):
        check_around(type(self).__name__, self.solver, self.preconditioner)

    @abc.abstractmethod
    def tried(self, fn: Fn, y: Y, args: Args, tags: frozenset[object]) -> Tried:
        """What becomes of the trial point y."""

    @abc.abstractmethod
    def residual(self, fn: Fn, args: Args, tags: frozenset[object]) -> Fn:
        """What Newton's method finds a root of."""

    @abc.abstractmethod
    def promised(self, tags: frozenset[object]) -> frozenset[object]:
        """The tags of that residual's Jacobian."""

    def init(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        f_struct: Any,
        aux_struct: Any,
        tags: frozenset[object],
    ) -> PreconditionedState:
        residual, promised = self.residual(fn, args, tags), self.promised(tags)
        newton = self.solver.init(residual, y, args, options, f_struct, None, promised)
        none = jnp.zeros((), jnp.int32)
        return PreconditionedState(
            newton,
            newton.best._replace(aux=tree.zeros_like(aux_struct)),
            InnerWork(none, Counters(*(none for _ in Counters._fields))),
            none,
        )

    def step(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: PreconditionedState,
        tags: frozenset[object],
    ) -> tuple[Y, PreconditionedState, Aux]:
        """One trial of Newton's method, which is shown what `tried` has found there."""
        old = state.newton
        running, is_first = old.reason == REASONS.iterating, old.trial == 0
        variables, static = eqx.partition(y, eqx.is_inexact_array)
        step = displacement(self.solver, old)
        tried = self.tried(fn, eqx.combine(tree.add(variables, step), static), args, tags)
        norm, test_norm = tree.norm2(tried.value), self.norm(tried.value)

        # Newton's method adds its step to y: where the point was moved, to a y that was moved too.
        base = tree.where(running & tried.moved, tree.sub(tried.point, step), variables)
        solver = eqx.tree_at(lambda s: s.norm, self.solver, _Given(test_norm))
        _, new, _ = solver.step(
            _Known(_without_aux(tried.linearisation)),
            eqx.combine(base, static),
            args,
            options,
            old,
            self.promised(tags),
        )
        accepted = running & (is_first | (new.counters.num_steps > old.counters.num_steps))
        variables = tree.where(accepted, tried.point, variables)

        # The residual test is relative to F(y₀), wherever y₀ was moved to, if that is finite.
        start_norm = jnp.where(jnp.isfinite(tried.start_norm), tried.start_norm, test_norm)
        initial_norm = jnp.where(is_first, start_norm, new.initial_norm)
        atol = jnp.asarray(self.atol).astype(norm.dtype)
        target = self.solver.target(initial_norm)
        none = jnp.zeros((), jnp.int32)
        _, reason = self.solver.convergence(Standing(test_norm, initial_norm, atol, target, none))
        finite = running & is_finite(tried.point, norm, test_norm)
        reason = REASONS.where(finite & is_first & is_success(reason), reason, new.reason)
        improved = finite & ((norm < state.best.norm) | is_success(reason))
        found = Best(tried.point, norm, test_norm, tried.aux)
        state = PreconditionedState(
            new._replace(initial_norm=initial_norm, reason=reason),
            tree.where(improved, found, state.best),
            _added(state.work, tried.work, running),
            state.further + tried.in_matvec * (self._recomputed(new) - self._recomputed(old)),
        )
        return eqx.combine(variables, static), state, state.best.aux

    def terminate(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: PreconditionedState,
        tags: frozenset[object],
    ) -> tuple[Flag, optx.RESULTS]:
        return self.solver.terminate(fn, y, args, options, state.newton, tags)

    def postprocess(
        self,
        fn: Fn,
        y: Y,
        aux: Aux,
        args: Args,
        options: dict[str, Any],
        state: PreconditionedState,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        residual, promised = self.residual(fn, args, tags), self.promised(tags)
        _, _, stats = self.solver.postprocess(
            residual, y, None, args, options, state.newton, promised, result
        )
        inner, evals = state.work, state.further
        linearisations = self.num_beyond * stats["num_linearisations"]
        if self.preconditioner.fn is None:
            for name in Counters._fields[2:]:  # all but those of steps
                stats[name] = stats[name] + getattr(inner.counters, name)
            evals = evals + inner.num_fn_evals
        stats |= {
            "num_fn_evals": stats["num_fn_evals"] + evals + linearisations,
            "num_linearisations": stats["num_linearisations"] + linearisations,
            "num_inner_steps": inner.counters.num_steps,
            "num_inner_fn_evals": inner.num_fn_evals,
            "residual_norm": state.best.test_norm,
        }
        static = eqx.filter(y, eqx.is_inexact_array, inverse=True)
        return eqx.combine(state.best.point, static), state.best.aux, stats

    def _recomputed(self, newton: NewtonState) -> Count:
        """Evaluations inside matvecs so far, as Newton's method counts them."""
        made = newton.counters
        products = made.num_matvecs + made.num_transposed_matvecs + made.num_probes
        return self.policy.evals_per_matvec * products


class RightPreconditioned(AbstractNonlinearlyPreconditioned):
    """Newton's method on F(N(x)), at N(x): each trial point x becomes N(x) before it is judged.

    y_{k+1} = N(y_k + λ d_k) with J(y_k) d_k ≈ −F(y_k): nonlinear elimination, where N solves a part
    of the equations. N(x) is taken where F is finite there, and neither its 2-norm nor its test
    norm exceeds that at x; else x itself, so that a poor N costs evaluations and no more. y₀ is
    moved to N(y₀) before the first direction is found.

    **Arguments:**

    - `solver`: an `nks.NewtonKrylov`; a line search along d looks at ‖F(N(y + λ d))‖.
    - `preconditioner`: an `nks.NonlinearPreconditioner`, which says what N is.

    `stats` has, beyond those of the solver, `num_inner_steps` and `num_inner_fn_evals`, the
    evaluations inside N; unless N has a residual of its own, these and its other work stand in the
    other counters too. `history` holds ‖F‖ after N.

    Storage: two linearisations, that of the inner solver, 3 vectors. Work of a trial beyond the
    solver's: one evaluation (at x) and those of N, also of a trial that is rejected.

    Source: Brune, Knepley, Smith & Tu, SIAM Rev. 57(4), 2015, §4.2; Cai & Li, SIAM J. Sci. Comput.
    33(2), 2011; Liu, Hwang, Luo, Cai & Keyes, J. Comput. Phys. 457, 2022.
    """

    solver: NewtonKrylov
    preconditioner: NonlinearPreconditioner

    num_beyond = 1

    def __init__(self, solver: NewtonKrylov, preconditioner: NonlinearPreconditioner):
        self.solver, self.preconditioner = solver, preconditioner

    def tried(self, fn: Fn, y: Y, args: Args, tags: frozenset[object]) -> Tried:
        """N(y), if it is no worse."""
        variables, static = eqx.partition(y, eqx.is_inexact_array)
        here = _linearised(fn, y, args, self.policy, tags)
        point, work = self.preconditioner.apply(fn, y, args, tags, self.policy)
        there = _linearised(fn, eqx.combine(point, static), args, self.policy, tags)
        start_norm = self.norm(here.value)
        norms = tree.norm2(there.value), self.norm(there.value)
        # Where F is NaN at y, anything finite is better.
        grown = (norms[0] > tree.norm2(here.value)) | (norms[1] > start_norm)
        moved = is_finite(point, *norms) & ~grown
        lin = _selected(moved, there, here)
        point = tree.where(moved, point, variables)
        return Tried(point, lin.value, lin.aux, moved, lin, start_norm, work, 0)

    def residual(self, fn: Fn, args: Args, tags: frozenset[object]) -> Fn:
        """F."""
        return fn

    def promised(self, tags: frozenset[object]) -> frozenset[object]:
        """Those of F."""
        return tags


class LeftPreconditioned(AbstractNonlinearlyPreconditioned):
    """Newton's method on N(x) − x, which has the roots of F where N leaves only those alone.

    Its Jacobian is that of the steps of the inner solver, linearised together at each trial point:
    for the sum of local solves (ASPIN) or a multigrid cycle near −I. Tolerances, success and
    `residual_norm` are those of F all the same, measured at each trial point; the line search and
    the forcing terms look at ‖N(x) − x‖₂.

    **Arguments:**

    - `solver`: an `nks.NewtonKrylov`. Its linear solver and that one's preconditioner are for
      ∂N/∂x − I; give `adjoint=nks.KrylovAdjoint(linear_solver=...)` where derivatives need another.
    - `preconditioner`: an `nks.NonlinearPreconditioner`. JAX has to be able to linearise its steps
      once: with an inner solver that loops until it has converged (a Krylov method in
      `nks.NewtonKrylov`) use `policy=nks.Recompute()`, and tight inner solves: N must be smooth.

    Where N(x) = x and F(x) is not small enough the solve fails with `linear_solve_failed`. `stats`
    as for `nks.RightPreconditioned`; with `nks.NewtonKrylov` inside, `num_fn_evals` misses up to
    one evaluation a trial. `history` holds ‖F‖.

    Storage: one linearisation of all inner steps (so many times that of F), 2 vectors. Work of a
    trial: one evaluation and those of N; of a matvec, the tangents of N.

    Source: Brune, Knepley, Smith & Tu, SIAM Rev. 57(4), 2015, §4.1; Cai & Keyes, SIAM J. Sci.
    Comput. 24(1), 2002.
    """

    solver: NewtonKrylov
    preconditioner: NonlinearPreconditioner

    def __init__(self, solver: NewtonKrylov, preconditioner: NonlinearPreconditioner):
        self.solver, self.preconditioner = solver, preconditioner

    def __check_init__(self):
        method = self.solver.linear_solver
        if method.needs_symmetry:
            raise ValueError(
                "`LeftPreconditioned` solves with ∂N/∂x − I, which is not symmetric where J is, as "
                f"`{type(method).__name__}` needs it to be: take `nks.GMRES()`."
            )

    def tried(self, fn: Fn, y: Y, args: Args, tags: frozenset[object]) -> Tried:
        """F(y), and the linearisation of N(x) − x there."""
        lin = _linearised(self.residual(fn, args, tags), y, args, self.policy, frozenset())
        value, aux, work = lin.aux
        point = eqx.filter(y, eqx.is_inexact_array)
        moved = jnp.zeros((), bool)
        again = (work.num_fn_evals if self.preconditioner.fn is None else 0) - 1
        return Tried(point, value, aux, moved, lin, self.norm(value), work, again)

    def residual(self, fn: Fn, args: Args, tags: frozenset[object]) -> Fn:
        """x → N(x) − x, with F(x) beside it."""

        def residual(y, _):
            lin = _linearised(fn, y, args, self.policy, tags)
            point, work = self.preconditioner.apply(fn, y, args, tags, self.policy)
            step = tree.sub(point, eqx.filter(y, eqx.is_inexact_array))
            return step, (lin.value, lin.aux, work)

        return residual

    def promised(self, tags: frozenset[object]) -> frozenset[object]:
        """None: N need be neither symmetric nor holomorphic."""
        del tags
        return frozenset()


class _Known(AbstractLinearisable):
    """A residual that has been linearised at the only point where it will be asked for."""

    linearisation: Linearisation

    def linearise(self, y: Y, tags: frozenset[object]) -> Linearisation:
        return self.linearisation


def _without_aux(lin: Linearisation) -> Linearisation:
    return eqx.tree_at(lambda x: x.aux, lin, None, is_leaf=lambda x: x is None)


class _Given(eqx.Module):
    """A norm that is known already."""

    value: Array

    def __call__(self, vector: Vector) -> Array:
        return self.value


def _linearised(
    fn: Fn, y: Y, args: Args, policy: AbstractPolicy, tags: frozenset[object]
) -> Linearisation:
    target = fn if isinstance(fn, AbstractLinearisable) else lambda y, _: fn(y, args)
    return linearise(target, y, has_aux=True, policy=policy, tags=tags)


def _selected(flag: Flag, a: Linearisation, b: Linearisation) -> Linearisation:
    """a where the flag holds, else b: two linearisations of one residual."""
    arrays, skeleton = split(a)
    others, _ = split(b)
    chosen = [x if x is y else jnp.where(flag, x, y) for x, y in zip(arrays, others, strict=True)]
    return join(chosen, skeleton)


def _added(total: InnerWork, new: InnerWork, running: Flag) -> InnerWork:
    once = tree.count(running)
    return jtu.tree_map(lambda t, n: t + once * n, total, new)

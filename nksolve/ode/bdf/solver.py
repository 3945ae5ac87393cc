"""BDF: one nonlinear solve per step, of order 1 to 5."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx

from ... import tree
from ...adjoint.base import stop_gradient
from ...krylov.auto import AutoLinear
from ...krylov.base import AbstractKrylovSolver
from ...linearise.views import divided, times, weighted
from ...loops import any_lane
from ...typing import Args, Count, Flag, Scalar, ScalarLike, Vector
from ..attach import Increment
from ..linear import Stage
from ..mass import Mass, as_mass, check_mass
from ..newton import SimplifiedNewton, StageSolution, check_tolerances, solve_stage
from ..stepper import AbstractStiffSolver, check_state, derivative_tolerance, linearised, result_of
from ..work import Work
from .coefficients import MAX_ORDER, NEWTON
from .controller import allowed
from .differences import Prediction, advance, polynomial, predict
from .interpolation import BDFInterpolation
from .linear import Keeper
from .order import choose
from .rows import row_weights
from .stage import Explicit, attach, matrix
from .verdict import ERROR_ORDER, encoded

# Of Newton's tolerance, for a Krylov method. A step has the Jacobian of its own predicted point, so
# that one iteration is the rule and what a linear solve leaves is nearly all that is left. With
# 0.05 instead steps are as many, errors alike and Krylov iterations 5% to 20% more.
LINEAR_SHARE = 0.25


class BDFState(NamedTuple):
    """What a step hands to the next."""

    h: Scalar  # the step size of the differences; zero before the first step
    order: Count
    num_equal: Count  # steps since the order or the step size changed
    differences: Vector  # ∇¹y … ∇⁵y in rows
    rate: Scalar  # of Newton's iteration
    kept: Any  # arrays of the factors or of the preconditioner
    work: Work  # of the accepted steps


class _Try(NamedTuple):
    """Newton's iteration, with old factors and then, where that fails, with new ones."""

    w: Vector
    converged: Flag
    count: Count
    rate: Scalar
    kept: Any
    is_fresh: Flag
    num_tries: Count
    num_linear: Count  # Krylov iterations a solve
    work: Work
    workspace: Any


class BDF(AbstractStiffSolver):
    """Numerical differentiation formulas of order 1 to 5 with variable step and order:

        M (Σ_{m≤k} ∇ᵐy_n/m − κ_k γ_k (y_n − y_n⁽⁰⁾)) = h f(t_n, y_n),    M y' = f(t, y).

    One nonlinear system a step, whose correction d = y_n − y_n⁽⁰⁾ is also the error estimate. The
    history is kept as backward differences at equal spacing, and interpolated to another spacing
    where the step size changes. After k + 1 equal steps the order is chosen anew. A declared jump
    (`made_jump`) starts again at order 1.

    A factorisation or a preconditioner of M − (h/α)J is kept for at most 50 steps, the former until
    h/α changes, the latter until it has changed by half, and both until Newton's iteration fails
    with them; then they are made anew at the predicted point and the iteration is done again within
    the step. With a direct solver J is linearised there and nowhere else, and lives on in the
    factors only. With a Krylov method f is linearised once a step, at the predicted point: that is
    the evaluation for the first iteration, which is the only one as a rule; only the preconditioner
    is old.

    The derivatives are those of the formula at its converged solution, and of the differences,
    which are linear in it. The choices of order and step size are not differentiated.

    **Arguments:**

    - `linear_solver`: for M − (h/α)J.
    - `root_finder`: its tolerances are the step size controller's and must stay so unless steps are
      constant (`nks.ode.SimplifiedNewton.alone()`), since the solver tells the controller by an
      error in the controller's own scale which step it wants. Its `kappa`: 0.01, for the correction
      is the error estimate. 0.1, which is CVODE's, saves a tenth to a fifth of the Krylov
      iterations; with a direct solver, whose J is old, it costs steps on chemical kinetics.
    - `adjoint_rtol`: relative tolerance of Krylov solves for derivatives.
    - `max_order`: 5; formulas above order 2 are not A-stable (an oscillating mode near the
      imaginary axis may hold the steps down, which 2 mends).
    - `mass`: the constant M, as a Lineax operator or its diagonal as a tree like y, which may be
      singular (differential-algebraic equations of index 1). The start has to satisfy the algebraic
      equations (`nks.ode.consistent`). Zeros on a diagonal tell algebraic rows apart, whose
      residuals a Krylov method then measures without the factor h/α; of an operator nothing is
      known, so that the first step begins from y' = 0 and is short.

    For `nks.ode.BDFController`, or `diffrax.PIDController` with its default coefficients.

    Storage: 5 vectors and the arrays of the factorisation or preconditioner, carried from step to
    step. Work: an attempted step takes 1.2 to 2 Newton iterations with a direct solver, 1.2 with a
    Krylov method, each an evaluation of f.

    Source: Shampine & Reichelt, The MATLAB ODE suite, SIAM J. Sci. Comput. 18 (1997) 1-22;
    Hindmarsh et al., SUNDIALS, ACM Trans. Math. Softw. 31 (2005), section 2.1 (what is kept, and
    how long).
    """

    linear_solver: AbstractKrylovSolver = AutoLinear()
    root_finder: SimplifiedNewton = SimplifiedNewton(max_steps=4)
    adjoint_rtol: ScalarLike | None = eqx.field(static=True, default=None)
    max_order: int = eqx.field(static=True, default=MAX_ORDER)
    mass: Mass = eqx.field(default=None, converter=as_mass, kw_only=True)

    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = BDFInterpolation

    def __check_init__(self):
        if not 1 <= self.max_order <= MAX_ORDER:
            raise ValueError(
                f"`max_order` must be from 1 to {MAX_ORDER}, but it is {self.max_order}."
            )

    def order(self, terms: Any) -> int:
        """The highest; the solver chooses its order itself."""
        del terms
        return self.max_order

    def error_order(self, terms: Any) -> float:
        """That of the number which the step size controller is given."""
        del terms
        return ERROR_ORDER

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Args) -> BDFState:
        check_state(y0)
        check_mass(self.mass, y0)
        check_tolerances(self.root_finder, self)
        dtype = tree.real_dtype(y0)
        increment = Increment.of(terms, args, t0, t1, y0)
        one = jnp.ones((), dtype)
        keeper = self._keeper(increment, t0, t1, y0, one, args)
        zero = jnp.zeros((), jnp.int32)
        return BDFState(
            h=jnp.zeros((), _time_dtype(t0, t1)),
            order=zero + 1,
            num_equal=zero,
            differences=_rows_like(y0),
            rate=one,
            kept=keeper.nothing(),
            work=Work.of(),
        )

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        args: Args,
        solver_state: BDFState,
        made_jump: Any,
    ) -> tuple[Any, Any, dict, BDFState, dfx.RESULTS]:
        check_tolerances(self.root_finder, self)
        before = solver_state
        dtype = tree.real_dtype(y0)
        increment = Increment.of(terms, args, t0, t1, y0)
        norm_of = lambda v, scale: self.root_finder.norm(divided(v, scale)).astype(dtype)

        # What the history says of the step.
        restart = made_jump | ~(before.h > 0)
        order = jnp.where(restart, 1, before.order)
        h = jnp.asarray(t1 - t0, before.h.dtype)
        ratio = h / jnp.where(restart, h, before.h)
        ratio = jnp.where(restart, jnp.ones_like(ratio), ratio)
        is_equal = ~restart & (jnp.abs(ratio - 1) <= _unequal(t0, t1, h))
        first_slope = lambda: _slope(self.mass, increment(t0, y0))
        slope = lax.cond(any_lane(restart), first_slope, lambda: tree.zeros_like(y0))
        started = jtu.tree_map(lambda rows, k: rows.at[0].set(k), _rows_like(y0), slope)
        history = tree.where(restart, started, before.differences)
        history = jtu.tree_map(lambda y, rows: jnp.concatenate([y[None], rows]), y0, history)
        predicted = predict(history, order, ratio.astype(dtype))
        gamma = (1 / jnp.asarray(NEWTON, dtype))[order]

        # The formula, solved for w = y_n − base.
        base = tree.sub(predicted.y, predicted.psi)
        tried, keeper = self._solved(
            increment, (t0, t1), base, predicted, gamma, args, before, restart
        )
        ok = tried.converged
        # A step that failed is replaced by what is finite: it is rejected, and reverse mode
        # multiplies its derivatives by zero.
        held = stop_gradient((base, y0))
        z = tree.where(ok, tree.add(held[0], tried.w), held[1])
        w = tree.where(ok, tried.w, tree.zeros_like(y0))
        y1, w = attach(
            Explicit(base, jnp.asarray(t1), increment, self.mass),
            found=stop_gradient((z, w)),
            gamma=gamma,
            linear=keeper.linear(tried.kept),
            rows=keeper.rows,
        )
        d = tree.sub(w, predicted.psi)
        differences = advance(predicted.differences, d, order, y1)

        # The verdict on the step.
        scale = self.root_finder.scale(stop_gradient(y1))
        # SciPy's safety factor. Its test costs it one iteration more than ours, and never ends
        # before the second; to count likewise gives its step sizes.
        most = jnp.asarray(2 * self.root_finder.max_steps, dtype)
        count = 1 + jnp.maximum(tried.count, 2).astype(dtype)
        choice = choose(
            lambda v: norm_of(v, scale),
            *stop_gradient((predicted.differences, differences, d)),
            order=order,
            num_equal=jnp.where(is_equal, before.num_equal, 0),
            safety=0.9 * (most + 1) / (most + count),
            max_order=self.max_order,
        )
        error = jnp.where(ok, encoded(choice.accepted, choice.factor), jnp.inf)
        size = allowed(self.root_finder.scale, *stop_gradient((y0, y1)))
        unit = self.root_finder.norm(jtu.tree_map(jnp.ones_like, size)).astype(dtype)
        error = error / jnp.where(unit > 0, unit, jnp.ones_like(unit))
        y_error = jtu.tree_map(lambda s, y: error.astype(y.dtype) * s.astype(y.dtype), size, y0)

        work = tried.work.plus(
            Work.of(
                num_fn_evals=tree.count(restart),
                num_convergence_failures=tree.count(~ok),
            )
        )
        state = BDFState(
            h=h,
            order=choice.order,
            num_equal=choice.num_equal,
            differences=jtu.tree_map(lambda x: x[1:], differences),
            rate=tried.rate,
            kept=keeper.after(tried.kept, tried.num_linear),
            work=before.work.plus(work),
        )
        dense = dict(differences=polynomial(differences, order))
        return y1, y_error, dense, state, result_of(ok)

    def _keeper(
        self, increment: Increment, t0: Any, t1: Any, y: Vector, gamma: Scalar, args: Args
    ) -> Keeper:
        """The linear solver of a step that is predicted to end in y."""
        increment, t, y, args = stop_gradient((increment, jnp.asarray(t1), y, args))
        h = lax.stop_gradient(jnp.asarray(t1 - t0))
        stage = Stage(t, gamma.astype(h.dtype) * h, args)
        mass = stop_gradient(self.mass)
        return Keeper(
            self.linear_solver,
            lambda: linearised(increment, t, y),
            lambda operator: matrix(mass, operator, gamma),
            y,
            stage,
            scale=self.root_finder.scale(y),
            rows=row_weights(mass, y, jnp.asarray(stage.gamma)),
            adjoint_rtol=derivative_tolerance(self.root_finder, self.adjoint_rtol, y),
        )

    def _solved(
        self,
        increment: Increment,
        ends: tuple[Any, Any],
        base: Vector,
        predicted: Prediction,
        gamma: Scalar,
        args: Args,
        before: BDFState,
        restart: Flag,
    ) -> tuple[_Try, Keeper]:
        """M w = γ F(t1, base + w)."""
        t0, t1 = ends
        keeper = self._keeper(increment, t0, t1, predicted.y, gamma, args)
        values = increment, jnp.asarray(t1), base, predicted, gamma, before
        increment, t1, base, predicted, gamma, before = stop_gradient(values)
        scale = self.root_finder.scale(predicted.y)
        mass = stop_gradient(self.mass)

        def residual(w: Vector, f: Vector) -> Vector:
            r = tree.sub(weighted(mass, w), tree.scale(gamma, f))
            return r if keeper.rows is None else times(r, keeper.rows)

        def running(at: _Try) -> Flag:
            return ~at.converged & ((at.num_tries == 0) | ((at.num_tries == 1) & ~at.is_fresh))

        def body(at: _Try) -> _Try:
            active = running(at)
            wanted = restart | (at.num_tries > 0) | keeper.is_due(at.kept)
            due = active & wanted & keeper.keeps
            kept = keeper.renewed(at.kept, due, restart)
            # New factors are better than the old ones: what those were seen to do they will do too.
            unknown = restart | (at.num_tries > 0)
            rate = jnp.where(unknown, jnp.ones_like(at.rate), at.rate)
            found = solve_stage(
                self.root_finder,
                lambda z: increment(t1, z),
                keeper.linear(kept),
                base,
                predicted.psi,
                gamma,
                scale,
                rate=rate,
                wanted=active,
                workspace=at.workspace,
                value=keeper.value,
                residual=residual,
                linear_share=LINEAR_SHARE,
            )
            renewals = tree.count(due)
            linearisations = renewals if keeper.is_direct else jnp.zeros_like(renewals)
            work = at.work.plus(found.work).plus(
                Work.of(
                    num_fn_evals=linearisations,
                    num_linearisations=linearisations,
                    num_preconditioner_updates=renewals,
                )
            )
            new = _Try(
                w=found.w,
                converged=found.converged,
                count=found.count,
                rate=_aged(rate, found),
                kept=kept,
                is_fresh=due | ~jnp.array(keeper.keeps),
                num_tries=at.num_tries + 1,
                num_linear=-(-found.work.num_matvecs // jnp.maximum(found.count, 1)),
                work=work,
                workspace=None,
            )
            new = tree.where(active, new, at._replace(workspace=None))
            return new._replace(workspace=found.workspace)

        zero = jnp.zeros((), jnp.int32)
        each = int(not keeper.is_direct)
        start = _Try(
            w=tree.zeros_like(base),
            converged=jnp.array(False),
            count=zero,
            rate=before.rate,
            kept=before.kept,
            is_fresh=jnp.array(False),
            num_tries=zero,
            num_linear=zero,
            work=Work.of(num_fn_evals=each, num_linearisations=each),
            workspace=keeper.linear(before.kept).workspace(),
        )
        return lax.while_loop(lambda at: any_lane(running(at)), body, start), keeper


def _aged(rate: Scalar, found: StageSolution) -> Scalar:
    """The rate of convergence to begin the next step with: as it was measured, or a tenth more
    where one iteration sufficed and nothing was, so that it is measured now and then."""
    unmeasured = jnp.minimum(1.1 * rate, jnp.ones_like(rate))
    return jnp.where(found.count > 1, jnp.maximum(found.rate, 0.3 * rate), unmeasured)


def _slope(mass: Mass, value: Vector) -> Vector:
    """h y' where M y' = f tells it, and zero where not: in algebraic rows, and in all of an M that
    is an operator."""
    if mass is None:
        return value
    if isinstance(mass, lx.AbstractLinearOperator):
        return tree.zeros_like(value)

    def one(m, f):
        m = m.astype(f.dtype)
        return jnp.where(m == 0, jnp.zeros_like(f), f / jnp.where(m == 0, jnp.ones_like(m), m))

    return jtu.tree_map(one, mass, value)


def _rows_like(y: Vector) -> Vector:
    """Zeros for ∇¹y … ∇⁵y."""
    return jtu.tree_map(lambda x: jnp.zeros((MAX_ORDER, *jnp.shape(x)), x.dtype), y)


def _time_dtype(t0: Any, t1: Any) -> Any:
    dtype = jnp.result_type(t0, t1)
    return dtype if jnp.issubdtype(dtype, jnp.floating) else tree.float_dtype()


def _unequal(t0: Any, t1: Any, h: Scalar) -> Scalar:
    """By what the ratio of two step sizes that were meant to be equal may differ from 1."""
    largest = jnp.maximum(jnp.abs(t0), jnp.abs(t1)).astype(h.dtype)
    rounding = 8 * float(jnp.finfo(h.dtype).eps) * largest / jnp.where(h > 0, h, 1)
    return jnp.clip(rounding, 1e-9, 1e-2).astype(h.dtype)

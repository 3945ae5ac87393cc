"""Rosenbrock methods: one linearisation and one matrix serve all stages, each one linear solve."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from equinox import AbstractClassVar

from ... import tree
from ...adjoint.base import stop_gradient
from ...krylov.auto import AutoLinear
from ...krylov.base import AbstractKrylovSolver
from ...linearise.linearisation import Linearisation, linearise
from ...linearise.views import shifted, weighted
from ...typing import Args, Flag, Scalar, ScalarLike, Vector
from ..attach import Increment
from ..esdirk import combined, put
from ..linear import Stage, nothing_carried, prepare
from ..mass import Mass, as_mass, check_mass, mass_shifted
from ..newton import SimplifiedNewton, check_tolerances
from ..stepper import AbstractStiffSolver, check_state, derivative_tolerance, result_of
from ..work import Work
from .interpolation import RosenbrockInterpolation
from .linear import tight_linear, weighted_norm
from .stage import Explicit, attach
from .tableau import RosenbrockTableau


class RosenbrockState(NamedTuple):
    """What a step hands to the next."""

    is_first: Flag
    preconditioner: Any  # its arrays, where it is kept
    work: Work  # of the accepted steps


class _Stages(NamedTuple):
    """What a stage hands to the next."""

    us: Vector  # (s, …): u_i so far
    ok: Flag
    work: Work
    workspace: Any


class AbstractRosenbrock(AbstractStiffSolver):
    """(M − hγ f_y) u_i = hγ f(t_i, y0 + Σ a_ij u_j) + γ M Σ c_ij u_j + hγ γ_i h f_t, for j < i,
    y1 = y0 + Σ m_i u_i, of M y' = f(t, y).

    f_y and f_t are taken at (t0, y0) from one linearisation. There is no Newton iteration: an error
    of a linear solve is one of the step, multiplied by the c_ij, which reach 112 in Rodas5P. A
    Krylov method therefore solves to κ/100 of the error weights, in the root-mean-square norm, and
    a factorisation is refined where its residual is above that. κ, `rtol` and `atol` are those of
    `root_finder`, which has no other use here: it is where Diffrax puts its controller's
    tolerances.

    Derivatives are those of the discrete equations, with W = M − hγ f_y transposed by the step's
    own factors or preconditioner; the change of W itself is a second directional derivative of f at
    (t0, y0).
    """

    tableau: AbstractClassVar[RosenbrockTableau]

    linear_solver: AbstractKrylovSolver = AutoLinear()
    root_finder: SimplifiedNewton = SimplifiedNewton()
    mass: Mass = eqx.field(default=None, converter=as_mass)
    adjoint_rtol: ScalarLike | None = eqx.field(static=True, default=None)

    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = RosenbrockInterpolation

    def order(self, terms: Any) -> int:
        del terms
        return self.tableau.order

    def error_order(self, terms: Any) -> float:
        """One more than the lower of the orders of the step and of what it is compared with."""
        del terms
        return 1.0 + min(self.tableau.order, self.tableau.embedded_order)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Args) -> RosenbrockState:
        check_state(y0)
        check_mass(self.mass, y0)
        increment = Increment.of(terms, args, t0, t1, y0)
        gamma = jnp.asarray(self.tableau.gamma, tree.real_dtype(y0))
        operator = lambda: self._matrix(_linearised(increment, t0, y0), gamma)
        stage = Stage(t0, self.tableau.gamma * (t1 - t0), args)
        carried = nothing_carried(self.linear_solver, operator, y0, stage)
        return RosenbrockState(jnp.array(True), carried, Work.of())

    def _matrix(self, lin: Linearisation, gamma: Scalar) -> Any:
        """W = M − γ A."""
        if self.mass is None:
            return shifted(lin.operator, gamma)
        return mass_shifted(stop_gradient(self.mass), lin.operator, gamma)

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        args: Args,
        solver_state: RosenbrockState,
        made_jump: Any,
    ) -> tuple[Any, Any, dict, RosenbrockState, dfx.RESULTS]:
        check_tolerances(self.root_finder, self)
        tableau = self.tableau
        dtype = tree.real_dtype(y0)
        t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
        h = t1 - t0
        gamma = jnp.asarray(tableau.gamma, dtype)
        increment = Increment.of(terms, args, t0, t1, y0)
        frozen, held, t_held, h_held = stop_gradient((increment, y0, t0, h))
        mass = stop_gradient(self.mass)

        lin = _linearised(increment, t0, y0)
        slope = lin.args_tangent(h_held)  # h ∂F/∂t
        scale = self.root_finder.scale(held)
        prepared = prepare(
            self.linear_solver,
            self._matrix(lin, gamma),
            held,
            Stage(t0, tableau.gamma * h, args),
            scale=scale,
            carried=solver_state.preconditioner,
            is_first=solver_state.is_first | made_jump,
            adjoint_rtol=derivative_tolerance(self.root_finder, self.adjoint_rtol, y0),
        )
        linear = tight_linear(prepared.linear, scale)
        # Below the rounding of y there is nothing to gain.
        floor = 4 * tree.eps(y0) * weighted_norm(held, scale)
        tolerance = jnp.maximum(1e-2 * jnp.asarray(self.root_finder.kappa).astype(dtype), floor)

        def one_stage(at: _Stages, row: Any) -> tuple[_Stages, None]:
            i, a, c, alpha_i, gamma_i = row
            t = jnp.where(alpha_i == 1, t1, t0 + alpha_i * h)
            z = tree.add(y0, combined(a, at.us))
            history = combined(c, at.us)
            now, there, past = stop_gradient((t, z, history))
            r = tree.add(frozen(now, there), weighted(mass, past))
            r = tree.scale(gamma, tree.axpy(gamma_i, slope, r))
            solved = linear.solve(r, tolerance, at.workspace)
            ok = at.ok & solved.ok
            # A stage that failed is replaced by what is finite: its step is rejected, and reverse
            # mode multiplies its derivatives by zero.
            u = attach(
                Explicit(
                    t=jnp.where(ok, t, t_held),
                    z=tree.where(ok, z, held),
                    history=tree.where(ok, history, tree.zeros_like(held)),
                    t0=t0,
                    y0=y0,
                    tau=gamma_i * h,
                    increment=increment,
                    mass=self.mass,
                ),
                found=stop_gradient(tree.where(ok, solved.value, tree.zeros_like(held))),
                gamma=gamma,
                linear=linear,
            )
            work = at.work.plus(
                Work.of(
                    num_fn_evals=1,
                    num_matvecs=solved.num_matvecs,
                    num_preconditioner_applications=solved.num_applications,
                )
            )
            return _Stages(put(at.us, i, u), ok, work, solved.workspace), None

        s = tableau.stages
        rows = (
            jnp.arange(s),
            jnp.asarray(np.array(tableau.a), dtype),
            jnp.asarray(np.array(tableau.c), dtype),
            jnp.asarray(np.array(tableau.alpha_i), h.dtype),
            jnp.asarray(np.array(tableau.gamma_i), h.dtype),
        )
        start = _Stages(
            us=jtu.tree_map(lambda x: jnp.zeros((s, *jnp.shape(x)), x.dtype), y0),
            ok=jnp.array(True),
            work=Work.of(
                num_fn_evals=1,
                num_linearisations=1,
                num_preconditioner_updates=tree.count(prepared.updated),
            ),
            workspace=linear.workspace(),
        )
        end, _ = lax.scan(one_stage, start, rows)
        weights = lambda table: jnp.asarray(np.array(table), dtype)
        y1 = tree.add(y0, combined(weights(tableau.m), end.us))
        error = combined(weights(tableau.e), end.us)
        error = jtu.tree_map(lambda e: jnp.where(end.ok, e, jnp.inf), error)
        ds = combined(weights(tableau.dense), end.us)
        work = end.work.plus(Work.of(num_convergence_failures=tree.count(~end.ok)))
        state = RosenbrockState(jnp.array(False), prepared.carried, solver_state.work.plus(work))
        return y1, error, dict(y0=y0, y1=y1, ds=ds), state, result_of(end.ok)


def _linearised(increment: Increment, t: Scalar, y: Vector) -> Linearisation:
    """F at (t, y) in both, for what finds stages: not differentiated."""
    increment, t, y = stop_gradient((increment, t, y))
    return linearise(lambda z, t: increment(t, z), y, jnp.asarray(t))

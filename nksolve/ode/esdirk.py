"""ESDIRK methods: one linearisation serves all stages of a step and all their iterations."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from equinox import AbstractClassVar
from jaxtyping import Array

from .. import tree
from ..adjoint.base import stop_gradient
from ..krylov.auto import AutoLinear
from ..krylov.base import AbstractKrylovSolver
from ..linearise.views import shifted
from ..typing import Args, Flag, Scalar, ScalarLike, Vector
from .attach import Explicit, Increment, attach
from .linear import Stage, nothing_carried, prepare
from .newton import SimplifiedNewton, check_tolerances, solve_stage
from .step_size import asking
from .stepper import AbstractStiffSolver, check_state, derivative_tolerance, linearised, result_of
from .tableau import ExplicitTableau, Tableau
from .work import Work


class ESDIRKState(NamedTuple):
    """What a step hands to the next."""

    is_first: Flag
    preconditioner: Any  # its arrays, where it is kept
    work: Work  # of the accepted steps


class _Stages(NamedTuple):
    """What a stage hands to the next."""

    ks: Vector  # (s, …): k_i so far
    explicit_ks: Vector  # of the explicit terms, where there are any
    rate: Scalar
    contraction: Scalar  # the largest of a stage
    ok: Flag
    work: Work
    workspace: Any
    z: Vector


class AbstractESDIRK(AbstractStiffSolver):
    """z_i = y0 + Σ_{j<i} a_ij k_j + γ k_i with k_i = h f(t_i, z_i), z_1 = y0, y1 = z_s.

    A step linearises f once, at (t0, y0): the value is k_1, and I − hγJ serves the simplified
    Newton iterations of all stages. Derivatives are those of the converged stage equations, each
    linearised at its own solution.

    Written for w_i = z_i − y0 − Σ_{j<i} a_ij k_j, from which k_i = w_i/γ and y1 come without the
    cancellation that h f would bring (Hairer & Wanner II, §IV.8).
    """

    tableau: AbstractClassVar[Tableau]
    linear_solver: AbstractKrylovSolver = AutoLinear()
    root_finder: SimplifiedNewton = SimplifiedNewton()
    adjoint_rtol: ScalarLike | None = eqx.field(static=True, default=None)

    explicit_tableau: ClassVar[ExplicitTableau | None] = None
    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = dfx.ThirdOrderHermitePolynomialInterpolation

    def order(self, terms: Any) -> int:
        del terms
        return self.tableau.order

    def increments(
        self, terms: Any, args: Args, t0: ScalarLike, t1: ScalarLike, y0: Vector
    ) -> tuple[Increment, Increment | None]:
        """(what is implicit, what is explicit) of a step."""
        return Increment.of(terms, args, t0, t1, y0), None

    def dense_info(
        self, y0: Vector, y1: Vector, ks: Vector, explicit_ks: Vector
    ) -> dict[str, Vector]:
        """What the interpolation is made from."""
        del explicit_ks
        first, last = (jtu.tree_map(lambda k, i=i: k[i], ks) for i in (0, -1))
        return dict(y0=y0, y1=y1, k0=first, k1=last)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Args) -> ESDIRKState:
        check_state(y0)
        implicit, _ = self.increments(terms, args, t0, t1, y0)
        gamma = jnp.asarray(self.tableau.gamma, tree.real_dtype(y0))
        operator = lambda: shifted(linearised(implicit, t0, y0).operator, gamma)
        stage = Stage(t0, self.tableau.gamma * (t1 - t0), args)
        carried = nothing_carried(self.linear_solver, operator, y0, stage)
        return ESDIRKState(jnp.array(True), carried, Work.of())

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        args: Args,
        solver_state: ESDIRKState,
        made_jump: Any,
    ) -> tuple[Any, Any, dict, ESDIRKState, dfx.RESULTS]:
        check_tolerances(self.root_finder, self)
        tableau = self.tableau
        dtype = tree.real_dtype(y0)
        gamma = jnp.asarray(tableau.gamma, dtype)
        implicit, explicit = self.increments(terms, args, t0, t1, y0)
        frozen, held = stop_gradient((implicit, y0))

        # One linearisation, at (t0, y0): its value is the first stage.
        lin = linearised(implicit, t0, y0)
        scale = self.root_finder.scale(held)
        prepared = prepare(
            self.linear_solver,
            shifted(lin.operator, gamma),
            held,
            Stage(t0, tableau.gamma * (t1 - t0), args),
            scale=scale,
            carried=solver_state.preconditioner,
            is_first=solver_state.is_first | made_jump,
            adjoint_rtol=derivative_tolerance(self.root_finder, self.adjoint_rtol, y0),
        )

        def one_stage(at: _Stages, row: Any) -> tuple[_Stages, None]:
            i, c, lower, explicit_lower, guess, explicit_guess = row
            is_first = i == 0
            t = jnp.where(c == 1, t1, t0 + c * (t1 - t0))
            base = tree.add(y0, combined(lower, at.ks))
            base = tree.add(base, combined(explicit_lower, at.explicit_ks)) if explicit else base
            near = combined(guess, at.ks)
            near = tree.add(near, combined(explicit_guess, at.explicit_ks)) if explicit else near
            now, start, near = stop_gradient((t, base, near))
            found = solve_stage(
                self.root_finder,
                lambda z: frozen(now, z),
                prepared.linear,
                start,
                near,
                gamma,
                scale,
                rate=at.rate,
                wanted=~is_first & at.ok,
                workspace=at.workspace,
            )
            ok = at.ok & found.converged
            # A stage that failed is replaced by what is finite: its step is rejected, and reverse
            # mode multiplies its derivatives by zero.
            usable = ok & ~is_first
            z = tree.where(usable, tree.add(start, found.w), held)
            k = tree.where(usable, tree.scale(1 / gamma, found.w), tree.zeros_like(held))
            k = tree.where(is_first, lin.value, k)
            z, k = attach(
                Explicit(base, t, implicit),
                found=stop_gradient((z, k)),
                gamma=jnp.where(is_first, jnp.zeros_like(gamma), gamma),
                is_explicit=is_first,
                linear=prepared.linear,
            )
            explicit_ks = put(at.explicit_ks, i, explicit(t, z)) if explicit else at.explicit_ks
            return _Stages(
                ks=put(at.ks, i, k),
                explicit_ks=explicit_ks,
                rate=found.rate,
                contraction=jnp.maximum(at.contraction, found.contraction),
                ok=ok,
                work=at.work.plus(found.work),
                workspace=found.workspace,
                z=z,
            ), None

        s = len(tableau.c)
        none = jtu.tree_map(lambda x: jnp.zeros((s, *jnp.shape(x)), x.dtype), y0)
        other = self.explicit_tableau
        explicit_lower = np.zeros((s, s)) if other is None else other.lower
        rows = (
            jnp.arange(s),
            jnp.asarray(tableau.c, jnp.result_type(t0)),
            *(
                jnp.asarray(a, dtype)
                for a in (
                    tableau.lower,
                    explicit_lower,
                    tableau.guess(tableau.lower, tableau.gamma),
                    tableau.guess(explicit_lower, 0.0),
                )
            ),
        )
        start = _Stages(
            ks=none,
            explicit_ks=none if explicit else None,
            rate=jnp.ones((), dtype),
            contraction=jnp.zeros((), dtype),
            ok=jnp.array(True),
            work=Work.of(
                num_fn_evals=1,
                num_linearisations=1,
                num_preconditioner_updates=tree.count(prepared.updated),
            ),
            workspace=prepared.linear.workspace(),
            z=y0,
        )
        end, _ = lax.scan(one_stage, start, rows)
        y1, b_error = end.z, jnp.asarray(tableau.b_error, dtype)
        error = combined(b_error, end.ks)
        if other is not None:
            y1 = tree.add(y1, combined(jnp.asarray(other.closing, dtype), end.explicit_ks))
            error = tree.add(error, combined(b_error, end.explicit_ks))
        error = asking(
            self.root_finder,
            error,
            scale,
            size=jtu.tree_map(jnp.maximum, scale, self.root_finder.scale(stop_gradient(y1))),
            starting=solver_state.is_first | made_jump,
            contraction=end.contraction,
            converged=end.ok,
            error_order=self.error_order(terms),
        )
        work = end.work.plus(Work.of(num_convergence_failures=tree.count(~end.ok)))
        state = ESDIRKState(jnp.array(False), prepared.carried, solver_state.work.plus(work))
        dense = self.dense_info(y0, y1, end.ks, end.explicit_ks)
        return y1, error, dense, state, result_of(end.ok)


def combined(weights: Array, ks: Vector) -> Vector:
    """Σ_i weights_i k_i."""
    return jtu.tree_map(lambda k: jnp.tensordot(weights.astype(k.dtype), k, 1), ks)


def put(ks: Vector, i: Any, k: Vector) -> Vector:
    """The stages with k in place i."""
    return jtu.tree_map(lambda all_of_them, one: all_of_them.at[i].set(one), ks, k)

"""Exponential Rosenbrock methods, with φ-functions from Krylov spaces."""

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
from ...linearise.linearisation import linearise
from ...typing import Args, Count, Flag, Scalar, ScalarLike, Vector, Y
from ..attach import Increment
from ..esdirk import combined
from ..newton import SimplifiedNewton, check_tolerances
from ..step_size import asking
from ..stepper import check_state, result_of
from ..work import Work
from .exponential_rule import Point, attach
from .exponential_spaces import Spaces
from .exponential_tableaus import EXPRB32, EXPRB43, ExponentialTableau
from .exponential_targets import Targets
from .interpolation import RosenbrockInterpolation
from .linear import all_finite
from .rok4 import evaluated


class ExponentialState(NamedTuple):
    """What a step hands to the next."""

    work: Work  # of the accepted steps


class _Stages(NamedTuple):
    """What a stage hands to the next."""

    sums: Vector  # (targets, …): what the stages so far add up to, in the frame
    ok: Flag
    estimate: Scalar  # of the largest error of a φ-function, in the controller's norm
    largest: Count  # vectors in the largest space
    num_matvecs: Count


class AbstractExponentialRosenbrock(dfx.AbstractImplicitSolver, dfx.AbstractAdaptiveSolver):
    """U_i = y0 + c_i φ₁(c_iA) F₀ + c_i² φ₂(c_iA) g + Σ_{2≤j<i} a_ij(c_iA) D_j,
    D_i = F(t0 + c_ih, U_i) − F₀ − A (U_i − y0) − c_i g,
    y1 = y0 + φ₁(A) F₀ + φ₂(A) g + Σ_{i≥2} b_i(A) D_i,

    with F = h f, A = h f_y, g = h² f_t at (t0, y0), from one linearisation in a step.
    """

    tableau: AbstractClassVar[ExponentialTableau]

    root_finder: SimplifiedNewton = SimplifiedNewton()
    max_dimension: int = eqx.field(static=True, default=40)
    adjoint_rtol: ScalarLike | None = eqx.field(static=True, default=None)

    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = RosenbrockInterpolation

    def __check_init__(self):
        if self.max_dimension < 1:
            raise ValueError(f"`max_dimension` must be positive, but it is {self.max_dimension}.")

    @property
    def root_find_max_steps(self) -> int:
        """Part of Diffrax's interface; there is no iteration."""
        return self.root_finder.max_steps

    def order(self, terms: Any) -> int:
        del terms
        return self.tableau.order

    def error_order(self, terms: Any) -> float:
        """One more than the order of what the step is compared with."""
        del terms
        return 1.0 + self.tableau.embedded_order

    def func(self, terms: dfx.AbstractTerm, t0: Any, y0: Y, args: Args) -> Any:
        return terms.vf(t0, y0, args)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Args) -> ExponentialState:
        del terms, t0, t1, args
        check_state(y0)
        return ExponentialState(Work.of())

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        args: Args,
        solver_state: ExponentialState,
        made_jump: Any,
    ) -> tuple[Any, Any, dict, ExponentialState, dfx.RESULTS]:
        del made_jump
        check_tolerances(self.root_finder, self)
        dtype = tree.real_dtype(y0)
        t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
        h = t1 - t0
        increment = Increment.of(terms, args, t0, t1, y0)
        point = Point(increment, t0, y0)
        held = stop_gradient((increment, t0, y0))
        lin = linearise(lambda z, t: increment(t, z), y0, t0)
        spaces = Spaces.at(
            self.root_finder,
            *stop_gradient((lin, h, y0)),
            max_dimension=self.max_dimension,
            adjoint_rtol=self.adjoint_rtol,
        )
        outward = spaces.frame.outward
        targets = Targets.of(self.tableau, dtype)

        def one_stage(at: _Stages, row: Any) -> tuple[_Stages, None]:
            i, c, to, wanted = row
            first = i == 0
            offset = jtu.tree_map(lambda rows: rows[jnp.maximum(i - 1, 0)], at.sums)
            offset = outward(tree.where(first, tree.zeros_like(offset), offset))
            t = jnp.where(c == 1, t1, t0 + c * h)
            value, ok = evaluated(increment, t, tree.add(y0, offset), at.ok, held)
            # What failed is replaced by what is finite: its step is rejected, and reverse mode
            # multiplies its derivatives by zero.
            offset = tree.where(ok, offset, tree.zeros_like(offset))
            line = tree.add(lin.value, lin.joint.mv((offset, c * h)))
            v = tree.sub(value, tree.where(first, tree.zeros_like(line), line))
            ok = ok & all_finite(v)
            v = spaces.frame.inward(tree.where(ok, v, tree.zeros_like(v)))
            space = spaces.of(stop_gradient(v), first & ok, wanted)
            estimate = jnp.where(jnp.isnan(space.estimate), jnp.inf, space.estimate)
            ok = ok & (estimate <= jnp.maximum(spaces.allowed, 1))
            space = tree.where(ok, space, tree.zeros_like(space))
            found = combined(space.norm * space.weights, space.basis[0])
            found = attach(
                point,
                tree.where(ok, v, tree.zeros_like(v)),
                found=found,
                held=spaces.held(space, wanted),
            )
            return _Stages(
                sums=tree.add(at.sums, combined(to, found)),
                ok=ok,
                estimate=jnp.maximum(at.estimate, estimate),
                largest=jnp.maximum(at.largest, space.num),
                num_matvecs=at.num_matvecs + space.num + 1,
            ), None

        s = self.tableau.stages
        v = spaces.frame.inward(held[2])
        start = _Stages(
            sums=jtu.tree_map(lambda x: jnp.zeros((s + 3, *x.shape), x.dtype), v),
            ok=all_finite(stop_gradient(lin.value)),
            estimate=jnp.zeros((), dtype),
            largest=jnp.zeros((), jnp.int32),
            num_matvecs=jnp.ones((), jnp.int32),
        )
        nodes = jnp.asarray(np.array(self.tableau.nodes), h.dtype)
        rows = (jnp.arange(s), nodes, targets.to, targets.wanted)
        end, _ = lax.scan(one_stage, start, rows)
        total, error, middle, slope = (
            outward(jtu.tree_map(lambda rows, i=i: rows[s - 1 + i], end.sums)) for i in range(4)
        )
        ok = end.ok & all_finite(stop_gradient(total))
        y1 = tree.where(ok, tree.add(y0, total), y0)
        error = self._reported(stop_gradient(error), y0, y1, ok, end, spaces)
        work = Work.of(
            num_fn_evals=1 + s,
            num_linearisations=1,
            num_matvecs=end.num_matvecs,
            num_convergence_failures=tree.count(~ok),
        )
        state = ExponentialState(solver_state.work.plus(work))
        dense = dict(y0=y0, y1=y1, ds=_dense(total, middle, slope))
        return y1, error, dense, state, result_of(ok)

    def _reported(
        self, error: Vector, y0: Vector, y1: Vector, ok: Flag, end: _Stages, spaces: Spaces
    ) -> Vector:
        """The error estimate, with that of the φ-functions where a space was too small; and no
        wish for steps that would need more vectors than there may be."""
        y0, y1 = stop_gradient((y0, y1))
        larger = jtu.tree_map(lambda a, b: jnp.maximum(jnp.abs(a), jnp.abs(b)), y0, y1)
        scale = self.root_finder.scale(larger)
        missed = jnp.where(end.estimate > spaces.allowed, end.estimate, 0)
        # A little shorter a step needs many vectors less: what is known to fail is halved.
        missed = jnp.where(jnp.isfinite(missed), jnp.minimum(missed, 10), missed)
        more = lambda e, d: (jnp.abs(e) + missed.astype(d.dtype) * d).astype(e.dtype)
        error = tree.where(missed > 0, jtu.tree_map(more, error, scale), error)
        exhaustive = spaces.size < self.max_dimension
        used = 0.0 if exhaustive else end.largest.astype(end.estimate.dtype) / self.max_dimension
        return asking(
            self.root_finder,
            error,
            scale,
            size=scale,
            starting=jnp.array(False),
            contraction=jnp.asarray(0.4 * used, end.estimate.dtype),
            converged=ok,
            error_order=1.0 + self.tableau.embedded_order,
        )


def _dense(total: Vector, middle: Vector, slope: Vector) -> Vector:
    """d₁ and d₂ of the cubic through y0, the middle and y1 that has the slope at the end. The
    slope at the start is not used: where y0 is off the slow solution it is that of a layer."""

    def one(y, m, k):
        e, f = y - k, 4 * m - 2 * y
        return jnp.stack([2 * f - e, 2 * (e - f)])

    return jtu.tree_map(one, total, middle, slope)


class Exprb32(AbstractExponentialRosenbrock):
    """Hochbruck, Ostermann & Schweitzer's 3(2) method of 2 stages: order 3 on stiff problems too,
    exact for y' = Ay + b + ct.

    **Arguments:**

    - `root_finder`: `nks.ode.SimplifiedNewton`, of which `rtol`, `atol`, `norm` and `kappa` are
      used: a φ-function is found to κ in the controller's norm. `SimplifiedNewton.alone()` for
      constant steps.
    - `max_dimension`: most vectors in a Krylov space. It bounds the step: h‖f_y‖ may be about a
      quarter of its square where eigenvalues are real.
    - `adjoint_rtol`: the relative tolerance of φ-functions for derivatives; by default a hundredth
      of `rtol`, at most 1e-6.

    Reports `nonlinear_divergence` where a value is not finite, or where a space is full and the
    estimate of what it leaves is above the tolerance itself. Between κ and that, the estimate is
    added to that of the error. An adaptive controller then takes a shorter step, and is asked for
    none that would need more vectors than there may be.

    There is no linear solver and no preconditioner. Derivatives are those of the exact φ-functions,
    by Krylov spaces of the transposed matrix; first ones only. No mass matrix.

    Storage: `max_dimension` + 15 vectors; in reverse mode twice as many for each stage of the step
    that is differentiated. Work: one linearisation, 3 evaluations, 2 Krylov spaces, whose vectors
    are products with the Jacobian. Dense output: cubic, from the method's own continuous extension.

    Source: Hochbruck, Ostermann & Schweitzer, Exponential Rosenbrock-type methods, SIAM J. Numer.
    Anal. 47 (2009), 786–803, §4.
    """

    tableau: ClassVar[ExponentialTableau] = EXPRB32


class Exprb43(AbstractExponentialRosenbrock):
    """Hochbruck, Ostermann & Schweitzer's 4(3) method of 3 stages: order 4 on stiff problems too,
    exact for y' = Ay + b + ct.

    **Arguments:** as of `nks.ode.Exprb32`.

    Reports as `nks.ode.Exprb32`.

    Storage: as `nks.ode.Exprb32`. Work: one linearisation, 4 evaluations, 3 Krylov spaces, of which
    that of the first stage serves c = ½ and 1, and that of the second φ₁, φ₃ and φ₄.

    Source: Hochbruck, Ostermann & Schweitzer, Exponential Rosenbrock-type methods, SIAM J. Numer.
    Anal. 47 (2009), 786–803, §4.
    """

    tableau: ClassVar[ExponentialTableau] = EXPRB43

"""A root finder for Diffrax's own implicit solvers: one linearisation for the stages of a step."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array

from .. import tree
from ..adjoint.base import stop_gradient
from ..krylov.auto import AutoLinear
from ..krylov.base import AbstractKrylovSolver
from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..linearise.policies import Linearise
from ..linearise.trace import LinearisedProgram, ProgramAt, trace
from ..linearise.views import divided, shifted
from ..precondition.base import join, split
from ..typing import Count, Flag, Norm, Scalar, ScalarLike, Vector
from .linear import KrylovStageLinear, Stage
from .newton import CONTROLLERS, SimplifiedNewton, judge
from .relations import AbstractRelation, IncrementMap, relation_of


class StageState(eqx.Module):
    """A linearisation and the inverse made from it, as arrays; and where the iteration stands.

    The rest of both is made again by tracing: Diffrax carries the state through a loop, where a
    traced program cannot go.
    """

    kept: list[Array]  # of the linearisation: what depends on the point
    inverse: list[Array]
    t: Array  # time of the linearisation
    count: Count
    norm: Scalar  # ‖Δw‖ of the last iteration
    converged: Flag
    diverged: Flag

    def restarted(self) -> "StageState":
        """The same, before the first iteration."""
        no = jnp.zeros((), bool)
        return StageState(
            self.kept, self.inverse, self.t, jnp.zeros_like(self.count), self.norm, no, no
        )


class StageNewtonKrylov(optx.AbstractRootFinder):
    """Solves the stages of Diffrax's own implicit solvers, matrix-free, in y's units.

        dfx.Kvaerno5(root_finder=nks.ode.StageNewtonKrylov())

    A stage is w = γ F(base + w) with F = h f and z = base + w. Diffrax solves it for the slope f
    (or for h f), of which a tolerance for y says nothing; here an iteration is

        Δw = W⁻¹ (w − γ F(base + w)),    W = I − γ ∂F/∂y,

    measured as Δw in the norm of the step size controller, and then handed on as a change of the
    slope. It has converged, with the measured rate of contraction θ, when

        θ/(1 − θ) ‖Δw‖ ≤ κ,    or ‖Δw‖ is at the rounding level of y,

    and diverged, so that the step is rejected, when θ ≥ 1, when at this rate `max_steps` will not
    do, or when a value is not finite. Until then it goes on: slow is not diverged. At the first
    iteration of a stage the quotient counts as 1.

    f is linearised where the solver asks for it: once in a step by `Kvaerno3/4/5`, `KenCarp3/4/5`
    and `ImplicitEuler`, once in an implicit stage by `Sil3`. The linearisation and what is made
    from it, a preconditioner or a factorisation, serve all iterations until the next.

    Derivatives are Diffrax's own: the forward solve holds no n×n value with a Krylov method, but
    derivatives through it, forward or reverse, still assemble and factorise an n×n matrix at each
    stage, which no root finder can change. `nks.ode.Kvaerno3/4/5` are the same methods without.

    **Arguments:**

    - `rtol`, `atol`, `norm`: those of the step size controller by default, as with
      `dfx.with_stepsize_controller_tols(nks.ode.StageNewtonKrylov)()`. Diffrax has none to hand
      over where steps are constant: `StageNewtonKrylov.alone()` brings its own.
    - `linear_solver`: any Krylov method or direct solver of nksolve with its preconditioner, whose
      hooks get z and an `nks.ode.Stage` in the place of `args`. Krylov solves go to a twentieth of
      κ in the same norm; `rtol` and `atol` of the solver are not used. A preconditioner is made at
      each linearisation: Diffrax has no place to keep one for the next step.
    - `kappa`: κ.
    - `max_steps`: most iterations of a stage; the solver's own `root_find_max_steps` holds too.

    Reports `nonlinear_divergence`; Diffrax rejects the step, or fails where steps are constant.

    Storage: what the linearisation keeps, the preconditioner's state, and the Krylov method's
    vectors during an iteration. Work: an iteration is one evaluation of f and one linear solve.

    Source: Hairer & Wanner, Solving Ordinary Differential Equations II, 2nd ed., §IV.8.
    """

    rtol: ScalarLike = CONTROLLERS
    atol: ScalarLike = CONTROLLERS
    norm: Norm = CONTROLLERS
    linear_solver: AbstractKrylovSolver = AutoLinear()
    kappa: ScalarLike = 1e-2
    max_steps: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        # The tolerances may still be Diffrax's to fill in.
        given = {k: getattr(self, k) for k in ("rtol", "atol") if _is_number(getattr(self, k))}
        SimplifiedNewton(**given, kappa=self.kappa, max_steps=self.max_steps)

    @classmethod
    def alone(
        cls,
        rtol: ScalarLike | None = None,
        atol: ScalarLike | None = None,
        norm: Norm = optx.rms_norm,
        *,
        linear_solver: AbstractKrylovSolver = AutoLinear(),
        kappa: ScalarLike = 1e-2,
        max_steps: int = 10,
    ) -> "StageNewtonKrylov":
        """With tolerances of its own, for constant steps: by default those of
        `nks.ode.SimplifiedNewton.alone`."""
        newton = SimplifiedNewton.alone(rtol, atol, norm)
        tolerances = newton.rtol, newton.atol, newton.norm
        return cls(*tolerances, linear_solver, kappa, max_steps)

    def init(
        self,
        fn: Callable[..., Any],
        y: Any,
        args: Any,
        options: dict[str, Any],
        f_struct: Any,
        aux_struct: Any,
        tags: frozenset[object],
    ) -> StageState:
        del fn, f_struct, aux_struct, tags
        if "init_state" in options:
            return options["init_state"].restarted()
        relation, x = stop_gradient((relation_of(args), y))
        point = relation.linearise_at(x)

        def made():
            program = _program(relation, point, relation.t)
            _, kept = program.program.evaluate(program.cold, point)
            operator = shifted(_recalled(program, relation, kept), relation.diagonal)
            solver, stage = self._chosen(operator, relation, point)
            state = solver.preconditioner.init(operator, point, stage)
            return kept, split(state)[0]

        shapes = jax.eval_shape(made)
        # Diffrax asks for the state of an explicit stage too, once in each step.
        nothing = lambda: tree.zeros_like(shapes)
        arrays = lax.cond(relation.diagonal == 0, nothing, made)
        no = jnp.zeros((), bool)
        return stop_gradient(
            StageState(
                *arrays,
                t=jnp.asarray(relation.t),
                count=jnp.zeros((), jnp.int32),
                norm=jnp.ones((), tree.real_dtype(point)),
                converged=no,
                diverged=no,
            )
        )

    def step(
        self,
        fn: Callable[..., Any],
        y: Any,
        args: Any,
        options: dict[str, Any],
        state: StageState,
        tags: frozenset[object],
    ) -> tuple[Any, StageState, Any]:
        del options, tags
        if self.rtol is CONTROLLERS or self.atol is CONTROLLERS or self.norm is CONTROLLERS:
            raise ValueError(
                "StageNewtonKrylov has no tolerances: Diffrax hands on those of an adaptive step "
                "size controller in `diffeqsolve`. With constant steps, or outside `diffeqsolve`, "
                "use `nks.ode.StageNewtonKrylov.alone()`."
            )
        relation = relation_of(args)
        newton = SimplifiedNewton(self.rtol, self.atol, self.norm, self.kappa, self.max_steps)
        r, aux = fn(y, args)
        z = relation.point(y)
        dtype = state.norm.dtype
        active = ~state.converged & ~state.diverged
        is_explicit = relation.diagonal == 0

        program = _program(relation, z, state.t)
        jacobian = _recalled(program, relation, state.kept)
        operator = shifted(jacobian, relation.diagonal)
        linear = self._linear(operator, relation, z, state, newton.scale(z))
        kappa = jnp.asarray(self.kappa).astype(dtype)
        wanted = jnp.where(active & ~is_explicit, 0.05 * kappa, jnp.inf)
        residual = relation.in_y(r)
        solved, _ = linear.correction(residual, wanted, linear.workspace())
        dw = tree.where(is_explicit, residual, solved.value)

        # In an explicit stage, one iteration is exact.
        dx = relation.change(dw, r, program.recalled(state.kept, frozenset()).operator)
        z = tree.sub(z, dw)
        scale = newton.scale(z)
        norm = self.norm(divided(dw, scale)).astype(dtype)
        floor = 4 * tree.eps(z) * self.norm(divided(z, scale)).astype(dtype)
        target = jnp.maximum(kappa, floor)
        verdict = judge(
            jnp.where(jnp.isfinite(tree.norm2(r)), norm, jnp.nan),
            state.norm,
            count=state.count,
            max_steps=self.max_steps,
            target=target,
            floor=floor,
            first_quotient=jnp.ones_like(norm),
        )
        converged = verdict.converged | (is_explicit & jnp.isfinite(norm))
        new = StageState(
            kept=state.kept,
            inverse=state.inverse,
            t=state.t,
            count=state.count + 1,
            norm=norm,
            converged=converged,
            diverged=verdict.diverged & ~converged,
        )
        return tree.sub(y, dx), new, aux

    def terminate(
        self,
        fn: Callable[..., Any],
        y: Any,
        args: Any,
        options: dict[str, Any],
        state: StageState,
        tags: frozenset[object],
    ) -> tuple[Flag, optx.RESULTS]:
        del fn, y, args, options, tags
        results = optx.RESULTS
        result = results.where(state.diverged, results.nonlinear_divergence, results.successful)
        return state.converged | state.diverged, result

    def postprocess(
        self,
        fn: Callable[..., Any],
        y: Any,
        aux: Any,
        args: Any,
        options: dict[str, Any],
        state: StageState,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Any, Any, dict[str, Any]]:
        del fn, options, state, tags
        relation = relation_of(args)
        newton = SimplifiedNewton(self.rtol, self.atol, self.norm)
        # What is finite: the step is rejected, and its derivatives are multiplied by zero.
        spare = relation.rejected(y, newton.scale)
        return tree.where(result == optx.RESULTS.successful, y, spare), aux, {}

    def _chosen(
        self, operator: JacobianOperator, relation: AbstractRelation, z: Vector
    ) -> tuple[AbstractKrylovSolver, Stage]:
        stage = Stage(relation.t, relation.shift, relation.args)
        return self.linear_solver.chosen(lambda: operator, z, stage), stage

    def _linear(
        self,
        operator: JacobianOperator,
        relation: AbstractRelation,
        z: Vector,
        state: StageState,
        scale: Vector,
    ) -> KrylovStageLinear:
        """What solves with W: the inverse of the state, put together again."""
        solver, stage = self._chosen(operator, relation, z)
        skeletons = []

        def init():
            arrays, skeleton = split(solver.preconditioner.init(operator, z, stage))
            skeletons.append(skeleton)
            return arrays

        jax.eval_shape(init)
        inverse = solver.preconditioner.as_operator(join(state.inverse, skeletons[0]))
        return KrylovStageLinear(operator, inverse, solver, scale, jnp.zeros((), state.norm.dtype))


def _program(relation: AbstractRelation, z: Vector, t: Array) -> ProgramAt:
    """The linearisation of the slope with respect to y, at time t."""
    program, params = trace(lambda z, at: at[1](at[0], z), z, (t, relation.slope), has_aux=False)
    return LinearisedProgram(program, z, params, [False] * len(params), Linearise()).at(params)


def _recalled(
    program: ProgramAt, relation: AbstractRelation, kept: list[Array]
) -> JacobianOperator:
    """∂F/∂y at the point whose arrays these are."""
    operator = program.recalled(kept, frozenset()).operator
    structure = operator.in_structure()
    jacobian: AbstractLinearMap = operator.linear_map
    if relation.prod is not None:
        jacobian = IncrementMap(jacobian, relation.prod, tree.freeze(operator.out_structure()))
    return JacobianOperator(jacobian, structure, structure)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float))

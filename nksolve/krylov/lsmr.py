"""LSMR: least squares with A and Aᵀ of one linearisation."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import PyTree

from .. import tree
from ..loops import any_lane
from ..precondition.base import AbstractPreconditioner, Identity
from ..typing import Count, Flag, LinearFn, Scalar, ScalarLike, Vector
from .base import AbstractKrylovSolver, KrylovResult, KrylovState, LinearSystem
from .bidiagonal import Bidiagonal, inverse
from .cycle import Workspace
from .golub_kahan import allocated, begun, extended, orthogonalised
from .system import check_endomorphism


class _Problem(NamedTuple):
    """B = Ā M⁻¹ and its adjoint, Ā = A or, with damping, A over damp·I. b has norm 1."""

    forward: LinearFn  # x → Ā x, a pair (A x, damp x); the second is `None` without damping
    backward: LinearFn  # u → Bᴴu
    psolve: LinearFn | None
    b: Vector
    target: Scalar
    least_squares: Flag  # a solution is a point where Bᴴr vanishes; otherwise one where r does
    max_steps: int
    eps: float
    verify: bool


class _Carry(NamedTuple):
    x: Vector
    u: tuple[Vector, Vector]
    v: Vector
    h: Vector  # M⁻¹h_k
    h_bar: Vector  # M⁻¹h̄_k
    alpha: Scalar
    beta: Scalar
    bidiagonal: Bidiagonal
    kept: Workspace | None
    norm: Scalar  # the largest ‖B v‖ seen, a lower bound of ‖B‖₂
    residual: Scalar  # ‖r‖
    start: tuple[Scalar, Scalar]  # ‖r‖ and ‖Bᴴr‖ when this round, or the last one, began
    column: Count  # of this round; −1 where the next thing to do is r = b − A x
    steps: Count
    matvecs: Count
    transposed: Count
    rounds: Count
    converged: Flag
    broken: Flag
    done: Flag


class LSMR(AbstractKrylovSolver):
    """LSMR: min ‖b − A x‖₂² + damp² ‖x‖₂², for square and rectangular A.

    The Golub–Kahan process with A and Aᴴ; ‖Aᴴr_k‖ is least over x₀ + the Krylov space of AᴴA, and
    ‖r_k‖ never grows. Among all solutions it finds the one of least norm (without preconditioner
    and guess).

    **Arguments:**

    - `rtol`, `atol`: a *square* system without damping is an equation: success is
      ‖b − A x‖ ≤ atol + rtol ‖b‖ and nothing else. A rectangular or damped one is a least-squares
      problem: success is that, or ‖B̄ᴴr̄‖ ≤ (rtol + atol/‖b‖) ‖B̄‖ ‖r̄‖, where B̄ is A M⁻¹ over
      damp·M⁻¹, r̄ is b − A x over −damp·x, and ‖B̄‖ the largest ‖B̄ v‖, ‖v‖ = 1, that was seen,
      which is at most ‖B̄‖₂.
    - `damp`: ≥ 0, may be traced (Levenberg–Marquardt). It damps x, not M x. The Python number 0
      costs nothing.
    - `kept`: the first so many vectors of the process are kept, and later ones made orthogonal to
      them: with as many as there are unknowns the iterations are those of exact arithmetic.
      `nks.LevenbergMarquardt` takes its steps in their space.
    - `max_steps`: bounds the iterations; 10 times the larger dimension by default.
    - `preconditioner`: M⁻¹ ≈ A⁻¹, applied on the right with its transpose. For a rectangular A
      only the option `preconditioner` of `lx.linear_solve` will do: an operator from x's space to
      itself, with MᴴM ≈ AᴴA.

    Reports `successful`, `max_steps_reached`, `breakdown` (not finite), or `stagnation`: neither r
    nor Bᴴr can be made smaller. There the value of an inconsistent square system is still its
    least-squares solution. `residual_norm` is ‖r̄‖.

    Derivatives are those of the pseudo-inverse. For a square singular A they exist with respect to
    b within the range of A only; with respect to A and `damp` of a damped solve they are refused
    (stack the rows: solve with A over damp·I, b over 0).

    Storage: 4 vectors like x and 2 like b, one more like x with damping, `kept` more (twice that
    with a preconditioner). Work: one matvec, one transposed matvec, M⁻¹ and M⁻ᵀ, four reductions an
    iteration, with `kept` four passes over those vectors; two transposed and one plain matvec more
    to verify. The number of iterations goes with the condition number of A M⁻¹ (as CG's on AᴴA):
    for least squares, singular or very indefinite systems, not in place of GMRES.

    Source: Fong & Saunders, SIAM J. Sci. Comput. 33(5), 2011, sections 2.8 and 3.
    """

    rtol: ScalarLike = 1e-6
    atol: ScalarLike = 0.0
    damp: ScalarLike = 0.0
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: AbstractPreconditioner = Identity()
    kept: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        if isinstance(self.damp, (int, float)) and not self.damp >= 0:
            raise ValueError(f"`damp` must not be negative, but it is {self.damp}.")
        if self.kept < 0:
            raise ValueError(f"`kept` must not be negative, but it is {self.kept}.")
        if self.max_steps is not None and self.max_steps < 0:
            raise ValueError(f"`max_steps` must not be negative, but it is {self.max_steps}.")

    @property
    def needs_transpose(self) -> bool:
        return True

    @property
    def is_damped(self) -> bool:
        """Whether there may be damping."""
        return not (isinstance(self.damp, (int, float)) and self.damp == 0)

    def for_derivatives(self) -> AbstractKrylovSolver:
        return eqx.tree_at(lambda s: s.damp, self, 0.0)

    def check_operator(self, operator: lx.AbstractLinearOperator) -> None:
        if operator.in_structure() == operator.out_structure():
            return
        if not isinstance(self.preconditioner, Identity):
            raise ValueError(
                "LSMR: a preconditioner made from the operator approximates its inverse, which a "
                "rectangular operator lacks. Pass an operator from x's space to itself as "
                "`lx.linear_solve(..., options={'preconditioner': ...})`."
            )

    def transpose(
        self, state: KrylovState, options: dict[str, Any]
    ) -> tuple[KrylovState, dict[str, Any]]:
        operator = state.operator
        if operator.in_structure() == operator.out_structure():
            return state.transpose(), {}
        # M⁻¹ lives in x's space, which is that of the right-hand side now: nothing to be had of it.
        structure = operator.out_structure()
        return KrylovState(operator.transpose(), lx.IdentityLinearOperator(structure)), {}

    def conj(
        self, state: KrylovState, options: dict[str, Any]
    ) -> tuple[KrylovState, dict[str, Any]]:
        # Lineax asks for this only to differentiate with respect to A, as of a pseudo-inverse.
        if self.is_damped:
            raise NotImplementedError(
                "LSMR(damp=...) has derivatives with respect to the right-hand side only. For "
                "those with respect to the operator stack its rows: solve with A over damp·I, and "
                "b over 0, without `damp`."
            )
        return super().conj(state, options)

    def assume_full_rank(self) -> bool:
        return False

    def workspace(self, vector: Vector, *, real: bool) -> Workspace | None:
        if self.kept == 0:
            return None
        plain = isinstance(self.preconditioner, Identity)
        return allocated(vector, self.kept, real=real, plain=plain)

    def solve(
        self,
        system: LinearSystem,
        vector: Vector,
        *,
        tolerance: ScalarLike,
        workspace: PyTree,
        norm: Scalar | None = None,
        guess: Vector | None = None,
        verify: bool = False,
    ) -> KrylovResult:
        norm = tree.norm2(vector) if norm is None else norm
        unit = jnp.where((norm > 0) & jnp.isfinite(norm), norm, jnp.ones_like(norm))
        size = jnp.where(jnp.isfinite(norm), norm / unit, jnp.nan)
        problem, zero = self._problem(system, vector, unit, tolerance, verify)
        if guess is not None:
            guess = tree.scale(jnp.where(size > 0, 1 / unit, 0 * unit), guess)
        carry = _start(problem, zero, size, guess)
        if self.kept:
            carry = carry._replace(kept=begun(workspace, zero, self.kept, system))
        end = _iterated(problem, carry)
        applications = jnp.zeros_like(end.steps)
        if system.psolve is not None:  # M⁻¹ with each A, M⁻ᵀ with each Aᵀ; none to verify
            applications = end.steps + end.transposed
        descent = None if guess is not None else (size - end.residual) * size * unit**2
        return KrylovResult(
            value=tree.scale(unit, end.x),
            residual_norm=end.residual * unit,
            descent=descent,
            result=_result(problem, end),
            num_steps=end.steps,
            num_matvecs=end.matvecs,
            num_transposed_matvecs=end.transposed,
            num_preconditioner_applications=applications,
            num_restarts=jnp.maximum(end.rounds - 1, 0),
            workspace=end.kept if self.kept else workspace,
        )

    def _problem(
        self,
        system: LinearSystem,
        vector: Vector,
        unit: Scalar,
        tolerance: ScalarLike,
        verify: bool,
    ) -> tuple[_Problem, Vector]:
        """What is solved, in units of ‖b‖, and the zero of x's space."""
        transpose = system.transpose_mv
        if transpose is None:
            raise ValueError("LSMR needs the transpose of the operator, which this system lacks.")
        structure = tree.structure(jax.eval_shape(transpose, vector))
        square = structure == tree.structure(vector)
        psolve, transpose_psolve = system.psolve, system.transpose_psolve
        if psolve is not None:
            check_endomorphism("LSMR", psolve, structure)
        damp = jnp.asarray(self.damp).astype(unit.dtype)
        damped = self.is_damped

        def forward(x: Vector) -> tuple[Vector, Vector]:
            return system.mv(x), tree.scale(damp, x) if damped else None

        def backward(u: tuple[Vector, Vector]) -> Vector:
            # Aᴴu = conj(Aᵀ conj(u)), also where A is only real-linear and ℂⁿ counts as ℝ²ⁿ.
            out = transpose(tree.conj(u[0]))
            if damped:
                out = tree.axpy(damp, tree.conj(u[1]), out)
            if transpose_psolve is not None:
                out = transpose_psolve(out)
            return tree.conj(out)

        larger = max(tree.size(structure), tree.size(vector))
        problem = _Problem(
            forward=forward,
            backward=backward,
            psolve=psolve,
            b=tree.scale(1 / unit, vector),
            target=jnp.asarray(tolerance).astype(unit.dtype) / unit,
            least_squares=jnp.logical_not(square) | (damp > 0),
            max_steps=10 * larger if self.max_steps is None else self.max_steps,
            eps=tree.eps(vector),
            verify=verify,
        )
        return problem, tree.zeros_like(structure)


def _start(problem: _Problem, zero: Vector, size: Scalar, guess: Vector | None) -> _Carry:
    none = jnp.zeros_like(size, jnp.int32)
    nothing, infinite = jnp.zeros_like(size), jnp.full_like(size, jnp.inf)
    damped = jax.eval_shape(problem.forward, zero)[1] is not None
    done = ~(size > problem.target)
    if guess is not None:
        # Worth nothing where b = 0, whose solution is known, and where all is accepted.
        done = ~(size > 0) | jnp.isinf(problem.target)
    done = done | (size == 0)
    return _Carry(
        x=zero if guess is None else tree.where(done, zero, guess),
        u=(problem.b, zero if damped else None),
        v=zero,
        h=zero,
        h_bar=zero,
        alpha=nothing,
        beta=size,
        bidiagonal=Bidiagonal.begun(nothing, size),
        kept=None,
        norm=nothing,
        residual=size,
        start=(infinite, infinite),
        column=none if guess is None else none - 1,
        steps=none,
        matvecs=none,
        transposed=none,
        rounds=none,
        converged=size <= problem.target if guess is None else done & ~jnp.isnan(size),
        broken=jnp.isnan(size),
        done=done,
    )


def _iterated(problem: _Problem, carry: _Carry) -> _Carry:
    if carry.kept is None:
        return lax.while_loop(lambda c: ~c.done, lambda c: _step(problem, c), carry)

    def step(c: _Carry) -> _Carry:
        new = _step(problem, c)
        # Not over the vectors that are kept, which a finished lane leaves as they are.
        small = tree.where(c.done, c._replace(kept=None), new._replace(kept=None))
        return small._replace(kept=new.kept)

    return lax.while_loop(lambda c: any_lane(~c.done), step, carry)


def _step(problem: _Problem, c: _Carry) -> _Carry:
    """α_k v_k = Bᴴu_k − β_k v_{k−1}, with it x_{k−1}; then β_{k+1} u_{k+1} = B v_k − α_k u_k.

    Between rounds only β_1 u_1 = b − A x. So there is one place for A, and one for Aᴴ.
    """
    restarting, fresh = c.column < 0, c.column == 0
    image = lax.cond(restarting, lambda: c.v, lambda: problem.backward(c.u))
    w = tree.axpy(jnp.where(fresh, jnp.zeros_like(c.beta), -c.beta), c.v, image)
    w = orthogonalised(c.kept, w, c.column)
    alpha = jnp.where(restarting, c.alpha, tree.norm2(w))
    c = c._replace(
        v=tree.where(restarting, c.v, tree.scale(inverse(alpha), w)),
        alpha=alpha,
        norm=jnp.where(jnp.isfinite(alpha), jnp.maximum(c.norm, alpha), c.norm),
        transposed=c.transposed + tree.count(~restarting),
        broken=~jnp.isfinite(alpha),
    )
    c, factor = _advanced(c, fresh, ~restarting & ~c.broken)
    closing, converged = _judged(problem, c, fresh)
    closing, converged = closing & ~restarting, converged & ~restarting
    # Success is for the true residual to say, which is known at the start of a round only.
    verifying = closing & ~fresh & ~c.broken if problem.verify else jnp.zeros_like(closing)
    done = closing & ~verifying
    restart = restarting | verifying
    stepping = ~restart & ~done
    z = c.v
    if problem.psolve is not None:
        apply = problem.psolve
        z = lax.cond(stepping, lambda: apply(c.v), lambda: tree.zeros_like(c.x))
    image = lax.cond(done, lambda: c.u, lambda: problem.forward(tree.where(restart, c.x, z)))
    origin = (problem.b, tree.zeros_like(c.u[1]))
    w = tree.axpy(jnp.where(restart, jnp.zeros_like(alpha), -alpha), c.u, image)
    w = tree.where(restart, tree.sub(origin, image), w)
    beta = jnp.where(done, c.beta, tree.norm2(w))
    finite = jnp.isfinite(beta)
    kept = extended(c.kept, c.column, c.v, z, alpha, beta, stepping & ~c.done)
    solved = restart & (beta <= problem.target)
    # ‖B v_k‖² = α_k² + β_{k+1}²
    seen = jnp.where(stepping & finite, jnp.maximum(c.norm, jnp.hypot(alpha, beta)), c.norm)
    begins = stepping & fresh
    return c._replace(
        u=tree.scale(inverse(beta), w),
        h=tree.axpy(-factor, c.h, z),
        beta=beta,
        kept=kept,
        norm=seen,
        residual=jnp.where(restart & finite, beta, c.residual),
        start=tuple(
            jnp.where(begins, new, old)
            for new, old in zip((c.residual, c.bidiagonal.normal), c.start, strict=True)
        ),
        column=jnp.where(restart, 0, c.column + 1),
        steps=c.steps + tree.count(stepping),
        matvecs=c.matvecs + tree.count(~done),
        rounds=c.rounds + tree.count(begins),
        converged=(done & converged) | solved,
        broken=c.broken | ~finite,
        done=done | solved | ~finite,
    )


def _judged(problem: _Problem, c: _Carry, fresh: Flag) -> tuple[Flag, Flag]:
    """Whether to stop at this residual, and whether it is a success."""
    size = c.norm * c.residual
    normal = c.bidiagonal.normal
    converged = c.residual <= problem.target
    converged = converged | (problem.least_squares & (normal <= problem.target * size))
    flat = normal <= problem.eps * size
    gained = (c.residual <= (1 - problem.eps**0.5) * c.start[0]) | (normal <= c.start[1] / 2)
    exhausted = c.steps >= problem.max_steps
    closing = converged | flat | (fresh & ~gained) | exhausted | c.broken
    return closing, converged & ~c.broken


def _advanced(c: _Carry, fresh: Flag, known: Flag) -> tuple[_Carry, Scalar]:
    """x_{k−1} from α_k and β_k, and θ_k/ρ_{k−1}; where α_k is `known`."""
    moving = known & ~fresh
    new, step = c.bidiagonal.advanced(c.alpha, c.beta)
    new = tree.where(fresh, Bidiagonal.begun(c.alpha, c.beta), new)
    h_bar = tree.axpy(-step.h_bar, c.h_bar, c.h)
    moved = c._replace(
        x=tree.where(moving, tree.axpy(step.x, h_bar, c.x), c.x),
        h_bar=tree.where(moving, h_bar, tree.zeros_like(h_bar)),
        bidiagonal=tree.where(known, new, c.bidiagonal),
        residual=jnp.where(moving, step.residual, c.residual),
    )
    return moved, jnp.where(moving, step.h, jnp.zeros_like(step.h))


def _result(problem: _Problem, end: _Carry) -> lx.RESULTS:
    where, results = lx.RESULTS.where, lx.RESULTS
    exhausted = end.steps >= problem.max_steps
    failed = where(exhausted, results.max_steps_reached, results.stagnation)
    failed = where(end.broken, results.breakdown, failed)
    return where(end.converged, results.successful, failed)

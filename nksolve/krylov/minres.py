"""MINRES."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree

from .. import tree
from ..precondition.base import AbstractPreconditioner, Identity
from ..typing import Count, Flag, Scalar, ScalarLike, Vector
from .short_recurrence import AbstractShortRecurrence, Context, Progress

# With ρ = ‖A r‖/(‖A‖ ‖r‖), nothing is left to gain where ρ ≤ 10 ε. Rounding keeps ρ from falling
# much below √ε when b is not in the range of A, and then lets it, and x, grow: so many iterations
# in sequence with ρ ≤ 10 √ε that hardly change ‖r‖ mean the same.
_IDLE = 3


class _Lanczos(NamedTuple):
    """Iteration k of A z_k = γ_{k+1} u_{k+1} + δ_k u_k + γ_k u_{k−1}, z_k = M⁻¹u_k, and its QR.

    ⟨u_j, z_k⟩ = 1 for j = k, 0 otherwise. Rotations are (c, s), `previous` ones of k − 1.
    """

    u: Vector
    previous_u: Vector
    z: Vector | None  # `None` where it is u
    gamma: Scalar
    w: Vector  # column k of Z R⁻¹
    previous_w: Vector
    c: Scalar
    previous_c: Scalar
    s: Scalar
    previous_s: Scalar
    eta: Scalar  # last entry of the rotated right-hand side; |η| = ‖r‖ in the norm of M⁻¹
    largest: Scalar  # of the columns of the tridiagonal matrix: at most ‖A‖
    idle: Count  # iterations in sequence without effect
    norm: Scalar  # ‖x‖
    sign: Scalar  # of M⁻¹: it is taken as its positive definite multiple


class MINRES(AbstractShortRecurrence):
    """MINRES for Hermitian A x = b, which may be indefinite, and singular where b is in its range.

    Minimises ‖b − A x_k‖ over x₀ + M⁻¹K_k(A M⁻¹, r₀) by the Lanczos process and a QR factorisation
    of its tridiagonal matrix. Without preconditioner the norm is the 2-norm. With one, which must
    be Hermitian and definite, of either sign, it is √|rᴴM⁻¹r|; r itself is carried along by a
    recurrence, and what is tested against atol + rtol ‖b‖ is its 2-norm, ‖r_k‖₂, also then.

    A must be Hermitian. Of a real A a tag has to promise it (`lx.symmetric_tag`, or one of
    semidefiniteness); nothing looks at values. (A complex A that is only real-linear must be
    symmetric with respect to Re⟨v, w⟩.)

    **Arguments:**

    - `rtol`, `atol`: tolerances of a solve by `lx.linear_solve` and of the adjoint. Newton passes
      its forcing term instead.
    - `max_steps`: at most this many iterations in all; 10 n by default.
    - `preconditioner`: see `nks.AbstractPreconditioner`; its M⁻¹ must be Hermitian and definite.

    Reports `max_steps_reached`; `stagnation` where A r vanishes to rounding but r does not (A is
    singular, b not in its range: x is a least-squares solution, of ‖r‖₂ without preconditioner) or
    the tolerance is below the rounding level; `breakdown` where A v or M⁻¹v is not finite or M⁻¹
    is not definite, with the x of the iteration before.

    Storage: b, x, r, two Lanczos vectors, two search directions: 7 vectors, and one more with a
    preconditioner; what A and M⁻¹ return comes on top. Work: one matvec, one application of M⁻¹ and
    four reductions an iteration; one application more in each round.

    Source: Paige & Saunders, SIAM J. Numer. Anal. 12(4), 1975, section 6; preconditioned: Elman,
    Silvester & Wathen, Finite Elements and Fast Iterative Solvers, 2nd ed., algorithm 4.1;
    ‖A r‖: Choi, Paige & Saunders, SIAM J. Sci. Comput. 33(4), 2011.
    """

    rtol: ScalarLike = 1e-6
    atol: ScalarLike = 0.0
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: AbstractPreconditioner = Identity()

    @property
    def needs_symmetry(self) -> bool:
        return True

    def begin(self, context: Context, progress: Progress) -> tuple[Progress, PyTree]:
        r = progress.r
        z = context.solve(r)
        square = tree.vdot(r, z).real
        sign = jnp.where(square < 0, -jnp.ones_like(square), jnp.ones_like(square))
        square = sign * square
        progress = progress.worked(applications=1)
        progress = _checked(progress, square > 0, jnp.zeros_like(progress.broken))
        gamma = jnp.sqrt(jnp.where(square > 0, square, 1))
        nothing, no, one = tree.zeros_like(r), jnp.zeros_like(gamma), jnp.ones_like(gamma)
        return progress, _Lanczos(
            u=tree.scale(1 / gamma, r),
            previous_u=nothing,
            z=tree.scale(sign / gamma, z) if context.preconditioned else None,
            gamma=gamma,
            w=nothing,
            previous_w=nothing,
            c=one,
            previous_c=one,
            s=no,
            previous_s=no,
            eta=gamma,
            largest=no,
            idle=jnp.zeros_like(progress.num_steps),
            norm=context.norm(progress.x),
            sign=sign,
        )

    def advance(
        self, context: Context, progress: Progress, memory: _Lanczos
    ) -> tuple[Progress, PyTree]:
        u, gamma, c, s = memory.u, memory.gamma, memory.c, memory.s
        z = u if memory.z is None else memory.z
        q = context.mv(z)
        delta = tree.vdot(z, q).real
        # γ_{k+1} u_{k+1} = A z_k − δ_k u_k − γ_k u_{k−1}
        t = tree.axpy(-gamma, memory.previous_u, tree.axpy(-delta, u, q))
        y = context.solve(t)
        square = memory.sign * tree.vdot(t, y).real
        below = jnp.sqrt(jnp.maximum(square, 0))
        # Column k of the tridiagonal matrix, (γ_k, δ_k, γ_{k+1}), under the rotations before.
        third, second = memory.previous_s * gamma, s * delta + memory.previous_c * c * gamma
        diagonal = c * delta - memory.previous_c * s * gamma
        largest = jnp.maximum(memory.largest, jnp.sqrt(gamma**2 + delta**2 + square))
        length = jnp.hypot(diagonal, below)
        new_c, new_s = diagonal / length, below / length
        # ‖A r_{k−1}‖ = ‖r_{k−1}‖ √(diagonal² + (c γ_{k+1})²), in the norm of M⁻¹.
        rho, eps = jnp.hypot(diagonal, c * below) / largest, context.eps
        idle = (rho <= 10 * eps**0.5) & (new_c**2 <= 100 * eps)
        idle = jnp.where(idle, memory.idle + 1, 0)
        stationary = ~(rho > 10 * eps) | (idle >= _IDLE)
        eta = -new_s * memory.eta
        w = tree.axpy(-third, memory.previous_w, tree.axpy(-second, memory.w, z))
        w = tree.scale(1 / length, w)
        next_u = tree.scale(_reciprocal(below), t)
        x = tree.axpy(new_c * memory.eta, w, progress.x)
        r = tree.axpy(new_s**2, progress.r, tree.scale(new_c * eta, next_u))
        fine = jnp.isfinite(square) & jnp.isfinite(delta) & (square >= 0)
        # x would leap along a null vector: ε ‖A‖ ‖x‖, by which r may be off b − A x, nears ‖r‖.
        norm = context.norm(x)
        drifts = eps * largest * norm > 0.1 * progress.residual
        stationary = stationary | (drifts & (norm > 10 * memory.norm))
        moves = fine & ~stationary
        r = tree.where(moves, r, progress.r)
        progress = progress._replace(
            x=tree.where(moves, x, progress.x), r=r, residual=context.norm(r)
        )
        progress = _checked(progress, fine, stationary)
        return progress.worked(steps=1, matvecs=1, applications=1), _Lanczos(
            u=next_u,
            previous_u=u,
            z=None if memory.z is None else tree.scale(memory.sign * _reciprocal(below), y),
            gamma=below,
            w=w,
            previous_w=memory.w,
            c=new_c,
            previous_c=c,
            s=new_s,
            previous_s=s,
            eta=eta,
            largest=largest,
            idle=idle,
            norm=norm,
            sign=memory.sign,
        )


def _checked(progress: Progress, fine: Flag, stationary: Flag) -> Progress:
    """Ends a solve that broke down, or whose residual A maps to zero."""
    return progress._replace(broken=~fine, final=~fine | stationary)


def _reciprocal(a: Scalar) -> Scalar:
    """1/a, or 0 for zero: an invariant space, which holds the solution."""
    return jnp.where(a > 0, 1 / jnp.where(a > 0, a, 1), 0)

"""TFQMR, the transpose-free quasi-minimal residual method."""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .. import tree
from ..precondition.base import AbstractPreconditioner, Identity
from ..typing import Flag, Scalar, ScalarLike, Vector
from .shadow import shadow_residual
from .short_recurrence import AbstractShortRecurrence, Context, Progress


class _Memory(NamedTuple):
    shadow: Vector  # r̃
    threshold: Scalar  # ε ‖r̃‖
    w: Vector  # residual of the iterate that is smoothed (CGS, and half-way between)
    y: Vector  # direction
    v: Vector  # A M⁻¹ y, summed as v_n of the paper
    d: Vector  # direction of x
    rho: Array
    alpha: Array
    beta: Array
    tau: Scalar  # quasi-residual norm
    weight: Array  # θ² η
    odd: Flag  # the first of a pair of steps


class TFQMR(AbstractShortRecurrence):
    """TFQMR for square, nonsymmetric A x = b, preconditioned on the right.

    Builds the space of conjugate gradients squared and takes in it the iterate of least
    quasi-residual: the coefficients of the residual in a scaled basis, whose norm falls
    monotonically. The residual itself falls nearly as smoothly. It is carried along as

        r_m = r_{m−1} + c_m² (w_{m+1} − r_{m−1})

    which costs no matvec, and its norm is tested, not the bound √(m + 1) τ_m of the paper.

    **Arguments:**

    - `rtol`, `atol`: tolerances of a solve by `lx.linear_solve` and of the adjoint. Newton passes
      its forcing term instead.
    - `max_steps`: at most this many steps, of one matvec each; 10 n by default.
    - `preconditioner`: see `nks.AbstractPreconditioner`.

    After a breakdown (an inner product that is zero to rounding, relative to its factors) it goes
    on from where it is with a new r̃, `num_restarts` counts how often, and reports `breakdown`
    where that does not help. Reports `max_steps_reached`, `stagnation`, and `breakdown` also where
    A v is not finite.

    Storage: r̃, x, r, w, y, v, d, b, and x and r of the round's start: 10, and 2 more within a step.
    Work: one matvec, one preconditioner application and four reductions a step.

    Source: Freund, SIAM J. Sci. Comput. 14(2), 1993, algorithm 5.1; the residual: Zhou & Walker,
    SIAM J. Sci. Comput. 15(2), 1994.
    """

    rtol: ScalarLike = 1e-6
    atol: ScalarLike = 0.0
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: AbstractPreconditioner = Identity()

    fruitless_rounds: ClassVar[int] = 2

    def begin(self, context: Context, progress: Progress) -> tuple[Progress, PyTree]:
        r = progress.r
        shadow = shadow_residual(context, progress)
        rho = context.dot(shadow, r)
        zero = jnp.zeros_like(rho)
        return progress, _Memory(
            shadow=shadow,
            threshold=context.eps * context.norm(shadow),
            w=r,
            y=r,
            v=tree.zeros_like(r),
            d=tree.zeros_like(r),
            rho=rho,
            alpha=jnp.ones_like(rho),
            beta=zero,
            tau=progress.residual,
            weight=zero,
            odd=jnp.ones_like(progress.broken),
        )

    def advance(
        self, context: Context, progress: Progress, memory: _Memory
    ) -> tuple[Progress, _Memory]:
        shadow, odd, y = memory.shadow, memory.odd, memory.y
        z = context.solve(y)
        image = context.mv(z)
        first_v = tree.axpy(memory.beta, memory.v, image)  # v_n, at the first of a pair
        alpha = jnp.where(odd, memory.rho / context.dot(shadow, first_v), memory.alpha)
        w = tree.axpy(-alpha, image, memory.w)
        size = context.norm(w)
        theta = size / memory.tau
        cosine2 = 1 / (1 + theta**2)
        eta = cosine2.astype(alpha.dtype) * alpha
        d = tree.axpy(memory.weight / alpha, memory.d, z)
        # r_m − r_{m−1} = c² (w_{m+1} − r_{m−1})
        r = tree.axpy(cosine2, tree.sub(w, progress.r), progress.r)
        rho = context.dot(shadow, w)
        # ⟨r̃, v⟩ ≈ 0 makes α v as large as this.
        sound = memory.threshold * size < jnp.where(odd, jnp.abs(memory.rho), jnp.inf)
        usable = odd | (jnp.abs(rho) > memory.threshold * size)
        beta = jnp.where(odd, memory.beta, rho / memory.rho)
        new = _Memory(
            shadow=shadow,
            threshold=memory.threshold,
            w=w,
            y=tree.where(odd, tree.axpy(-alpha, first_v, y), tree.axpy(beta, y, w)),
            v=tree.where(odd, first_v, tree.axpy(beta, memory.v, image)),
            d=d,
            rho=jnp.where(odd, memory.rho, rho),
            alpha=alpha,
            beta=beta,
            tau=memory.tau * theta * jnp.sqrt(cosine2),
            weight=(theta**2).astype(eta.dtype) * eta,
            odd=~odd,
        )
        x = tree.where(sound, tree.axpy(eta, d, progress.x), progress.x)
        r = tree.where(sound, r, progress.r)
        progress = progress._replace(
            x=x, r=r, residual=context.norm(r), broken=~(sound & usable)
        ).worked(steps=1, matvecs=1, applications=1)
        return progress, new

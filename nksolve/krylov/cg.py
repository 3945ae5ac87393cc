"""CG, and its truncation at the boundary of a trust region."""

from typing import NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import PyTree

from .. import tree
from ..precondition.base import AbstractPreconditioner, Identity
from ..typing import Count, Flag, Scalar, ScalarLike, Vector
from .short_recurrence import AbstractShortRecurrence, Context, Progress, at_guess, reason, scaled
from .system import LinearSystem


class SteihaugResult(NamedTuple):
    """What `CG.steihaug` returns.

    `predicted_decrease` is m(0) − m(value) ≥ 0, `direction` the unit vector along which negative
    (or vanishing) curvature was met, 0 where it was not.
    """

    value: Vector
    residual_norm: Scalar
    on_boundary: Flag
    negative_curvature: Flag
    direction: Vector
    predicted_decrease: Scalar
    result: lx.RESULTS
    num_steps: Count
    num_matvecs: Count
    num_preconditioner_applications: Count


class _Region(NamedTuple):
    """A trust region, and the model m(x) = ½⟨x, A x⟩ − ⟨b, x⟩ in it."""

    radius: Scalar
    decrease: Scalar  # m(0) − m(x)
    on_boundary: Flag


class _Directions(NamedTuple):
    """What iteration k leaves to the next."""

    p: Vector
    rz: Scalar  # ⟨r_k, M⁻¹r_k⟩, before the step; infinite at the start
    rr: Scalar  # ⟨r_{k+1}, r_{k+1}⟩, after it
    length: Scalar  # ⟨p, M p⟩
    largest: Scalar  # |⟨p, A p⟩| / ⟨p, M p⟩ so far; 0 at the start
    sign: Scalar  # of ⟨p, A p⟩ / ⟨r, M⁻¹r⟩; 0 at the start
    turned: Flag  # that sign changed, or the curvature vanished
    region: _Region | None


class CG(AbstractShortRecurrence):
    """Preconditioned conjugate gradients for Hermitian definite A x = b.

    Minimises the A-norm of the error over x₀ + M⁻¹K_k(A M⁻¹, r₀); leaves as soon as
    ‖r_k‖₂ ≤ atol + rtol ‖b‖, r_k by its recurrence. A may be positive or negative definite: the
    step α = ⟨r, M⁻¹r⟩/⟨p, A p⟩ has the right sign by itself. What is not allowed is that the sign
    changes: a direction p in which ⟨p, A p⟩ has another sign than in the first is *negative
    curvature*, and A is indefinite.

    A and M⁻¹ must be Hermitian. Of a real A a tag has to promise it (`lx.symmetric_tag`, or one of
    semidefiniteness); nothing looks at values. (A complex A that is only real-linear must be
    symmetric with respect to Re⟨v, w⟩.)

    **Arguments:**

    - `rtol`, `atol`: tolerances of a solve by `lx.linear_solve` and of the adjoint. Newton passes
      its forcing term instead.
    - `max_steps`: at most this many iterations in all; 10 n by default.
    - `preconditioner`: see `nks.AbstractPreconditioner`; its M⁻¹ must be Hermitian and definite.

    Reports `max_steps_reached`; `stagnation` where the tolerance is below the rounding level;
    `breakdown` at negative curvature, at curvature that vanishes to rounding (A is singular), where
    M⁻¹ is not definite, and where A v or M⁻¹v is not finite. After a breakdown x is the iterate
    before it.

    Storage: b, x, r, p: 4 vectors; what A and M⁻¹ return comes on top. Work: one matvec, one
    application of M⁻¹ and two reductions (three with M⁻¹) an iteration.

    Source: Hestenes & Stiefel, J. Res. Nat. Bur. Standards 49(6), 1952; Saad, Iterative Methods for
    Sparse Linear Systems, 2nd ed., algorithm 9.1.
    """

    rtol: ScalarLike = 1e-6
    atol: ScalarLike = 0.0
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: AbstractPreconditioner = Identity()

    @property
    def needs_symmetry(self) -> bool:
        return True

    def steihaug(
        self,
        system: LinearSystem,
        vector: Vector,
        *,
        radius: ScalarLike,
        tolerance: ScalarLike,
    ) -> SteihaugResult:
        """Decreases m(x) = ½⟨x, A x⟩ − ⟨b, x⟩ in ‖x‖₂ ≤ radius, b = `vector`, by truncated CG.

        A is Hermitian, of any inertia; M⁻¹, if there is one, positive definite. Goes along the path
        of CG from x = 0 until ‖b − A x‖₂ ≤ `tolerance` (absolute), or to the boundary: where the
        path leaves the region, or in the first direction of curvature that is not positive. m
        decreases along the path, and without preconditioner ‖x‖ grows, so that the decrease is at
        least that at the Cauchy point.

        **Arguments:**

        - `radius`: Δ > 0, in the 2-norm also with a preconditioner; may be infinite.
        - `tolerance`: of the residual, absolute, as in `solve`.

        **Returns:** `SteihaugResult`; its `result` is `successful` where the residual is small
        enough or x is on the boundary. `breakdown` is a non-finite number, an M⁻¹ that is not
        positive definite, or curvature that is not positive in an infinite region, and x is the
        iterate before it.

        **Raises:** `ValueError` for a radius known not to be positive.

        Work: as `solve`, and three reductions an iteration more.

        Source: Steihaug, SIAM J. Numer. Anal. 20(3), 1983; Toint, Towards an efficient sparsity
        exploiting Newton method for minimization, 1981; Conn, Gould & Toint, Trust-Region Methods,
        SIAM 2000, algorithm 7.5.1.
        """
        if isinstance(radius, int | float) and not radius > 0:
            raise ValueError(f"`radius` must be positive, but it is {radius}.")
        context, b, size, unit = scaled(system, vector, None, tolerance)
        start = at_guess(context, b, size, None, unit)
        progress, memory = self.begin(context, start)
        no, one = jnp.zeros_like(size), jnp.ones_like(size)
        region = _Region(
            jnp.asarray(radius).astype(size.dtype) / unit, no, jnp.zeros_like(start.broken)
        )
        memory = memory._replace(region=region, sign=one)
        max_steps = self.most_steps(vector)
        progress, memory = self.iterate(context, progress, memory, max_steps)
        bounded = memory.region.on_boundary
        length = context.norm(memory.p)
        along = jnp.where(memory.turned, 1 / jnp.where(length > 0, length, one), no)
        where, results = lx.RESULTS.where, lx.RESULTS
        none = jnp.zeros_like(progress.num_steps)
        return SteihaugResult(
            value=tree.scale(unit, progress.x),
            residual_norm=progress.residual * unit,
            on_boundary=bounded,
            negative_curvature=memory.turned,
            direction=tree.scale(along, tree.where(memory.turned, memory.p, tree.zeros_like(b))),
            predicted_decrease=memory.region.decrease * unit**2,
            result=where(bounded, results.successful, reason(progress, context.target, max_steps)),
            num_steps=progress.num_steps,
            num_matvecs=progress.num_matvecs,
            num_preconditioner_applications=(
                progress.num_applications if context.preconditioned else none
            ),
        )

    def begin(self, context: Context, progress: Progress) -> tuple[Progress, _Directions]:
        rr = tree.vdot(progress.r, progress.r).real
        no = jnp.zeros_like(rr)
        return progress, _Directions(
            p=tree.zeros_like(progress.r),
            rz=jnp.full_like(rr, jnp.inf),
            rr=rr,
            length=no,
            largest=no,
            sign=no,
            turned=jnp.zeros_like(progress.broken),
            region=None,
        )

    def advance(
        self, context: Context, progress: Progress, memory: _Directions
    ) -> tuple[Progress, PyTree]:
        z = context.solve(progress.r)
        rz = tree.vdot(progress.r, z).real if context.preconditioned else memory.rr
        beta = rz / memory.rz  # 0 in the first iteration
        p = tree.axpy(beta, memory.p, z)
        q = context.mv(p)
        pq = tree.vdot(p, q).real
        length = jnp.abs(rz) + beta**2 * memory.length  # ⟨p_{k−1}, r_k⟩ = 0
        curvature = jnp.abs(pq) / length
        # In the first iteration there is nothing yet to compare with but ‖A p‖ ‖p‖.
        largest = lax.cond(
            memory.largest > 0,
            lambda: memory.largest,
            lambda: context.norm(p) * context.norm(q) / length,
        )
        largest = jnp.maximum(largest, curvature)
        sign = jnp.sign(pq) * jnp.sign(rz)
        turned = (sign * memory.sign < 0) | (curvature <= context.eps * largest)
        fine = jnp.isfinite(pq) & jnp.isfinite(rz) & (rz != 0) & (beta >= 0)
        turned = turned & fine
        step, final, region = rz / pq, turned, memory.region
        if region is None:
            fine = fine & ~turned
        else:
            fine = fine & (rz > 0)
            boundary = _to_boundary(progress.x, p, region.radius)
            final = turned | (step >= boundary)
            step = jnp.where(final, boundary, step)
            fine = fine & jnp.isfinite(step)
            decrease = step * (rz - step * pq / 2)
            region = _Region(
                radius=region.radius,
                decrease=region.decrease + jnp.where(fine, decrease, 0),
                on_boundary=final & fine,
            )
        r = tree.where(fine, tree.axpy(-step, q, progress.r), progress.r)
        rr = tree.vdot(r, r).real
        progress = progress._replace(
            x=tree.where(fine, tree.axpy(step, p, progress.x), progress.x),
            r=r,
            residual=jnp.sqrt(rr),
            broken=~fine,
            final=final | ~fine,
        ).worked(steps=1, matvecs=1, applications=1)
        return progress, _Directions(p, rz, rr, length, largest, sign, turned, region)


def _to_boundary(x: Vector, p: Vector, radius: Scalar) -> Scalar:
    """τ ≥ 0 with ‖x + τ p‖ = radius, for x inside; infinite where the radius is."""
    a = tree.vdot(p, p).real / radius / radius
    b = tree.vdot(x, p).real / radius / radius
    c = jnp.maximum(1 - tree.vdot(x, x).real / radius / radius, 0)
    root = jnp.sqrt(b**2 + a * c)  # a τ² + 2 b τ − c = 0
    return jnp.where(b >= 0, c / (b + root), (root - b) / a)

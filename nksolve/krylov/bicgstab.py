"""BiCGStab and BiCGstab(ℓ)."""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax.lax as lax
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
    direction: Vector  # û₀
    rho: Array  # ⟨r̃, r⟩


class BiCGStab(AbstractShortRecurrence):
    """BiCGstab(ℓ) for square, nonsymmetric A x = b, preconditioned on the right.

    ℓ steps of bi-conjugate gradients make the residual orthogonal to a Krylov space of (A M⁻¹)ᴴ,
    then a polynomial of degree ℓ in A M⁻¹ makes it small:
    min ‖r̂₀ − Σ_j γ_j (A M⁻¹)^j r̂₀‖₂, j = 1, …, ℓ. The residual that is tested is that of A x = b,
    and it need not fall monotonically.

    **Arguments:**

    - `rtol`, `atol`: tolerances of a solve by `lx.linear_solve` and of the adjoint. Newton passes
      its forcing term instead.
    - `max_steps`: at most this many steps (of two matvecs each, ℓ at a time); 10 n by default.
    - `preconditioner`: see `nks.AbstractPreconditioner`.
    - `ell`: ℓ; 1 is BiCGStab. Take 2 where eigenvalues of A M⁻¹ lie near the imaginary axis, on
      which the real polynomials of degree 1 stand still.

    A solve leaves at the half of a step where the residual is small enough there. After a
    breakdown (an inner product that is zero to rounding, relative to its factors) it goes on from
    where it is with a new r̃, `num_restarts` counts how often, and reports `breakdown` where that
    does not help. Reports `max_steps_reached`, `stagnation`, and `breakdown` also where A v is not
    finite.

    Storage: r̃, x, r, one direction, b, and x and r of the round's start: 7; within a step 2 more
    for ℓ = 1, for ℓ = 2 6 (8 with a preconditioner). Work: two matvecs, two preconditioner
    applications and six (ℓ = 2: seven) reductions a step.

    Source: van der Vorst, SIAM J. Sci. Stat. Comput. 13(2), 1992; Sleijpen & Fokkema, ETNA 1, 1993,
    algorithm 3.1.
    """

    rtol: ScalarLike = 1e-6
    atol: ScalarLike = 0.0
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: AbstractPreconditioner = Identity()
    ell: int = eqx.field(static=True, default=1)

    fruitless_rounds: ClassVar[int] = 2

    def __check_init__(self):
        if self.ell < 1:
            raise ValueError(f"`ell` must be at least 1, but it is {self.ell}.")

    def begin(self, context: Context, progress: Progress) -> tuple[Progress, PyTree]:
        shadow = shadow_residual(context, progress)
        rho = context.dot(shadow, progress.r)
        return progress, _Memory(shadow, context.eps * context.norm(shadow), progress.r, rho)

    def advance(
        self, context: Context, progress: Progress, memory: _Memory
    ) -> tuple[Progress, _Memory]:
        shadow, rho = memory.shadow, memory.rho
        x, size = progress.x, progress.residual
        # û_i = (A M⁻¹)^i û₀, r̂_i = (A M⁻¹)^i r̂₀; of those before the last, M⁻¹ times them.
        u, inverse_u = [memory.direction], []
        r, inverse_r = [progress.r], []
        alpha = jnp.ones_like(rho)
        matvecs = jnp.zeros_like(progress.num_matvecs)
        go, intact = jnp.array(True), jnp.array(True)

        def apply(v: Vector) -> tuple[Vector, Vector]:
            z = context.solve(v)
            return z, context.mv(z)

        def apply_if(go: Flag, v: Vector) -> tuple[Vector, Vector]:
            return lax.cond(go, lambda: apply(v), lambda: (v, v))

        for j in range(self.ell):
            if j > 0:
                rho_before, rho = rho, context.dot(shadow, r[j])
                beta = alpha * rho / rho_before
                u = [tree.axpy(-beta, a, b) for a, b in zip(u, r, strict=True)]
                inverse_u = [
                    tree.axpy(-beta, a, b) for a, b in zip(inverse_u, inverse_r, strict=True)
                ]
            z, image = apply(u[j]) if j == 0 else apply_if(go, u[j])
            matvecs = matvecs + tree.count(go)
            inverse_u, u = [*inverse_u, z], [*u, image]
            alpha = rho / context.dot(shadow, image)
            new = [tree.axpy(-alpha, a, b) for a, b in zip(u[1:], r, strict=True)]
            new_size = context.norm(new[0])
            last_size = new_size if j == 0 else context.norm(new[j])
            # ρ ≈ 0 leaves nothing to divide by; ⟨r̃, û⟩ ≈ 0 makes the new residual as large as this.
            sound = memory.threshold * last_size < jnp.abs(rho)
            moved = go & sound
            x = tree.where(moved, tree.axpy(alpha, inverse_u[0], x), x)
            r = [tree.where(moved, new[0], r[0]), *new[1:]]
            size = jnp.where(moved, new_size, size)
            inverse_r = [
                tree.axpy(-alpha, a, b) for a, b in zip(inverse_u[1:], inverse_r, strict=True)
            ]
            intact = intact & (sound | ~go)
            go = moved & (size > context.target)
            z, image = apply_if(go, r[j])
            matvecs = matvecs + tree.count(go)
            inverse_r, r = [*inverse_r, z], [*r, image]

        gammas, reduced, effective = _minimise(context, r, size)
        for gamma, z in zip(gammas, inverse_r, strict=True):
            x = tree.where(go, tree.axpy(gamma, z, x), x)
        residual = tree.where(go, reduced, r[0])
        direction = u[0]
        for gamma, a in zip(gammas, u[1:], strict=True):
            direction = tree.axpy(-gamma, a, direction)
        size = jnp.where(go, context.norm(residual), size)
        rho_before, rho = rho, context.dot(shadow, residual)
        beta = alpha * rho / (gammas[-1] * rho_before)
        direction = tree.axpy(beta, direction, residual)
        usable = effective & (jnp.abs(rho) > memory.threshold * size)
        progress = Progress(
            x=x,
            r=residual,
            residual=size,
            num_steps=progress.num_steps + self.ell,
            num_matvecs=progress.num_matvecs + matvecs,
            num_applications=progress.num_applications + matvecs,
            broken=~intact | (go & ~usable),
            final=progress.final,
        )
        return progress, memory._replace(direction=direction, rho=rho)


def _minimise(context: Context, r: list[Vector], size: Scalar) -> tuple[list[Array], Vector, Flag]:
    """(γ, r̂₀ − Σ γ_j r̂_j, whether γ_ℓ is nonzero): the least one, by modified Gram–Schmidt."""
    degree = len(r) - 1
    residual, rows, squares, taus, primes = r[0], [], [], [], []
    effective = jnp.array(True)
    for j in range(1, degree + 1):
        row, tau = r[j], []
        before = tree.vdot(row, row).real if j > 1 else None
        for i in range(j - 1):
            product = context.dot(rows[i], row)
            tau.append(product / squares[i].astype(product.dtype))
            row = tree.axpy(-tau[i], rows[i], row)
        square = tree.vdot(row, row).real
        independent = square > 0
        if before is not None:
            independent = square > (10 * context.eps) ** 2 * before
        product = context.dot(row, residual)
        square = jnp.where(independent, square, jnp.ones_like(square))
        prime = jnp.where(independent, product / square.astype(product.dtype), 0)
        effective = independent & (jnp.abs(product) > context.eps * jnp.sqrt(square) * size)
        squares.append(square)
        rows.append(row)
        taus.append(tau)
        primes.append(prime)
    for row, prime in zip(rows, primes, strict=True):
        residual = tree.axpy(-prime, row, residual)
    gammas = list(primes)
    for j in reversed(range(degree)):
        for i in range(j + 1, degree):
            gammas[j] = gammas[j] - taus[i][j] * gammas[i]
    return gammas, residual, effective

"""The hookstep: the best step of bounded length in the Krylov space that is there."""

from typing import NamedTuple

import jax.lax as lax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jaxtyping import Array, Float, Inexact

from .. import tree
from ..krylov.base import AbstractKrylovSolver
from ..krylov.basis import Basis, gram
from ..krylov.cycle import Workspace
from ..krylov.fgmres import FGMRES
from ..krylov.gmres import GMRES
from ..precondition.base import Identity
from ..typing import Flag, Scalar, Vector
from .globalisation import Model
from .trust_region import AbstractTrustRegion, Step

#: Halvings of the interval of log μ.
_HALVINGS = 50


class _Space(NamedTuple):
    """A Z = V H̄ with H̄ R⁻¹ = U Σ Wᴴ, where ‖Z y‖ = ‖R y‖: everything in units of ‖F‖."""

    basis: Basis  # Z
    to_basis: Inexact[Array, "m m"]  # R⁻¹ W
    sigma: Float[Array, " m"]
    rhs: Inexact[Array, " m"]  # Uᴴ e₁
    norm: Scalar  # ‖F‖
    full: Scalar  # ‖d‖
    full_norm: Scalar  # ‖F + J d‖/‖F‖
    usable: Flag  # whether d lies in the space


class Hookstep(AbstractTrustRegion):
    """min ‖F + J s‖ over the s of the Krylov space with ‖s‖ ≤ radius.

    With the Arnoldi relation J Z = V H̄ of the linear solve, s = Z y and ‖F + J s‖ = ‖β e₁ − H̄ y‖:
    a problem of the size of the space, solved through the singular values of H̄,
    y(μ) = (H̄ᴴH̄ + μ RᴴR)⁻¹ H̄ᴴ β e₁ with ‖Z y‖ = ‖R y‖, μ by bisection. No product with J or Jᵀ, and
    a rejected trial takes another μ. It is the Levenberg–Marquardt step within that space.

    Needs the basis: `nks.GMRES` without preconditioner or `nks.FGMRES`. After a restart only the
    basis of the last cycle exists, which does not hold d: the step is then d shortened to the
    radius. Choose `restart` so that a solve rarely needs a second cycle.

    **Arguments:** as `nks.Dogleg`.

    Storage: m vectors (Z). Work: a Gram matrix of Z (m² inner products in one pass) and an SVD of
    (m + 1) × m for each direction; one combination of m vectors a trial.

    Source: Dennis & Schnabel, Numerical Methods for Unconstrained Optimization and Nonlinear
    Equations, SIAM 1996, §6.4.1; in the Krylov space Viswanath, J. Fluid Mech. 580, 2007; radius:
    Nocedal & Wright, Numerical Optimization, 2nd ed., algorithm 4.1.
    """

    initial_radius: float = 1.0
    accept: float = 1e-3
    min_radius: float = 1e-12
    max_trials: int = 40

    def check(self, linear_solver: AbstractKrylovSolver) -> None:
        plain = isinstance(linear_solver.preconditioner, Identity)
        if isinstance(linear_solver, GMRES if plain else FGMRES):
            return
        raise ValueError(
            "`Hookstep` needs the search directions of an Arnoldi process: `linear_solver=` must "
            "be `nks.GMRES()` without a preconditioner or `nks.FGMRES(preconditioner=...)`, but it "
            f"is {type(linear_solver).__name__} with preconditioner "
            f"{type(linear_solver.preconditioner).__name__}. `nks.Dogleg` goes with all of them."
        )

    def nothing(self, variables: Vector, norm: Scalar, workspace: Workspace) -> _Space:
        matrix = workspace.record.matrix
        m = matrix.shape[1]
        real = jnp.zeros((m,), norm.dtype)
        zeros = jnp.zeros_like(norm)
        basis = tree.zeros_like(_searched(workspace))
        to_basis, rhs = jnp.zeros((m, m), matrix.dtype), jnp.zeros((m,), matrix.dtype)
        return _Space(basis, to_basis, real, rhs, zeros, zeros, zeros, jnp.array(False))

    def subspace(self, model: Model) -> _Space:
        workspace, norm = model.workspace, model.norm
        record = workspace.record
        m = record.matrix.shape[1]
        basis = _searched(workspace)
        inside = jnp.arange(m, dtype=jnp.int32) < record.columns
        both = inside[:, None] & inside[None, :]
        rows = basis.head(m)
        products = gram(rows, rows, real=basis.real)
        eye = jnp.eye(m, dtype=products.dtype)
        r = jnp.linalg.cholesky(jnp.where(both, products, eye)).conj().T
        inverse = jsl.solve_triangular(r, eye)
        u, sigma, wh = jnp.linalg.svd(record.matrix @ inverse, full_matrices=False)
        first = u[0].conj()
        usable = (model.num_restarts == 0) & (record.columns > 0) & jnp.isfinite(sigma).all()
        return _Space(
            basis,
            inverse @ wh.conj().T,
            sigma.astype(norm.dtype),
            first,
            norm,
            tree.norm2(model.direction.vector).astype(norm.dtype),
            model.direction.residual,
            usable,
        )

    def step(self, subspace: _Space, radius: Scalar) -> Step:
        s = subspace
        inside = s.full <= radius
        mu = _multiplier(s, radius)
        weights = jnp.abs(s.rhs).astype(s.norm.dtype)
        left = weights * mu / (s.sigma**2 + mu)
        square = jnp.maximum(1 - jnp.sum(weights**2), 0) + jnp.sum(left**2)
        # d shortened: ‖F + λ J d‖ ≤ (1 − λ) ‖F‖ + λ ‖F + J d‖.
        length = jnp.minimum(radius / s.full, 1)
        shortened = 1 - length + length * s.full_norm
        promised = jnp.where(s.usable, jnp.sqrt(square), shortened)
        promised = jnp.where(inside, s.full_norm, promised)
        return Step(jnp.minimum(s.full, radius), s.full, promised, inside)

    def vector(self, subspace: _Space, radius: Scalar, direction: Vector) -> Vector:
        s = subspace
        mu = _multiplier(s, radius)
        w = (s.sigma / (s.sigma**2 + mu)).astype(s.rhs.dtype) * s.rhs
        y = s.to_basis @ w * s.norm.astype(s.rhs.dtype)
        y = jnp.pad(y, (0, s.basis.size - y.size))
        bent = s.basis.combine(y, jnp.asarray(s.basis.size, jnp.int32))
        shortened = tree.scale(jnp.minimum(radius / s.full, 1), direction)
        bent = tree.where(s.usable, bent, shortened)
        return tree.where(s.full <= radius, direction, bent)


def _searched(workspace: Workspace) -> Basis:
    """Z; V without its last vector where there is no preconditioner."""
    return workspace.arnoldi if workspace.search is None else workspace.search


def _multiplier(space: _Space, radius: Scalar) -> Scalar:
    """μ with ‖y(μ)‖ = radius, by bisection of log μ; nearly 0 where y(0) is shorter."""
    wanted = radius / space.norm
    weights = space.sigma * jnp.abs(space.rhs).astype(wanted.dtype)
    # ‖y(μ)‖ ≤ ‖Σ c‖/μ; and below the square of the round-off of Σ nothing changes.
    most = jnp.sqrt(jnp.sum(weights**2)) / wanted
    most = jnp.where(jnp.isfinite(most) & (most > 0), most, jnp.ones_like(most))
    tiny = jnp.finfo(wanted.dtype).eps ** 2 * jnp.max(space.sigma, initial=0) ** 2
    least = jnp.clip(tiny, jnp.finfo(wanted.dtype).tiny, most)

    def halved(_, bounds):
        low, high = bounds
        mu = jnp.sqrt(low) * jnp.sqrt(high)
        longer = jnp.sqrt(jnp.sum((weights / (space.sigma**2 + mu)) ** 2)) > wanted
        return jnp.where(longer, mu, low), jnp.where(longer, high, mu)

    return lax.fori_loop(0, _HALVINGS, halved, (least, most))[1]

"""The best step of bounded length in a space that a linear solve left."""

import abc
from typing import NamedTuple

import jax.lax as lax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float, Inexact

from ... import tree
from ...krylov.base import AbstractKrylovSolver
from ...krylov.basis import Basis, gram
from ...krylov.cycle import Workspace
from ...typing import Flag, Scalar, Vector
from .base import Model
from .trust_region import AbstractTrustRegion, Step

#: Halvings of the interval of log μ.
_HALVINGS = 50


class Bounded(NamedTuple):
    """min ‖F + J s‖ over s = Z y, ‖s‖ ≤ radius, where J Z = U B with orthonormal U.

    B is small, and U begins with −F/‖F‖. With RᴴR = ZᴴZ, so that ‖Z y‖ = ‖R y‖, and the singular
    values B R⁻¹ = P Σ Wᴴ: R y(μ) = W (Σ² + μ)⁻¹ Σ Pᴴe₁ ‖F‖ minimises ‖F + J s‖² + μ ‖s‖². All is
    in units of ‖F‖.
    """

    basis: Basis  # Z
    to_basis: Inexact[Array, "m m"]  # R⁻¹ W
    sigma: Float[Array, " m"]
    rhs: Inexact[Array, " m"]  # Pᴴ e₁
    norm: Scalar  # ‖F‖

    @staticmethod
    def nothing(workspace: Workspace, dtype: np.dtype) -> "Bounded":
        """A space of zeros."""
        matrix = workspace.record.matrix
        m = matrix.shape[1]
        return Bounded(
            tree.zeros_like(_searched(workspace)),
            jnp.zeros((m, m), matrix.dtype),
            jnp.zeros((m,), dtype),
            jnp.zeros((m,), matrix.dtype),
            jnp.zeros((), dtype),
        )

    @staticmethod
    def of(workspace: Workspace, norm: Scalar) -> "Bounded":
        """The space of the last cycle of a linear solve for −F, ‖F‖ = `norm`."""
        record = workspace.record
        m = record.matrix.shape[1]
        basis = _searched(workspace)
        inside = jnp.arange(m, dtype=jnp.int32) < record.columns
        both = inside[:, None] & inside[None, :]
        rows = basis.head(m)
        products = gram(rows, rows, real=basis.real).astype(record.matrix.dtype)
        eye = jnp.eye(m, dtype=products.dtype)
        r = jnp.linalg.cholesky(jnp.where(both, products, eye)).conj().T
        inverse = jsl.solve_triangular(r, eye)
        p, sigma, wh = jnp.linalg.svd(record.matrix @ inverse, full_matrices=False)
        to_basis = inverse @ wh.conj().T
        return Bounded(basis, to_basis, sigma.astype(norm.dtype), p[0].conj(), norm)

    @property
    def usable(self) -> Flag:
        """Whether there is a space, of full rank."""
        return jnp.isfinite(self.sigma).all() & (jnp.max(self.sigma, initial=0) > 0)

    def multiplier(self, radius: Scalar) -> Scalar:
        """μ with ‖s(μ)‖ = radius, by bisection of log μ; nearly 0 where s(0) is shorter."""
        wanted = radius / self.norm
        weights = self.sigma * self.weights
        # ‖s(μ)‖ ≤ ‖Σ c‖/μ; and below the square of the round-off of Σ nothing changes.
        most = jnp.sqrt(jnp.sum(weights**2)) / wanted
        most = jnp.where(jnp.isfinite(most) & (most > 0), most, jnp.ones_like(most))
        tiny = jnp.finfo(wanted.dtype).eps ** 2 * jnp.max(self.sigma, initial=0) ** 2
        least = jnp.clip(tiny, jnp.finfo(wanted.dtype).tiny, most)

        def halved(_, bounds):
            low, high = bounds
            mu = jnp.sqrt(low) * jnp.sqrt(high)
            longer = jnp.sqrt(jnp.sum((weights / (self.sigma**2 + mu)) ** 2)) > wanted
            return jnp.where(longer, mu, low), jnp.where(longer, high, mu)

        return lax.fori_loop(0, _HALVINGS, halved, (least, most))[1]

    @property
    def weights(self) -> Float[Array, " m"]:
        """|Pᴴe₁|."""
        return jnp.abs(self.rhs).astype(self.norm.dtype)

    def length(self, mu: Scalar) -> Scalar:
        """‖s(μ)‖."""
        return self.norm * jnp.sqrt(jnp.sum((self.sigma * self.weights / self._shifted(mu)) ** 2))

    def linear_norm(self, mu: Scalar) -> Scalar:
        """‖F + J s(μ)‖/‖F‖."""
        left = self.weights * mu / self._shifted(mu)
        return jnp.sqrt(jnp.maximum(1 - jnp.sum(self.weights**2), 0) + jnp.sum(left**2))

    def vector(self, mu: Scalar, like: Vector) -> Vector:
        """s(μ), in the dtypes of `like`."""
        w = (self.sigma / self._shifted(mu)).astype(self.rhs.dtype) * self.rhs
        y = self.to_basis @ w * self.norm.astype(self.rhs.dtype)
        y = jnp.pad(y, (0, self.basis.size - y.size))
        step = self.basis.combine(y, jnp.asarray(self.basis.size, jnp.int32))
        return tree.cast_like(step, like)

    def _shifted(self, mu: Scalar) -> Float[Array, " m"]:
        """Σ² + μ."""
        return self.sigma**2 + mu


def _searched(workspace: Workspace) -> Basis:
    """Z; V where there is no preconditioner."""
    return workspace.arnoldi if workspace.search is None else workspace.search


class Space(NamedTuple):
    """A space for steps, and the direction d."""

    bounded: Bounded
    full: Scalar  # ‖d‖
    full_norm: Scalar  # ‖F + J d‖/‖F‖
    usable: Flag


class AbstractBoundedStep(AbstractTrustRegion):
    """Trust regions whose step is d where that is short enough, otherwise the best of the space of
    the linear solve within the radius, or d shortened where that promises more."""

    def __check_init__(self):
        if not self.initial_radius > 0:
            raise ValueError(f"`initial_radius` must be positive, but it is {self.initial_radius}.")
        if not 0 <= self.accept < 0.25:
            raise ValueError(f"`accept` must lie in [0, 1/4), but it is {self.accept}.")

    @abc.abstractmethod
    def check(self, linear_solver: AbstractKrylovSolver) -> None:
        """Raises unless the method leaves a space."""

    def nothing(self, variables: Vector, norm: Scalar, workspace: Workspace) -> Space:
        del variables
        zero = jnp.zeros_like(norm)
        return Space(Bounded.nothing(workspace, norm.dtype), zero, zero, jnp.array(False))

    def subspace(self, model: Model) -> Space:
        bounded = Bounded.of(model.workspace, model.norm)
        direction = model.direction
        there = (model.num_restarts == 0) & (model.workspace.record.columns > 0)
        full = tree.norm2(direction.vector).astype(model.norm.dtype)
        return Space(bounded, full, direction.residual, there & bounded.usable)

    def step(self, subspace: Space, radius: Scalar) -> Step:
        chosen = _chosen(subspace, radius)
        length = jnp.where(chosen.bent, subspace.bounded.length(chosen.mu), chosen.shrunk)
        promised = jnp.where(chosen.bent, chosen.bent_norm, chosen.shrunk_norm)
        inside = subspace.full <= radius
        return Step(
            jnp.where(inside, subspace.full, length),
            subspace.full,
            jnp.where(inside, subspace.full_norm, promised),
            inside,
        )

    def vector(self, subspace: Space, radius: Scalar, direction: Vector) -> Vector:
        chosen = _chosen(subspace, radius)
        bent = subspace.bounded.vector(chosen.mu, direction)
        bent = tree.where(chosen.bent, bent, tree.scale(radius / subspace.full, direction))
        return tree.where(subspace.full <= radius, direction, bent)


class _Choice(NamedTuple):
    """The two steps of a radius below ‖d‖."""

    mu: Scalar
    bent_norm: Scalar  # ‖F + J s(μ)‖/‖F‖
    shrunk: Scalar  # length of d shortened
    shrunk_norm: Scalar  # and at most its ‖F + J s‖/‖F‖
    bent: Flag  # which to take


def _chosen(space: Space, radius: Scalar) -> _Choice:
    mu = space.bounded.multiplier(radius)
    bent_norm = space.bounded.linear_norm(mu)
    # ‖F + λ J d‖ ≤ (1 − λ) ‖F‖ + λ ‖F + J d‖
    fraction = jnp.minimum(radius / space.full, 1)
    shrunk_norm = 1 - fraction + fraction * space.full_norm
    bent = space.usable & (bent_norm <= shrunk_norm)
    return _Choice(mu, bent_norm, jnp.minimum(radius, space.full), shrunk_norm, bent)

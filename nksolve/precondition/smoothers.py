"""Smoothers: what a cycle does to the oscillating part of an error."""

import abc

import equinox as eqx
import jax.numpy as jnp
import lineax as lx

from .nodes import AbstractNodes, NodeBlocks, NodeInverse


class AbstractSmoother(eqx.Module):
    """x ← x + d_k with d_k = α_k d_{k−1} + β_k B⁻¹(b − J x), k = 1, 2, …, d_0 = 0.

    A polynomial iteration: what it does to an error is p(B⁻¹J), so that the same numbers on Jᵀ and
    B⁻ᵀ give the transpose, and a symmetric map where J is symmetric.
    """

    nodes: eqx.AbstractVar[AbstractNodes]

    @abc.abstractmethod
    def init(self, operator: lx.AbstractLinearOperator, ndim: int) -> NodeInverse:
        """B⁻¹, scaled as the coefficients want it."""

    @abc.abstractmethod
    def coefficients(self, ndim: int) -> list[tuple[float, float]]:
        """(α_k, β_k) of one sweep on a grid of `ndim` dimensions."""


class ChebyshevSmoother(AbstractSmoother):
    """The Chebyshev polynomial that is least over [λ/ratio, λ], λ ≥ ρ(B⁻¹J).

    λ is the largest row sum of |B⁻¹J|, from the probes that give B.

    **Arguments:**

    - `degree`: of the polynomial: products with B⁻¹ and with J a sweep.
    - `ratio`: how far down the spectrum it smooths; 2d in d dimensions by default, where the
      frequencies begin that a grid twice as coarse cannot hold (for the Laplacian).
    - `nodes`: B, `NodeBlocks()` or `NodeDiagonal()`.

    Storage: that of B⁻¹. Work of a sweep: `degree` matvecs.

    Source: Adams, Brezina, Hu & Tuminaro, J. Comput. Phys. 188, 2003; Saad, Iterative Methods for
    Sparse Linear Systems, 2nd ed., algorithm 12.1.
    """

    degree: int = eqx.field(static=True, default=2)
    ratio: float | None = eqx.field(static=True, default=None)
    nodes: AbstractNodes = NodeBlocks()

    def __check_init__(self):
        if self.degree < 1:
            raise ValueError(f"`degree` must be at least 1, but it is {self.degree}.")
        if self.ratio is not None and not self.ratio > 1:
            raise ValueError(f"`ratio` must exceed 1, but it is {self.ratio}.")

    def init(self, operator: lx.AbstractLinearOperator, ndim: int) -> NodeInverse:
        inverse, bound = self.nodes.init(operator, ndim)
        return inverse.scaled(1 / bound)

    def coefficients(self, ndim: int) -> list[tuple[float, float]]:
        # The spectrum of (B⁻¹/λ) J, of which [1/ratio, 1] is smoothed.
        low = 1 / (2 * ndim if self.ratio is None else self.ratio)
        theta, delta = (1 + low) / 2, (1 - low) / 2
        sigma = theta / delta
        rho = 1 / sigma
        found = [(0.0, 1 / theta)]
        for _ in range(self.degree - 1):
            rho, previous = 1 / (2 * sigma - rho), rho
            found.append((rho * previous, 2 * rho / delta))
        return found


class JacobiSmoother(AbstractSmoother):
    """Damped (block) Jacobi: `sweeps` times x ← x + ω B⁻¹(b − J x).

    **Arguments:**

    - `omega`: ω; 2d/(2d + 1) in d dimensions by default, which is best for the Laplacian (⅔, ⅘,
      6/7).
    - `sweeps`: how often.
    - `nodes`: B, `NodeBlocks()` or `NodeDiagonal()`.

    Storage: that of B⁻¹. Work: a matvec a sweep.

    Source: Trottenberg, Oosterlee & Schüller, Multigrid, 2001, section 2.1.
    """

    omega: float | None = eqx.field(static=True, default=None)
    sweeps: int = eqx.field(static=True, default=1)
    nodes: AbstractNodes = NodeBlocks()

    def __check_init__(self):
        if self.sweeps < 1:
            raise ValueError(f"`sweeps` must be at least 1, but it is {self.sweeps}.")
        if self.omega is not None and not self.omega > 0:
            raise ValueError(f"`omega` must be positive, but it is {self.omega}.")

    def init(self, operator: lx.AbstractLinearOperator, ndim: int) -> NodeInverse:
        inverse, bound = self.nodes.init(operator, ndim)
        omega = 2 * ndim / (2 * ndim + 1) if self.omega is None else self.omega
        return inverse.scaled(jnp.full_like(bound, omega))

    def coefficients(self, ndim: int) -> list[tuple[float, float]]:
        del ndim
        return [(0.0, 1.0)] * self.sweeps

"""Multigrid cycles over a hierarchy of linearised levels, and their transposes."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax import lax
from jaxtyping import Array, Inexact

from .. import tree
from ..linearise.operator import AbstractLinearMap
from ..linearise.probing import ravel, unravel
from ..typing import Vector
from .nodes import NodeInverse
from .smoothers import AbstractSmoother
from .transfer import AbstractTransfer, Grid, over_axes


class AbstractBridge(eqx.Module):
    """How residuals go down to the next grid (R) and corrections come up (P)."""

    @abc.abstractmethod
    def restrict(self, vector: Vector) -> Vector:
        """R r."""

    @abc.abstractmethod
    def prolong(self, vector: Vector) -> Vector:
        """P e."""

    @abc.abstractmethod
    def transpose(self) -> "AbstractBridge":
        """The bridge with Pᵀ for R and Rᵀ for P."""


class Bridge(AbstractBridge):
    """R times `scale`, and P, of a grid."""

    grid: Grid
    scale: float = eqx.field(static=True)

    def restrict(self, vector: Vector) -> Vector:
        return _scaled(self.scale, over_axes(self.grid, _restrict, vector))

    def prolong(self, vector: Vector) -> Vector:
        return over_axes(self.grid, _prolong, vector)

    def transpose(self) -> AbstractBridge:
        return TransposedBridge(self.grid, self.scale)


class TransposedBridge(AbstractBridge):
    """Pᵀ, and Rᵀ times `scale`, of a grid."""

    grid: Grid
    scale: float = eqx.field(static=True)

    def restrict(self, vector: Vector) -> Vector:
        return over_axes(self.grid, _prolong_transpose, vector)

    def prolong(self, vector: Vector) -> Vector:
        return _scaled(self.scale, over_axes(self.grid, _restrict_transpose, vector))

    def transpose(self) -> AbstractBridge:
        return Bridge(self.grid, self.scale)


def _restrict(transfer: AbstractTransfer, x: Any, axis: int) -> Any:
    return transfer.restrict(x, axis)


def _prolong(transfer: AbstractTransfer, x: Any, axis: int) -> Any:
    return transfer.prolong(x, axis)


def _prolong_transpose(transfer: AbstractTransfer, x: Any, axis: int) -> Any:
    return transfer.prolong_transpose(x, axis)


def _restrict_transpose(transfer: AbstractTransfer, x: Any, axis: int) -> Any:
    return transfer.restrict_transpose(x, axis)


def _scaled(scale: float, vector: Vector) -> Vector:
    return vector if scale == 1 else tree.scale(scale, vector)


class Level(eqx.Module):
    """A grid that is smoothed on: J there, the smoother's B⁻¹, the bridge to the next one."""

    operator: lx.AbstractLinearOperator
    smoother: AbstractSmoother
    inverse: NodeInverse
    bridge: AbstractBridge

    def residual(self, vector: Vector, x: Vector) -> Vector:
        """b − J x."""
        return tree.sub(vector, self.operator.mv(x))

    # A loop, even of two trips, is a wall for XLA's fusion: what is carried is computed once, where
    # otherwise a stencil of a stencil is evaluated anew at each point that reads it.

    def reduce(self, vector: Vector, sweeps: int) -> tuple[Vector, Vector]:
        """(x, b − J x) after sweeps from the start zero."""
        if sweeps == 0:
            return tree.zeros_like(self.operator.in_structure()), vector
        alphas, betas = self._coefficients(sweeps)

        def update(k, carry):
            x, step, residual = carry
            step = _recurred(alphas[k], step, betas[k], self.inverse.mv(residual))
            return tree.add(x, step), step, self.residual(residual, step)

        zeros = tree.zeros_like(self.operator.in_structure())
        x, _, residual = lax.fori_loop(0, len(alphas), update, (zeros, zeros, vector))
        return x, residual

    def improve(self, vector: Vector, x: Vector, sweeps: int) -> Vector:
        """x after sweeps from the start x."""
        if sweeps == 0:
            return x
        alphas, betas = self._coefficients(sweeps)

        def update(k, carry):
            x, step = carry
            correction = self.inverse.mv(self.residual(vector, x))
            step = _recurred(alphas[k], step, betas[k], correction)
            return tree.add(x, step), step

        return lax.fori_loop(0, len(alphas), update, (x, tree.zeros_like(x)))[0]

    def _coefficients(self, sweeps: int) -> tuple[Array, Array]:
        pairs = np.array(self.smoother.coefficients(self.inverse.ndim) * sweeps).reshape(-1, 2)
        return jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1])

    def transpose(self) -> "Level":
        """The level of Jᵀ."""
        return Level(
            self.operator.transpose(),
            self.smoother,
            self.inverse.transpose(),
            self.bridge.transpose(),
        )


class Hierarchy(eqx.Module):
    """The levels, finest first, and the inverse of J on the coarsest grid, a dense matrix."""

    levels: tuple[Level, ...]
    coarsest: Inexact[Array, "m m"]
    structure: tuple = eqx.field(static=True, converter=tree.freeze)

    def solve(self, vector: Vector) -> Vector:
        """J⁻¹ b on the coarsest grid."""
        return unravel(self.coarsest @ ravel(vector), tree.thaw(self.structure))

    def below(self) -> "Hierarchy":
        """The hierarchy without its finest grid."""
        return Hierarchy(self.levels[1:], self.coarsest, tree.thaw(self.structure))

    def transpose(self) -> "Hierarchy":
        """The hierarchy of Jᵀ."""
        levels = tuple(level.transpose() for level in self.levels)
        return Hierarchy(levels, self.coarsest.T, tree.thaw(self.structure))


class AbstractCycle(eqx.Module):
    """x = M⁻¹ b by smoothing and corrections from coarser grids, linear in b.

    Law: `transpose()` on the transposed hierarchy is M⁻ᵀ.
    """

    pre: eqx.AbstractVar[int]
    post: eqx.AbstractVar[int]

    @abc.abstractmethod
    def correct(self, below: Hierarchy, vector: Vector) -> Vector:
        """An approximate solution on the next coarser grid, from the start zero."""

    @abc.abstractmethod
    def transpose(self) -> "AbstractCycle":
        """The cycle of the transpose."""

    @property
    def is_symmetric(self) -> bool:
        """Whether M⁻¹ is symmetric where J is and R = c Pᵀ."""
        return self.pre == self.post

    def run(self, hierarchy: Hierarchy, vector: Vector) -> Vector:
        """M⁻¹ b."""
        if not hierarchy.levels:
            return hierarchy.solve(vector)
        level, below = hierarchy.levels[0], hierarchy.below()
        x, residual = level.reduce(vector, self.pre)
        coarse = level.bridge.restrict(residual)
        solved = below.solve(coarse) if not below.levels else self.correct(below, coarse)
        x = tree.add(x, level.bridge.prolong(solved))
        return level.improve(vector, x, self.post)

    def check(self) -> None:
        """Raises for numbers of sweeps that are no cycle."""
        if self.pre < 0 or self.post < 0 or self.pre + self.post == 0:
            raise ValueError(
                f"A cycle smooths at least once: `pre` is {self.pre} and `post` {self.post}."
            )


class VCycle(AbstractCycle):
    """Each coarser grid is visited once.

    **Arguments:**

    - `pre`, `post`: sweeps of the smoother before and after the correction. Equal ones make M⁻¹
      symmetric where J is and R = c Pᵀ, as conjugate gradients need.

    Work: with `pre = post = 1` and the Chebyshev smoother of degree k, 2 k matvecs, and a quarter
    of that on the next grid in two dimensions (an eighth in three), and so on.

    Source: Briggs, Henson & McCormick, A Multigrid Tutorial, 2nd ed., 2000, chapter 3.
    """

    pre: int = eqx.field(static=True, default=1)
    post: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        self.check()

    def correct(self, below: Hierarchy, vector: Vector) -> Vector:
        return self.run(below, vector)

    def transpose(self) -> AbstractCycle:
        return VCycle(self.post, self.pre)


class WCycle(AbstractCycle):
    """Each grid visits the next coarser one twice: twice the work of a V-cycle in two dimensions,
    less in three; one dimension is better served by `VCycle`. Arguments as there.

    Compiled once a level (the two visits are a loop), which costs one coarse matvec more.
    """

    pre: int = eqx.field(static=True, default=1)
    post: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        self.check()

    def correct(self, below: Hierarchy, vector: Vector) -> Vector:
        def visit(_, x):
            residual = below.levels[0].residual(vector, x)
            return tree.add(x, self.run(below, residual))

        start = tree.zeros_like(jax.eval_shape(self.run, below, vector))
        return lax.fori_loop(0, 2, visit, start)

    def transpose(self) -> AbstractCycle:
        return WCycle(self.post, self.pre)


class FCycle(AbstractCycle):
    """Each grid visits the next coarser one by an F-cycle, then by a V-cycle: between V and W in
    work and in robustness. Arguments as of `VCycle`. Not symmetric.

    The program grows as the square of the number of levels.
    """

    pre: int = eqx.field(static=True, default=1)
    post: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        self.check()

    def correct(self, below: Hierarchy, vector: Vector) -> Vector:
        x = self.run(below, vector)
        residual = below.levels[0].residual(vector, x)
        return tree.add(x, VCycle(self.pre, self.post).run(below, residual))

    @property
    def is_symmetric(self) -> bool:
        return False

    def transpose(self) -> AbstractCycle:
        return _TransposedFCycle(self.post, self.pre)


class _TransposedFCycle(AbstractCycle):
    """By a V-cycle first, then by an F-cycle."""

    pre: int = eqx.field(static=True)
    post: int = eqx.field(static=True)

    def correct(self, below: Hierarchy, vector: Vector) -> Vector:
        x = VCycle(self.pre, self.post).run(below, vector)
        residual = below.levels[0].residual(vector, x)
        return tree.add(x, self.run(below, residual))

    @property
    def is_symmetric(self) -> bool:
        return False

    def transpose(self) -> AbstractCycle:
        return FCycle(self.post, self.pre)


class CycleMap(AbstractLinearMap):
    """b → M⁻¹ b."""

    hierarchy: Hierarchy
    cycle: AbstractCycle

    def mv(self, vector: Vector) -> Vector:
        return self.cycle.run(self.hierarchy, vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        return self.cycle.transpose().run(self.hierarchy.transpose(), vector)


def _recurred(alpha: Array, step: Vector, beta: Array, correction: Vector) -> Vector:
    """α d + β c."""
    return tree.axpy(alpha, step, tree.scale(beta, correction))


def dense(operator: lx.AbstractLinearOperator) -> Inexact[Array, "m m"]:
    """The matrix of a small operator: one batch of matvecs."""
    structure = operator.in_structure()
    eye = jnp.eye(tree.size(structure), dtype=tree.scalar_dtype(structure))
    rows = jax.vmap(lambda e: ravel(operator.mv(unravel(e, structure))))(eye)
    return rows.T

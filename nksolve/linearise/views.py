"""Views of one linearisation: shifted, and in other units."""

from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np

from .. import tree
from ..typing import Scalar, Vector
from .operator import AbstractLinearMap, JacobianOperator, low_of
from .tags import holomorphic_tag

#: An axis shorter than this is narrow.
_NARROW = 16


def _is_holomorphic(operator: lx.AbstractLinearOperator) -> bool:
    return not isinstance(operator, JacobianOperator) or holomorphic_tag in operator.tags


#: What of A and of M is so of A + c M.
_KEPT = (
    (lx.is_symmetric, lx.symmetric_tag),
    (lx.is_positive_semidefinite, lx.positive_semidefinite_tag),
    (_is_holomorphic, holomorphic_tag),
)


class ShiftedMap(AbstractLinearMap):
    """v → v − γ A v."""

    linear_map: AbstractLinearMap
    gamma: Scalar

    def mv(self, vector: Vector) -> Vector:
        return tree.axpy(-self.gamma, self.linear_map.mv(vector), vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        return tree.axpy(-self.gamma, self.linear_map.transpose_mv(vector), vector)

    @property
    def low(self) -> np.dtype | None:
        return self.linear_map.low


class ScaledMap(AbstractLinearMap):
    """v → D⁻¹ A D v for a diagonal D."""

    operator: lx.AbstractLinearOperator
    scale: Vector

    def mv(self, vector: Vector) -> Vector:
        return divided(self.operator.mv(times(vector, self.scale)), self.scale)

    def transpose_mv(self, vector: Vector) -> Vector:
        return times(self.operator.transpose().mv(divided(vector, self.scale)), self.scale)


class SumMap(AbstractLinearMap):
    """v → A v + c M v."""

    operator: lx.AbstractLinearOperator
    factor: Scalar
    mass: Any  # a diagonal like v, an operator, or `None` for the identity

    def mv(self, vector: Vector) -> Vector:
        return tree.axpy(self.factor, weighted(self.mass, vector), self.operator.mv(vector))

    def transpose_mv(self, vector: Vector) -> Vector:
        product = self.operator.transpose().mv(vector)
        return tree.axpy(self.factor, weighted(transposed_mass(self.mass), vector), product)

    @property
    def low(self) -> np.dtype | None:
        return low_of(self.operator)


def plus_multiple(
    operator: lx.AbstractLinearOperator, factor: Scalar, mass: Any = None
) -> JacobianOperator:
    """A + c M, c ≥ 0, on A's linearisation; M is the identity if not given.

    A promise of A that M keeps is one of the sum; a diagonal of M is one of positive numbers.
    """
    structures = operator.in_structure(), operator.out_structure()
    factor = factor.astype(tree.real_dtype(structures[0]))
    kept = {
        tag
        for holds, tag in _KEPT
        if holds(operator) and (not isinstance(mass, lx.AbstractLinearOperator) or holds(mass))
    }
    return JacobianOperator(SumMap(operator, factor, mass), *structures, frozenset(kept))


def shifted(operator: JacobianOperator, gamma: Scalar) -> JacobianOperator:
    """I − γ A, on A's linearisation."""
    structure = operator.in_structure()
    return JacobianOperator(ShiftedMap(operator.linear_map, gamma), structure, structure)


def scaled(operator: lx.AbstractLinearOperator, scale: Vector) -> lx.AbstractLinearOperator:
    """D⁻¹ A D for the diagonal D of `scale`; the identity is itself."""
    if isinstance(operator, lx.IdentityLinearOperator):
        return operator
    structures = operator.in_structure(), operator.out_structure()
    return JacobianOperator(ScaledMap(operator, scale), *structures)


def times(vector: Vector, scale: Vector) -> Vector:
    """D v."""
    return jtu.tree_map(lambda x, d: x * d.astype(x.dtype), vector, scale)


def divided(vector: Vector, scale: Vector) -> Vector:
    """D⁻¹ v."""

    def one(x, d):
        shape = x.shape
        if x.ndim > 1 and shape[-1] < _NARROW:
            # A norm of the quotient over a narrow last axis leaves XLA's fast path on the CPU:
            # 50 µs in place of 7 for (5000, 2).
            x, d = x.reshape(-1), jnp.broadcast_to(d, shape).reshape(-1)
        return (x / d.astype(x.dtype)).reshape(shape)

    return jtu.tree_map(one, vector, scale)


def weighted(mass: Any, vector: Vector) -> Vector:
    """M v for M an operator, a diagonal as a tree like v, or `None` for the identity."""
    if mass is None:
        return vector
    if isinstance(mass, lx.AbstractLinearOperator):
        return mass.mv(vector)
    return times(vector, mass)


def transposed_mass(mass: Any) -> Any:
    """Mᵀ of such an M."""
    return mass.transpose() if isinstance(mass, lx.AbstractLinearOperator) else mass

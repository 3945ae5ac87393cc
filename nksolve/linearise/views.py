"""Views of one linearisation: shifted, and in other units."""

import jax.tree_util as jtu
import lineax as lx
import numpy as np

from .. import tree
from ..typing import Scalar, Vector
from .operator import AbstractLinearMap, JacobianOperator


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
    return jtu.tree_map(lambda x, d: x / d.astype(x.dtype), vector, scale)

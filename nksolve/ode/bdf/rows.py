"""Mass matrices, and weights of the rows of an equation."""

import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx

from ... import tree
from ...linearise.operator import AbstractLinearMap, JacobianOperator
from ...linearise.views import divided, times
from ...typing import Scalar, Vector
from ..mass import Mass


class RowsMap(AbstractLinearMap):
    """v → D A v for a diagonal D."""

    operator: lx.AbstractLinearOperator
    rows: Vector

    def mv(self, vector: Vector) -> Vector:
        return times(self.operator.mv(vector), self.rows)

    def transpose_mv(self, vector: Vector) -> Vector:
        return self.operator.transpose().mv(times(vector, self.rows))


class UndoneMap(AbstractLinearMap):
    """v → B D⁻¹ v, which is (D A)⁻¹ where B is A⁻¹."""

    operator: lx.AbstractLinearOperator
    rows: Vector

    def mv(self, vector: Vector) -> Vector:
        return self.operator.mv(divided(vector, self.rows))

    def transpose_mv(self, vector: Vector) -> Vector:
        return divided(self.operator.transpose().mv(vector), self.rows)


def with_rows(operator: lx.AbstractLinearOperator, rows: Vector) -> JacobianOperator:
    """D A."""
    structures = operator.in_structure(), operator.out_structure()
    return JacobianOperator(RowsMap(operator, rows), *structures)


def undone(inverse: lx.AbstractLinearOperator, rows: Vector) -> lx.AbstractLinearOperator:
    """M⁻¹ D⁻¹; the identity, which is no preconditioner, is itself."""
    if isinstance(inverse, lx.IdentityLinearOperator):
        return inverse
    structures = inverse.in_structure(), inverse.out_structure()
    return JacobianOperator(UndoneMap(inverse, rows), *structures)


def row_weights(mass: Mass, y: Vector, gamma: Scalar) -> Vector | None:
    """1/|γ| for the algebraic rows of a diagonal M, whose residual γ F would else be the smaller
    the shorter the step is, and 1 for the others; `None` where M tells no rows apart."""
    if mass is None or isinstance(mass, lx.AbstractLinearOperator):
        return None
    size = jnp.abs(gamma)

    def one(m, x):
        dtype = tree.real_dtype(x)
        weight = (1 / jnp.where(size > 0, size, 1)).astype(dtype)
        return jnp.broadcast_to(jnp.where(m == 0, weight, jnp.ones_like(weight)), x.shape)

    return jtu.tree_map(one, mass, y)

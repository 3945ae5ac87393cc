"""Diagonal scaling."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx

from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..typing import Args, Vector, Y
from .base import AbstractPreconditioner


class Jacobi(AbstractPreconditioner):
    """M = diag(J): M⁻¹v = v / d, entry by entry.

    **Arguments:**

    - `diagonal`: `(y, args) -> d`, a PyTree of arrays with the structure and shapes of the
      inexact arrays of y. Entries that are zero are left unscaled.

    Storage: one vector. Work: one division an entry.
    """

    diagonal: Callable[[Y, Args], Vector]

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        d = eqx.filter(self.diagonal(y, args), eqx.is_inexact_array)
        structure = operator.in_structure()
        shapes = jtu.tree_map(lambda x: x.shape, d, is_leaf=eqx.is_array)
        wanted = jtu.tree_map(lambda x: x.shape, structure)
        if shapes != wanted:
            raise ValueError(
                f"`Jacobi(diagonal)`: the diagonal has shapes {shapes}, the unknown {wanted}."
            )
        reciprocal = jtu.tree_map(_reciprocal, d, structure)
        tags = frozenset({lx.diagonal_tag, lx.symmetric_tag})
        return JacobianOperator(_Scaling(reciprocal), operator.out_structure(), structure, tags)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state


def _reciprocal(d, like):
    d = d.astype(like.dtype)
    zero = d == 0
    return jnp.where(zero, jnp.ones_like(d), 1 / jnp.where(zero, jnp.ones_like(d), d))


class _Scaling(AbstractLinearMap):
    """v → r v."""

    factors: Vector

    def mv(self, vector: Vector) -> Vector:
        return jtu.tree_map(jnp.multiply, self.factors, vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        return self.mv(vector)

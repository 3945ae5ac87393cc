"""J as a dense matrix."""

from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, Inexact

from .. import tree
from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..linearise.probing import compressed, ravel, unravel
from ..typing import Args, Vector, Y
from .base import AbstractPreconditioner
from .blocks import matvec, scaled_inverse, transpose


class Dense(AbstractPreconditioner):
    """M = J as a dense n × n matrix, M⁻¹ its inverse: for a few unknowns, where it is faster than
    any iteration.

    By cofactors up to n = 3, by LU with partial pivoting beyond. A singular J is replaced by the
    identity, and the Krylov method reports what comes of it. The unknowns may be any PyTree, all
    real or all complex; a complex one counts as complex-linear.

    Storage: n vectors. Work: n multiplications and additions an entry; an update n matvecs in one
    batch and about 2 n³ operations.
    """

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        del y, args
        structure, out_structure = operator.in_structure(), operator.out_structure()
        n = tree.size(structure)
        if n == 0:
            return lx.IdentityLinearOperator(out_structure, structure)
        kinds = {leaf.dtype.kind for leaf in jtu.tree_leaves((structure, out_structure))}
        if len(kinds) > 1:
            raise ValueError(
                "`Dense` takes unknowns that are all real or all complex; these are mixed. Write "
                "the complex ones as two real ones."
            )
        if tree.size(out_structure) != n:
            raise ValueError(
                f"`Dense` takes a square matrix, but this one is {tree.size(out_structure)} × {n}."
            )
        matrix = transpose(compressed(operator, np.arange(n), n))
        inverse = _Inverse(scaled_inverse(matrix), structure, out_structure)
        return JacobianOperator(inverse, out_structure, structure)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        del y, args
        return tree.size(operator.in_structure())


class _Inverse(AbstractLinearMap):
    """v → J⁻¹v."""

    inverse: Inexact[Array, "n n"]
    structure: tuple = eqx.field(static=True, converter=tree.freeze)
    out_structure: tuple = eqx.field(static=True, converter=tree.freeze)

    def mv(self, vector: Vector) -> Vector:
        return unravel(matvec(self.inverse, ravel(vector)), tree.thaw(self.structure))

    def transpose_mv(self, vector: Vector) -> Vector:
        product = matvec(transpose(self.inverse), ravel(vector))
        return unravel(product, tree.thaw(self.out_structure))

"""The linearisation of a residual as a Lineax operator."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array

from .. import tree
from ..typing import LinearFn, Vector


class AbstractLinearMap(eqx.Module):
    """A linear map v → J v between spaces of PyTrees, with its transpose w → Jᵀ w.

    The arrays that it keeps (the stored values of a linearisation) are its leaves, everything else
    is static. `transpose_mv` is the transpose of JAX, without conjugation.
    """

    @abc.abstractmethod
    def mv(self, vector: Vector) -> Vector:
        """J v."""

    @abc.abstractmethod
    def transpose_mv(self, vector: Vector) -> Vector:
        """Jᵀ w."""

    @property
    def low(self) -> np.dtype | None:
        """The lower precision in which linear systems with this map are to be solved, if any."""
        return None


class TransposedMap(AbstractLinearMap):
    """The map w → Jᵀ w of a map v → J v."""

    linear_map: AbstractLinearMap

    @property
    def low(self) -> np.dtype | None:
        return self.linear_map.low

    def mv(self, vector: Vector) -> Vector:
        return self.linear_map.transpose_mv(vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        return self.linear_map.mv(vector)


class ConjugatedMap(AbstractLinearMap):
    """The map v → conj(J conj(v))."""

    linear_map: AbstractLinearMap

    @property
    def low(self) -> np.dtype | None:
        return self.linear_map.low

    def mv(self, vector: Vector) -> Vector:
        return tree.conj(self.linear_map.mv(tree.conj(vector)))

    def transpose_mv(self, vector: Vector) -> Vector:
        return tree.conj(self.linear_map.transpose_mv(tree.conj(vector)))


class FunctionMap(AbstractLinearMap):
    """A linear map given by a function v → J v, transposed by `jax.linear_transpose`."""

    fn: LinearFn
    in_structure: tuple = eqx.field(static=True, converter=tree.freeze)

    def mv(self, vector: Vector) -> Vector:
        return self.fn(vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        (out,) = jax.linear_transpose(self.fn, tree.thaw(self.in_structure))(vector)
        return out


class JacobianOperator(lx.AbstractLinearOperator):
    """A linearisation J = ∂fn/∂y as a matrix-free `lineax.AbstractLinearOperator`.

    `mv` is one matvec and evaluates `fn` only as often as the policy that made the linearisation
    says (never, for `nks.Linearise`). `as_matrix` and everything that needs it (`lx.materialise`,
    `lx.diagonal`, direct solvers) costs n matvecs in one batch and n² numbers.

    **Attributes:**

    - `linear_map`: what is applied.
    - `tags`: Lineax tags; promised by the caller, never checked.
    """

    linear_map: AbstractLinearMap
    _in: tuple = eqx.field(static=True)
    _out: tuple = eqx.field(static=True)
    tags: frozenset = eqx.field(static=True)

    def __init__(
        self,
        linear_map: AbstractLinearMap,
        in_structure: tree.Structure,
        out_structure: tree.Structure,
        tags: frozenset = frozenset(),
    ):
        self.linear_map = linear_map
        self._in = tree.freeze(in_structure)
        self._out = tree.freeze(out_structure)
        self.tags = frozenset(tags)

    def mv(self, vector: Vector) -> Vector:
        return self.linear_map.mv(vector)

    def transpose(self) -> "JacobianOperator":
        if lx.is_symmetric(self):
            return self
        return JacobianOperator(
            TransposedMap(self.linear_map),
            self.out_structure(),
            self.in_structure(),
            lx.transpose_tags(self.tags),
        )

    def as_matrix(self) -> Array:
        return lx.materialise(self).as_matrix()

    def in_structure(self) -> tree.Structure:
        return tree.thaw(self._in)

    def out_structure(self) -> tree.Structure:
        return tree.thaw(self._out)


def low_of(operator: lx.AbstractLinearOperator) -> np.dtype | None:
    """The lower precision in which linear systems with an operator are to be solved, if any."""
    return operator.linear_map.low if isinstance(operator, JacobianOperator) else None


@lx.linearise.register(JacobianOperator)
def _(operator):
    return operator


@lx.materialise.register(JacobianOperator)
def _(operator):
    as_function = lx.FunctionLinearOperator(operator.mv, operator.in_structure(), operator.tags)
    return lx.materialise(as_function)


@lx.conj.register(JacobianOperator)
def _(operator):
    return JacobianOperator(
        ConjugatedMap(operator.linear_map),
        operator.in_structure(),
        operator.out_structure(),
        operator.tags,
    )


@lx.diagonal.register(JacobianOperator)
def _(operator):
    return lx.diagonal(lx.materialise(operator))


@lx.tridiagonal.register(JacobianOperator)
def _(operator):
    return lx.tridiagonal(lx.materialise(operator))


def _real(operator: JacobianOperator) -> bool:
    return not any(
        jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        for leaf in jax.tree_util.tree_leaves((operator.in_structure(), operator.out_structure()))
    )


def _tagged(operator: JacobianOperator, *tags: object) -> bool:
    return any(tag in operator.tags for tag in tags)


_semidefinite = (lx.positive_semidefinite_tag, lx.negative_semidefinite_tag)


@lx.is_symmetric.register(JacobianOperator)
def _(operator):
    # A semidefinite complex operator is Hermitian, not symmetric.
    tagged = _tagged(operator, lx.symmetric_tag, lx.diagonal_tag)
    return tagged or (_real(operator) and _tagged(operator, *_semidefinite))


for _check, _tags in (
    (lx.is_positive_semidefinite, (lx.positive_semidefinite_tag,)),
    (lx.is_negative_semidefinite, (lx.negative_semidefinite_tag,)),
    (lx.is_diagonal, (lx.diagonal_tag,)),
    (lx.is_tridiagonal, (lx.tridiagonal_tag, lx.diagonal_tag)),
    (lx.is_lower_triangular, (lx.lower_triangular_tag, lx.diagonal_tag)),
    (lx.is_upper_triangular, (lx.upper_triangular_tag, lx.diagonal_tag)),
    (lx.has_unit_diagonal, (lx.unit_diagonal_tag,)),
):
    _check.register(JacobianOperator)(lambda operator, tags=_tags: _tagged(operator, *tags))

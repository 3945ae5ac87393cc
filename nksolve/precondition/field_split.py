"""Preconditioners for the fields of an unknown: block-diagonal or block-triangular."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeAlias

import equinox as eqx
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import PyTree

from .. import tree
from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..typing import LinearFn, Vector
from .base import AbstractPreconditioner
from .composite import AbstractComposite, CompositeState, OperatorMap, checked_parts

#: A key, index or attribute name of y; a tuple of them; or a function of y, as in `eqx.tree_at`.
Field: TypeAlias = Hashable | Callable[[Any], Any]

# A principal block of J has these where J has them.
_INHERITED = (
    (lx.is_symmetric, lx.symmetric_tag),
    (lx.is_diagonal, lx.diagonal_tag),
    (lx.is_positive_semidefinite, lx.positive_semidefinite_tag),
    (lx.is_negative_semidefinite, lx.negative_semidefinite_tag),
)


class FieldSplit(AbstractComposite):
    """Block-diagonal: M⁻¹ = diag(M₁⁻¹, …, M_k⁻¹), one block for each field of y.

    **Arguments:**

    - `fields`: `{field: preconditioner}`. A field is a key, an index or an attribute name of y (or
      a tuple of several), or a function that picks leaves or subtrees of it, as in `eqx.tree_at`:
      `{"u": nks.Spectral(), ("v", "w"): nks.Identity()}`. Every leaf belongs to one field.

    A preconditioner is made from its own block J_ii, whose unknown is the subtree (for a tuple,
    the tuple of the subtrees); functions of (y, args) that it calls get the whole y.

    Storage: that of the parts. Work: one application of each; a product with J_ii, where a part
    needs one, is one matvec of J.

    Source: Brown et al., ISPDC 2012 (PETSc's field split).
    """

    fields: tuple[Field, ...] = eqx.field(static=True)
    parts: tuple[AbstractPreconditioner, ...]

    def __init__(self, fields: Mapping[Field, AbstractPreconditioner]):
        self.fields, self.parts = tuple(fields), checked_parts("FieldSplit", [*fields.values()])

    @property
    def keeps_operator(self) -> bool:
        return False

    def operators(self, operator: lx.AbstractLinearOperator) -> list[lx.AbstractLinearOperator]:
        return _blocks(self.fields, operator)

    def combined(self, state: CompositeState, parts: list[AbstractLinearMap]) -> AbstractLinearMap:
        return _Diagonal(_splitting(self.fields, state), tuple(parts))


class TriangularFieldSplit(AbstractComposite):
    """Block lower triangular: z_i = M_i⁻¹(r_i − Σ_{j<i} J_ij z_j), fields in the order given.

    Exact where J is block lower triangular in that order and the M_i are: the field that does not
    feel the others comes first. Its transpose, with J_jiᵀ and in reversed order, is exact too.
    Arguments as for `nks.FieldSplit`.

    The matvecs inside an application are not among `num_matvecs`: k − 1 for each of
    `num_preconditioner_applications`.

    Storage: that of the parts, and 2 vectors. Work: one application of each, k − 1 matvecs.

    Source: Brown et al., ISPDC 2012 (PETSc's multiplicative field split).
    """

    fields: tuple[Field, ...] = eqx.field(static=True)
    parts: tuple[AbstractPreconditioner, ...]

    def __init__(self, fields: Mapping[Field, AbstractPreconditioner]):
        self.fields = tuple(fields)
        self.parts = checked_parts("TriangularFieldSplit", [*fields.values()])

    @property
    def keeps_operator(self) -> bool:
        return len(self.parts) > 1

    @property
    def keeps_symmetry(self) -> bool:
        return len(self.parts) == 1 and super().keeps_symmetry

    def operators(self, operator: lx.AbstractLinearOperator) -> list[lx.AbstractLinearOperator]:
        return _blocks(self.fields, operator)

    def combined(self, state: CompositeState, parts: list[AbstractLinearMap]) -> AbstractLinearMap:
        splitting = _splitting(self.fields, state)
        if state.operator is None:
            return _Diagonal(splitting, tuple(parts))
        return _Triangular(splitting, OperatorMap(state.operator), tuple(parts))


class Splitting(eqx.Module):
    """Which leaves of a vector make which field."""

    structure: tuple = eqx.field(static=True)  # of the whole, frozen
    fields: tuple[tuple[tuple[int, ...], Any], ...] = eqx.field(static=True)  # leaves, treedef

    @staticmethod
    def of(fields: tuple[Field, ...], structure: tree.Structure) -> "Splitting":
        leaves, treedef = jtu.tree_flatten(structure)
        numbered = jtu.tree_unflatten(treedef, range(len(leaves)))
        found = []
        for field in fields:
            numbers, own = jtu.tree_flatten(_picked(field, numbered))
            found.append((tuple(numbers), own))
        times = np.zeros(len(leaves), int)
        for numbers, _ in found:
            times[list(numbers)] += 1
        if np.any(times != 1):
            names = [jtu.keystr(path) for path, _ in jtu.tree_leaves_with_path(structure)]
            missing = [name for name, n in zip(names, times, strict=True) if n == 0]
            twice = [name for name, n in zip(names, times, strict=True) if n > 1]
            raise ValueError(
                "The fields of a field split must cover every leaf of y once; in none: "
                f"{missing}, in several: {twice}. `nks.Identity()` leaves a field as it is."
            )
        return Splitting(tree.freeze(structure), tuple(found))

    def structure_of(self, i: int) -> tree.Structure:
        """The structure of field i."""
        return self.pick(tree.thaw(self.structure), i)

    def pick(self, vector: PyTree, i: int) -> PyTree:
        """Field i of a vector, or of a structure."""
        leaves, (numbers, treedef) = jtu.tree_leaves(vector), self.fields[i]
        return jtu.tree_unflatten(treedef, [leaves[n] for n in numbers])

    def place(self, fields: Mapping[int, Vector]) -> Vector:
        """The vector of these fields, zero elsewhere."""
        structs, treedef = self.structure
        leaves: list[Any] = [None] * len(structs)
        for i, field in fields.items():
            for n, leaf in zip(self.fields[i][0], jtu.tree_leaves(field), strict=True):
                leaves[n] = leaf
        whole = [tree.zeros_like(s) if x is None else x for x, s in zip(leaves, structs)]  # noqa: B905
        return jtu.tree_unflatten(treedef, whole)


class _Block(AbstractLinearMap):
    """J_ii: embed, multiply, pick."""

    splitting: Splitting
    linear_map: AbstractLinearMap
    i: int = eqx.field(static=True)

    def mv(self, vector: Vector) -> Vector:
        whole = self.splitting.place({self.i: vector})
        return self.splitting.pick(self.linear_map.mv(whole), self.i)

    def transpose_mv(self, vector: Vector) -> Vector:
        whole = self.splitting.place({self.i: vector})
        return self.splitting.pick(self.linear_map.transpose_mv(whole), self.i)


class _Diagonal(AbstractLinearMap):
    splitting: Splitting
    parts: tuple[AbstractLinearMap, ...]

    def mv(self, vector: Vector) -> Vector:
        pick = lambda i: self.splitting.pick(vector, i)
        return self.splitting.place({i: part.mv(pick(i)) for i, part in enumerate(self.parts)})

    def transpose_mv(self, vector: Vector) -> Vector:
        pick = lambda i: self.splitting.pick(vector, i)
        each = enumerate(self.parts)
        return self.splitting.place({i: part.transpose_mv(pick(i)) for i, part in each})


class _Triangular(AbstractLinearMap):
    splitting: Splitting
    linear_map: AbstractLinearMap  # J
    parts: tuple[AbstractLinearMap, ...]

    def mv(self, vector: Vector) -> Vector:
        parts = [(i, part.mv) for i, part in enumerate(self.parts)]
        return self._substitute(self.linear_map.mv, parts, vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        parts = [(i, part.transpose_mv) for i, part in reversed([*enumerate(self.parts)])]
        return self._substitute(self.linear_map.transpose_mv, parts, vector)

    def _substitute(self, mv: LinearFn, parts: list[tuple[int, LinearFn]], r: Vector) -> Vector:
        found: dict[int, Vector] = {}
        for i, solve in parts:
            own = self.splitting.pick(r, i)
            if found:
                own = tree.sub(own, self.splitting.pick(mv(self.splitting.place(found)), i))
            found[i] = solve(own)
        return self.splitting.place(found)


def _splitting(fields: tuple[Field, ...], state: CompositeState) -> Splitting:
    return Splitting.of(fields, tree.thaw(state.structures)[0])


def _blocks(
    fields: tuple[Field, ...], operator: lx.AbstractLinearOperator
) -> list[lx.AbstractLinearOperator]:
    splitting = Splitting.of(fields, operator.in_structure())
    tags = frozenset(tag for holds, tag in _INHERITED if holds(operator))
    linear_map = OperatorMap(operator)
    blocks: list[lx.AbstractLinearOperator] = []
    for i in range(len(fields)):
        structure = splitting.structure_of(i)
        blocks.append(
            JacobianOperator(_Block(splitting, linear_map, i), structure, structure, tags)
        )
    return blocks


def _picked(field: Field, whole: Any) -> Any:
    if isinstance(field, tuple):
        return tuple(_picked(f, whole) for f in field)
    if callable(field):
        return field(whole)
    try:
        # A string names an attribute but of a dictionary; an integer is an index.
        if isinstance(field, str) and not isinstance(whole, Mapping):
            return getattr(whole, field)
        return whole[field]
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"A field split has a field {field!r}, but y, a {type(whole).__name__}, has none of "
            "that name: give a key, an index or an attribute name, or a function that picks it."
        ) from error

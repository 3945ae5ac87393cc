"""Several preconditioners as one: their sum, or one after the other."""

import abc
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.core
import jax.numpy as jnp
import lineax as lx
from equinox import AbstractVar

from .. import tree
from ..linearise.operator import AbstractLinearMap, JacobianOperator, TransposedMap
from ..typing import Args, Count, Flag, LinearFn, Vector, Y
from .base import AbstractPreconditioner, probes_where_due, update_where_due


class OperatorMap(AbstractLinearMap):
    """A Lineax operator as a linear map."""

    operator: lx.AbstractLinearOperator

    def mv(self, vector: Vector) -> Vector:
        return self.operator.mv(vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        return self.operator.transpose().mv(vector)


class CompositeState(eqx.Module):
    """The states of the parts, and J where an application needs it."""

    parts: tuple[Any, ...]
    operator: lx.AbstractLinearOperator | None
    structures: tuple = eqx.field(static=True)  # in and out of J, frozen


class AbstractComposite(AbstractPreconditioner):
    """A preconditioner that is made of others, each for an operator of its own."""

    parts: AbstractVar[tuple[AbstractPreconditioner, ...]]

    @property
    @abc.abstractmethod
    def keeps_operator(self) -> bool:
        """Whether an application multiplies by J."""

    @abc.abstractmethod
    def operators(self, operator: lx.AbstractLinearOperator) -> list[lx.AbstractLinearOperator]:
        """What each part is an approximate inverse of."""

    @abc.abstractmethod
    def combined(self, state: CompositeState, parts: list[AbstractLinearMap]) -> AbstractLinearMap:
        """M⁻¹ from those of the parts."""

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> CompositeState:
        each = zip(self.parts, self.operators(operator), strict=True)
        return self._state([part.init(own, y, args) for part, own in each], operator)

    def update(
        self, state: CompositeState, operator: lx.AbstractLinearOperator, y: Y, args: Args
    ) -> CompositeState:
        each = zip(self.parts, state.parts, self.operators(operator), strict=True)
        parts = [update_where_due(part, old, own, y, args) for part, old, own in each]
        return self._state(parts, operator)

    def _state(self, parts: list[Any], operator: lx.AbstractLinearOperator) -> CompositeState:
        structures = tree.freeze((operator.in_structure(), operator.out_structure()))
        kept = operator if self.keeps_operator else None
        return CompositeState(tuple(parts), kept, structures)

    def as_operator(self, state: CompositeState) -> lx.AbstractLinearOperator:
        each = zip(self.parts, state.parts, strict=True)
        maps: list[AbstractLinearMap] = [OperatorMap(p.as_operator(s)) for p, s in each]
        in_structure, out_structure = tree.thaw(state.structures)
        return JacobianOperator(self.combined(state, maps), out_structure, in_structure)

    def is_due(self, state: CompositeState, y: Y, args: Args) -> Flag:
        # J itself is always due.
        due = jnp.array(self.keeps_operator)
        for part, own in zip(self.parts, state.parts, strict=True):
            due = due | part.is_due(own, y, args)
        return due

    def observe(self, state: CompositeState, num_steps: Count) -> CompositeState:
        each = zip(self.parts, state.parts, strict=True)
        parts = tuple(part.observe(own, num_steps) for part, own in each)
        return CompositeState(parts, state.operator, state.structures)

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        each = zip(self.parts, self.operators(operator), strict=True)
        return sum(part.num_probes(own, y, args) for part, own in each)

    def num_update_probes(
        self, state: CompositeState, operator: lx.AbstractLinearOperator, y: Y, args: Args
    ) -> int | Count:
        each = zip(self.parts, state.parts, self.operators(operator), strict=True)
        return sum(probes_where_due(part, old, own, y, args) for part, old, own in each)

    def matvecs_per_application(self, operator: lx.AbstractLinearOperator) -> int:
        each = zip(self.parts, self.operators(operator), strict=True)
        own = len(self.parts) - 1 if self.keeps_operator else 0
        return own + sum(part.matvecs_per_application(sub) for part, sub in each)

    @property
    def is_rebuilt(self) -> bool:
        return all(part.is_rebuilt for part in self.parts)

    @property
    def is_variable(self) -> bool:
        return any(part.is_variable for part in self.parts)

    @property
    def keeps_symmetry(self) -> bool:
        return all(part.keeps_symmetry for part in self.parts)

    @property
    def needs_transpose(self) -> bool:
        return any(part.needs_transpose for part in self.parts)

    def check(self) -> None:
        for part in self.parts:
            part.check()


class Additive(AbstractComposite):
    """M⁻¹ = Σᵢ Mᵢ⁻¹.

    For parts that correct different things (subdomains, a coarse space and a smoother); where each
    is a full preconditioner, their sum overshoots: use `nks.Multiplicative`.

    **Arguments:**

    - `parts`: the preconditioners.

    Storage: that of the parts. Work: one application of each; no matvec.

    Source: Saad, Iterative Methods for Sparse Linear Systems, 2nd ed., section 14.3.3.
    """

    parts: tuple[AbstractPreconditioner, ...]

    def __init__(self, parts: Sequence[AbstractPreconditioner]):
        self.parts = checked_parts("Additive", parts)

    @property
    def keeps_operator(self) -> bool:
        return False

    def operators(self, operator: lx.AbstractLinearOperator) -> list[lx.AbstractLinearOperator]:
        return [operator] * len(self.parts)

    def combined(self, state: CompositeState, parts: list[AbstractLinearMap]) -> AbstractLinearMap:
        return _Sum(tuple(parts))


class Multiplicative(AbstractComposite):
    """z = 0; z ← z + Mᵢ⁻¹(r − J z) for i = 1 … k: I − M⁻¹J = (I − M_k⁻¹J) … (I − M₁⁻¹J).

    Its transpose is the same with Jᵀ and Mᵢ⁻ᵀ in reversed order. `Multiplicative([A, B, A])` is
    symmetric where J, A and B are.

    **Arguments:**

    - `parts`: the preconditioners, the first to act first.

    The matvecs inside an application are not among `num_matvecs`: k − 1 for each of
    `num_preconditioner_applications`.

    Storage: that of the parts, and 2 vectors. Work: one application of each, k − 1 matvecs.

    Source: Saad, Iterative Methods for Sparse Linear Systems, 2nd ed., section 14.3.2.
    """

    parts: tuple[AbstractPreconditioner, ...]

    def __init__(self, parts: Sequence[AbstractPreconditioner]):
        self.parts = checked_parts("Multiplicative", parts)

    @property
    def keeps_operator(self) -> bool:
        return len(self.parts) > 1

    @property
    def keeps_symmetry(self) -> bool:
        return super().keeps_symmetry and _is_mirrored(self.parts)

    def operators(self, operator: lx.AbstractLinearOperator) -> list[lx.AbstractLinearOperator]:
        return [operator] * len(self.parts)

    def combined(self, state: CompositeState, parts: list[AbstractLinearMap]) -> AbstractLinearMap:
        if state.operator is None:
            return parts[0]
        return _Product(OperatorMap(state.operator), tuple(parts))


class _Sum(AbstractLinearMap):
    parts: tuple[AbstractLinearMap, ...]

    def mv(self, vector: Vector) -> Vector:
        return _added([part.mv(vector) for part in self.parts])

    def transpose_mv(self, vector: Vector) -> Vector:
        return _added([part.transpose_mv(vector) for part in self.parts])


class _Product(AbstractLinearMap):
    linear_map: AbstractLinearMap  # J
    parts: tuple[AbstractLinearMap, ...]

    def mv(self, vector: Vector) -> Vector:
        return _sweep(self.linear_map.mv, [part.mv for part in self.parts], vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        parts = [TransposedMap(part).mv for part in reversed(self.parts)]
        return _sweep(self.linear_map.transpose_mv, parts, vector)


def _sweep(mv: LinearFn, parts: list[LinearFn], r: Vector) -> Vector:
    z = parts[0](r)
    for part in parts[1:]:
        z = tree.add(z, part(tree.sub(r, mv(z))))
    return z


def _is_mirrored(parts: tuple[AbstractPreconditioner, ...]) -> bool:
    """Whether the parts read the same from both ends; traced numbers in them may."""
    pairs = [eqx.tree_equal(a, b) for a, b in zip(parts, reversed(parts), strict=True)]
    return all(isinstance(same, jax.core.Tracer) or bool(same) for same in pairs)


def _added(vectors: list[Vector]) -> Vector:
    total = vectors[0]
    for vector in vectors[1:]:
        total = tree.add(total, vector)
    return total


def checked_parts(
    name: str, parts: Sequence[AbstractPreconditioner]
) -> tuple[AbstractPreconditioner, ...]:
    """The parts as a tuple; raises where they are no preconditioners."""
    parts = tuple(parts)
    if not parts or not all(isinstance(part, AbstractPreconditioner) for part in parts):
        raise TypeError(
            f"`{name}` takes one or more preconditioners, such as `nks.Jacobi(...)`; a function "
            f"is wrapped in `nks.UserPreconditioner`. Got {parts!r}."
        )
    return parts

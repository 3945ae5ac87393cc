"""The residuals of a batch of lanes: what is shared, what is a lane's own, and their Jacobian."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from .. import tree
from ..linearise.linearisation import Linearisation
from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..linearise.policies import AbstractPolicy
from ..linearise.split import depends
from ..linearise.trace import LinearisedProgram, Program, ProgramAt
from ..newton.compacting import select, take
from ..typing import Vector


class LanePrograms(eqx.Module):
    """A linearised program at the parameters of every lane.

    What depends on shared parameters alone is held once. `own` are the arrays of which each lane
    has its own.
    """

    program: LinearisedProgram = eqx.field(static=True)
    own: list[Array]
    shared: list[Array]
    is_own: tuple[bool, ...] = eqx.field(static=True)

    def at(self, own: Sequence[Array]) -> ProgramAt:
        """The program of the lane whose own arrays these are."""
        return ProgramAt(self.program, merged(own, self.shared, self.is_own))


def lane_programs(
    program: Program,
    y: Vector,
    params: Sequence[Array],
    is_own: Sequence[bool],
    active: Sequence[bool],
    policy: AbstractPolicy,
) -> LanePrograms:
    """Linearises the program of a lane, and runs for every lane what does not depend on y.

    y and the parameters that are a lane's own have a leading axis.
    """
    example = [p[0] if own else p for p, own in zip(params, is_own, strict=True)]
    linearised = LinearisedProgram(program, take(y, 0), example, active, policy)
    shared = [p for p, own in zip(params, is_own, strict=True) if not own]
    mine = [p for p, own in zip(params, is_own, strict=True) if own]

    def cold(own):
        return linearised.at(merged(own, shared, is_own)).cold

    flags = tuple(depends(cold, [p[0] for p in mine])) if mine else ()
    flags = flags or (False,) * len(jax.eval_shape(cold, [p[0] for p in mine]))
    if not mine:
        return LanePrograms(linearised, [], cold([]), flags)
    axes = [0 if own else None for own in flags]
    arrays = jax.vmap(cold, out_axes=axes)(mine)
    pairs = list(zip(arrays, flags, strict=True))
    own_arrays, shared_arrays = ([a for a, own in pairs if own is f] for f in (True, False))
    return LanePrograms(linearised, own_arrays, shared_arrays, flags)


class BatchLinearisation(eqx.Module):
    """The linearisations of all lanes at points of their own: one batched evaluation.

    `kept` are the arrays of the linear maps that depend on the points.
    """

    programs: LanePrograms
    kept: list[Array]
    tags: frozenset[object] = eqx.field(static=True)

    @property
    def own(self) -> PyTree:
        """What `lane` takes, for all lanes."""
        return self.programs.own, self.kept

    def lane(self, own: PyTree) -> Linearisation:
        """The linearisation (without value and aux) of a lane."""
        arrays, kept = own
        return self.programs.at(arrays).recalled(kept, self.tags)

    def joined(self, y: Vector, axes: Sequence[int | None]) -> Linearisation:
        """The batch as one system, whose Jacobian has a block for each lane.

        `axes` are those of the active parameters.
        """
        structure = tree.structure(y)
        operator = JacobianOperator(_Blocks(self, _jacobian, _Hashed((0,))), structure, structure)
        joint = _Blocks(self, _joint, _Hashed(((0, list(axes)),)))
        return Linearisation(y, None, operator, joint)


def linearised_lanes(
    programs: LanePrograms, y: Vector, tags: frozenset[object]
) -> BatchLinearisation:
    """Linearises at y in every lane."""

    def kept(own, y):
        return programs.program.evaluate(programs.at(own).cold, y)[1]

    return BatchLinearisation(programs, jax.vmap(kept)(programs.own, y), tags)


class _Blocks(AbstractLinearMap):
    """A linear map of every lane."""

    lanes: BatchLinearisation
    pick: Callable[[Linearisation], AbstractLinearMap] = eqx.field(static=True)
    axes: Any = eqx.field(static=True)

    def mv(self, vector: Vector) -> Vector:
        apply = lambda own, v: self.pick(self.lanes.lane(own)).mv(v)
        return jax.vmap(apply, in_axes=(0, *self.axes.value))(self.lanes.own, vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        apply = lambda own, w: self.pick(self.lanes.lane(own)).transpose_mv(w)
        return jax.vmap(apply)(self.lanes.own, vector)


class _Hashed:
    """A value compared by its text, for a static field."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))


def _jacobian(lin: Linearisation) -> Any:
    return lin.operator


def _joint(lin: Linearisation) -> AbstractLinearMap:
    return lin.joint


def merged(own: Sequence[Any], shared: Sequence[Any], is_own: Sequence[bool]) -> list[Any]:
    """Both lists as one, in the order that the flags say."""
    own_, shared_ = iter(own), iter(shared)
    return [next(own_) if flag else next(shared_) for flag in is_own]


def set_aside(good: Bool[Array, " batch"], lanes: PyTree) -> PyTree:
    """Lanes that are not good become copies of one that is, so that nothing of them (0 · NaN)
    reaches what the lanes share."""
    spare = take(lanes, jnp.argmax(good))

    def one(x, sound):
        if not eqx.is_inexact_array(x):
            return x
        return select(good, x, jnp.broadcast_to(sound, x.shape))

    return jax.tree_util.tree_map(one, lanes, spare)

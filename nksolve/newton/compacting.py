"""A driver for many independent root finds that takes finished lanes out of the batch."""

import functools as ft
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree

from .. import tree
from ..loops import any_lane
from ..results import REASONS
from ..typing import Args, Aux, Fn, Y
from .hurried import LANES, hurried
from .state import Counters, NewtonState

#: Most stages: each compiles a loop of its own.
MAX_STAGES = 5

#: `lane(own)`: solver, residual and args of one lane from what is its own.
Lane: TypeAlias = Callable[[PyTree], tuple[Any, Fn, Args]]

_each = eqx.if_array(0)


class Stages(NamedTuple):
    """What was executed, idle lanes included; one entry for each stage.

    **Attributes:**

    - `size`: lanes of the stage.
    - `num_steps`: steps at that size, each of which evaluates `fn` once in every lane.
    - `num_lane_evals`: `size` times `num_steps`.
    - `num_lane_matvecs`: `size` times the matvecs of the lane that took most, summed over steps.
    """

    size: Int[Array, " stages"]
    num_steps: Int[Array, " stages"]
    num_lane_evals: Int[Array, " stages"]
    num_lane_matvecs: Int[Array, " stages"]


class _Bucket(NamedTuple):
    """Lanes that are stepped together. All arrays have the lanes as their first axis."""

    index: Int[Array, " lanes"]  # in the batch; its length for a lane that only fills up
    own: PyTree
    y: Any
    aux: Any
    state: Any
    cut: Bool[Array, " lanes"]  # a linear solve was left before it was any good


class _Outcome(NamedTuple):
    """Of each lane of the batch."""

    y: Any
    aux: Any
    result: Any
    stats: Any
    cut: Bool[Array, " batch"]


class _Problem(NamedTuple):
    lane: Lane
    sizes: tuple[int, ...]
    max_steps: int
    f_struct: PyTree
    aux_struct: PyTree
    tags: frozenset[object]


def bucket_sizes(batch: int, fractions: Sequence[int | float]) -> tuple[int, ...]:
    """The sizes of the stages, decreasing from the whole batch."""
    fractions = tuple(float(f) for f in fractions)
    decreasing = all(a > b for a, b in itertools.pairwise(fractions))
    if not fractions or fractions[0] != 1 or not decreasing or not fractions[-1] > 0:
        raise ValueError(
            "`fractions` must decrease from 1 and stay above 0, such as (1, 1/4, 1/16), but they "
            f"are {fractions}."
        )
    if len(fractions) > MAX_STAGES:
        raise ValueError(
            f"`fractions` may have at most {MAX_STAGES} entries, since each compiles a loop of its "
            f"own, but it has {len(fractions)}."
        )
    return tuple(dict.fromkeys(max(1, math.ceil(batch * f - 1e-9)) for f in fractions))


def iterate_compacted(
    lane: Lane,
    y0: Y,
    own: PyTree,
    *,
    sizes: tuple[int, ...],
    max_steps: int,
    f_struct: PyTree,
    aux_struct: PyTree,
    tags: frozenset[object],
) -> tuple[Y, Aux, optx.RESULTS, dict[str, Any]]:
    """As `iterate`, lane by lane, in stages of fewer and fewer lanes.

    Stage k steps its lanes in lockstep until no more than the next size are unfinished, and these
    are gathered. So that a few hard lanes do not keep the rest waiting within a step either, a
    Krylov solve leaves as soon as no more than that many lanes want more of it; those take an
    inexact step, or wait if it would be none. One that fails with such steps is solved once more
    from its start, unhurried.
    """
    problem = _Problem(lane, sizes, max_steps, f_struct, aux_struct, tags)
    batch = sizes[0]

    def attempt(pending, hasty):
        return _attempt(problem, y0, own, pending, hasty)

    everything = jnp.ones(batch, bool)
    if len(sizes) == 1:
        outcome, stages = attempt(everything, jnp.array(False))
        return _finished(outcome, stages, max_steps)
    shapes = eqx.filter_eval_shape(attempt, everything, jnp.array(True))
    dynamic, static = eqx.partition(shapes, _is_struct)
    start = tree.zeros_like(dynamic)

    def body(carry):
        hasty, pending, old = carry
        outcome, stages = attempt(pending, hasty)
        old_outcome, old_stages = eqx.combine(old, static)
        outcome = select(pending, outcome, old_outcome)
        again = (outcome.result != optx.RESULTS.successful) & outcome.cut & hasty
        total = jtu.tree_map(jnp.add, stages._replace(size=0 * stages.size), old_stages)
        total = total._replace(size=stages.size)
        new, _ = eqx.partition((outcome, total), eqx.is_array)
        return jnp.array(False), pending & again, new

    carry = (jnp.array(True), everything, start)
    _, _, out = lax.while_loop(lambda c: any_lane(jnp.any(c[1])), body, carry)
    outcome, stages = eqx.combine(out, static)
    return _finished(outcome, stages, max_steps)


def _finished(outcome, stages, max_steps):
    stats = {**outcome.stats, "stages": stages, "max_steps": max_steps}
    return outcome.y, outcome.aux, outcome.result, stats


def _attempt(
    problem: _Problem, y0: Y, own: PyTree, pending: Bool[Array, " batch"], hasty: Array
) -> tuple[_Outcome, Stages]:
    """One try at the pending lanes, through all stages; the others are held."""
    sizes, batch = problem.sizes, problem.sizes[0]

    def begin(own, y, pending):
        solver, fn, args = problem.lane(own)
        state = solver.init(fn, y, args, {}, problem.f_struct, problem.aux_struct, problem.tags)
        return held(state, ~pending), tree.zeros_like(problem.aux_struct)

    state, aux = eqx.filter_vmap(begin)(own, y0, pending)
    index = jnp.arange(batch, dtype=jnp.int32)
    bucket = _Bucket(index, own, y0, aux, state, jnp.zeros_like(pending))
    trial, outcomes, executed = jnp.zeros((), jnp.int32), [], []
    for size, left in zip(sizes, (*sizes[1:], 0), strict=True):
        if outcomes:
            bucket = _gathered(problem, bucket, size, batch)
        haste = jnp.where(hasty, left, 0)
        trial, steps, matvecs, bucket = _stage(problem, trial, bucket, left, haste)
        found = _outcome(problem, bucket)
        outcomes.append(scatter(bucket.index, found, outcomes[-1]) if outcomes else found)
        executed.append((jnp.full_like(steps, size), steps, size * steps, size * matvecs))
    return outcomes[-1], Stages(*(jnp.stack(row) for row in zip(*executed, strict=True)))


def _stage(
    problem: _Problem, trial: Array, bucket: _Bucket, left: int, haste: Array
) -> tuple[Array, Array, Array, _Bucket]:
    """Steps until at most `left` lanes are unfinished: (trials so far, steps, matvecs, bucket)."""
    moving, static = eqx.partition(bucket._replace(index=None, own=None), eqx.is_array)

    def step(own, y, state):
        solver, fn, args = problem.lane(own)
        solver = hurried(solver, haste)
        return solver.step(fn, y, args, {}, state, problem.tags)

    def joined(moving):
        return eqx.combine(moving, static)._replace(index=bucket.index, own=bucket.own)

    def unfinished(loop):
        trial, _, _, moving = loop
        count = jnp.sum(~_stopped(problem, joined(moving))[0], dtype=jnp.int32)
        return any_lane(count > left) & (trial <= problem.max_steps)

    def body(loop):
        trial, steps, matvecs, moving = loop
        old = joined(moving)
        y, state, aux = eqx.filter_vmap(step, axis_name=LANES)(old.own, old.y, old.state)
        made = jnp.max(_matvecs(state) - _matvecs(old.state))
        new = _waiting(old, old._replace(y=y, aux=aux, state=state), haste)
        new, new_static = eqx.partition(new._replace(index=None, own=None), eqx.is_array)
        assert eqx.tree_equal(static, new_static) is True
        return trial + 1, steps + 1, matvecs + made, new

    none = jnp.zeros((), jnp.int32)
    trial, steps, matvecs, moving = lax.while_loop(unfinished, body, (trial, none, none, moving))
    return trial, steps, matvecs, joined(moving)


def _waiting(old: _Bucket, new: _Bucket, haste: Array) -> _Bucket:
    """After a step: lanes whose linear solve was left before it was any good have not made it.

    As long as more than `haste` lanes want more of a linear solve, it is not left: if that many
    failed, some did so for good.
    """
    failures = [c.num_linear_failures for c in _counters(new.state)]
    before = [c.num_linear_failures for c in _counters(old.state)]
    failed = jnp.zeros_like(new.cut)
    for now, then in zip(failures, before, strict=True):
        failed |= now > then
    useless = failed & _has_reason(new.state, REASONS.linear_solve_failed)
    few = jnp.sum(useless, dtype=jnp.int32) <= haste
    kept = select(useless & few, _without_workspace(old), _without_workspace(new))
    is_newton = lambda x: isinstance(x, NewtonState)

    def whole(k, n):
        return k._replace(workspace=n.workspace) if is_newton(n) else k

    kept = jtu.tree_map(whole, kept, new, is_leaf=is_newton)
    return kept._replace(cut=old.cut | (failed & (haste > 0)))


def _without_workspace(bucket: _Bucket) -> _Bucket:
    """What is worth selecting over: a basis is large, and of no use before the next solve."""
    is_newton = lambda x: isinstance(x, NewtonState)

    def one(x):
        return x._replace(workspace=None) if is_newton(x) else x

    return jtu.tree_map(one, bucket, is_leaf=is_newton)


def _stopped(problem: _Problem, bucket: _Bucket) -> tuple[Bool[Array, " lanes"], Any]:
    def one(own, y, state):
        solver, fn, args = problem.lane(own)
        return solver.terminate(fn, y, args, {}, state, problem.tags)

    return eqx.filter_vmap(one)(bucket.own, bucket.y, bucket.state)


def _outcome(problem: _Problem, bucket: _Bucket) -> _Outcome:
    stopped, result = _stopped(problem, bucket)

    def one(own, y, aux, state, cut, stopped, result):
        solver, fn, args = problem.lane(own)
        exhausted = (result == optx.RESULTS.successful) & ~stopped
        result = optx.RESULTS.where(exhausted, optx.RESULTS.nonlinear_max_steps_reached, result)
        y, aux, stats = solver.postprocess(fn, y, aux, args, {}, state, problem.tags, result)
        return _Outcome(y, aux, result, stats, cut)

    return eqx.filter_vmap(one)(*bucket[1:], stopped, result)


def _gathered(problem: _Problem, bucket: _Bucket, size: int, batch: int) -> _Bucket:
    """The unfinished lanes, filled up with copies of a finished one, which `step` leaves alone."""
    stopped, _ = _stopped(problem, bucket)
    rows, source = unfinished_rows(~stopped, size)
    lanes = take(bucket, source)
    return lanes._replace(index=jnp.where(rows < len(stopped), lanes.index, batch))


def unfinished_rows(
    unfinished: Bool[Array, " lanes"], size: int
) -> tuple[Int[Array, " size"], Int[Array, " size"]]:
    """(rows of the unfinished lanes, the number of lanes where there are no more; rows to gather,
    a finished lane in their place)."""
    (rows,) = jnp.nonzero(unfinished, size=size, fill_value=len(unfinished))
    spare = jnp.argmin(unfinished)
    return rows, jnp.where(rows < len(unfinished), rows, spare)


def take(lanes: Any, rows: Array | int) -> Any:
    """These rows of every array."""
    return jtu.tree_map(lambda x: x[rows] if eqx.is_array(x) else x, lanes)


def scatter(index: Int[Array, " lanes"], part: Any, whole: Any) -> Any:
    """`part` written to these rows of every array of `whole`; an index beyond it is dropped."""

    def one(x, full):
        return full.at[index].set(x, mode="drop") if eqx.is_array(x) else full

    return jtu.tree_map(one, part, whole)


def select(flags: Bool[Array, " lanes"], a: Any, b: Any) -> Any:
    """a in the lanes where the flag holds, else b."""

    def one(x, y):
        if not eqx.is_array(x):
            return x
        return jnp.where(flags.reshape(-1, *([1] * (x.ndim - 1))), x, y)

    return jtu.tree_map(one, a, b)


def _is_reason(x: Any) -> bool:
    return isinstance(x, type(REASONS.iterating)) and x._enumeration is REASONS


def held(state: PyTree, flag: Array) -> PyTree:
    """The state of a lane, stopped where the flag holds."""

    def one(x):
        return REASONS.where(flag, REASONS.max_steps, x) if _is_reason(x) else x

    return jtu.tree_map(one, state, is_leaf=_is_reason)


def _has_reason(state: PyTree, reason: REASONS) -> Bool[Array, " lanes"]:
    found = [x for x in jtu.tree_leaves(state, is_leaf=_is_reason) if _is_reason(x)]
    return ft.reduce(jnp.logical_or, [x == reason for x in found])


def _counters(state: PyTree) -> list[Counters]:
    is_counters = lambda x: isinstance(x, Counters)
    return [c for c in jtu.tree_leaves(state, is_leaf=is_counters) if is_counters(c)]


def _matvecs(state: PyTree) -> Int[Array, " lanes"]:
    made = [c.num_matvecs + c.num_transposed_matvecs + c.num_probes for c in _counters(state)]
    return ft.reduce(jnp.add, made)


def _is_struct(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")

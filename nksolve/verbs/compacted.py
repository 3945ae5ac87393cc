"""`compacted_root_find`: many independent root finds, of which finished ones leave the batch."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jaxtyping import Array, PyTree

from .. import tree
from ..adjoint.base import (
    AbstractImplicitAdjoint,
    AbstractImplicitSolve,
    check_differentiable,
    implicit_tangents,
    stop_gradient,
)
from ..adjoint.failure import nan_where
from ..adjoint.krylov import KrylovAdjoint
from ..linearise.inspect import check_unknown
from ..linearise.trace import Program, trace
from ..newton.base import AbstractRootFinder
from ..newton.compacting import bucket_sizes, iterate_compacted, select, take
from ..rule import ForwardRule
from ..typing import Args, Fn, Vector, Y
from .compacted_linear import BatchSolve, LaneData
from .lanes import lane_programs, linearised_lanes, merged, set_aside
from .memory import recalled, resumed


def compacted_root_find(
    fn: Fn,
    solver: optx.AbstractRootFinder,
    y0: Y,
    args: Args = None,
    *,
    in_axes: Any = 0,
    fractions: Sequence[int | float] = (1, 1 / 4, 1 / 16, 1 / 64),
    memory: PyTree = None,
    has_aux: bool = False,
    max_steps: int = 256,
    adjoint: optx.AbstractAdjoint | None = None,
    throw: bool = True,
    tags: frozenset[object] = frozenset(),
) -> optx.Solution:
    """Finds y with fn(y, args) = 0 for each sample of a batch, working on unfinished ones only.

    Each sample is solved as by `nks.root_find`, with its own tolerance, forcing terms and Krylov
    space. All samples are stepped together until no more than the next of `fractions` of them are
    unfinished; these are gathered into smaller arrays, and so on. Derivatives are those of
    `nks.root_find` for each sample, from one linearisation of the whole batch at the roots; their
    linear solves are compacted too.

    Within a Newton step no sample waits for a few hard ones either: the Krylov solves of a stage
    end as soon as no more samples want to go on than the next stage has room for, and these take
    inexact steps until they are among themselves. So the counters of a hard sample differ from
    those of the sample alone, its root does not beyond the tolerance. One that fails with such
    steps is tried again from its start, without hurry.

    A sample whose residual is NaN or infinite from the start gets its y0 back, with the reason
    `nonfinite`, and has no derivative (zero): neither its values nor its derivatives reach the
    other samples or what the samples share.

    **Arguments:**

    - `fn`: the residual of one sample, `fn(y, args) -> f`; with `has_aux` a pair `(f, aux)`.
    - `solver`: any of nksolve's root finders.
    - `y0`: initial points: every array has the batch as its first axis.
    - `in_axes`: 0 or `None` for every part of `args`, as for `jax.vmap`: whether its arrays have
      the batch as their first axis, or are shared by all samples, such as weights:
      `args=(weights, x), in_axes=(None, 0)`.
    - `fractions`: sizes of the stages as fractions of the batch, from 1 down, at most five. Each
      compiles a loop of its own.
    - `memory`: per sample, what the solver may start from (`info.memory` of a layer).
    - `adjoint`: an adjoint of nksolve, `nks.KrylovAdjoint()` by default. It always linearises anew
      at the roots, and starts from no recycled space.
    - `has_aux`, `max_steps`, `throw`, `tags`: as for `nks.root_find`; `throw` raises if any sample
      fails.

    **Returns:** `optimistix.Solution` as from a vmapped `nks.root_find`: `result` and everything in
    `stats` have an entry for each sample; and `stats["stages"]`, what was executed:
    `size`, `num_steps`, `num_lane_evals` and `num_lane_matvecs` of each stage, with idle samples.

    Storage: that of a vmapped `nks.root_find`, and of each smaller stage its share of it.
    """
    if not isinstance(max_steps, int) or max_steps < 0:
        raise ValueError(f"`max_steps` must be a non-negative integer, but it is {max_steps!r}.")
    if not isinstance(solver, AbstractRootFinder):
        raise TypeError(
            "`compacted_root_find` steps nksolve's own solvers, such as `nks.NewtonKrylov`, but "
            f"got {type(solver).__name__}. Vmap `nks.root_find` for those of Optimistix."
        )
    adjoint = KrylovAdjoint() if adjoint is None else adjoint
    if not isinstance(adjoint, AbstractImplicitAdjoint):
        raise TypeError(
            "`compacted_root_find` takes nksolve's adjoints, such as `nks.KrylovAdjoint()`, but "
            f"got {type(adjoint).__name__}."
        )
    y0, args = jtu.tree_map(_as_array, (y0, args))
    check_unknown(y0)
    own = _marked(in_axes, args)
    sizes = bucket_sizes(_batch(y0, args, own, memory), fractions)
    return _compacted(
        fn, solver, y0, args, memory, own, sizes, has_aux, max_steps, adjoint, throw,
        frozenset(tags),
    )  # fmt: skip


@eqx.filter_jit
def _compacted(
    fn, solver, y0, args, memory, own, sizes, has_aux, max_steps, adjoint, throw, tags
):  # fmt: skip
    arrays, static = eqx.partition(args, eqx.is_array)
    mine, shared = eqx.partition(arrays, own)
    first = eqx.combine(take(mine, 0), shared, static)
    program, params = trace(fn, take(y0, 0), first, has_aux=has_aux)
    leaves = jtu.tree_leaves(arrays)
    consts = params[: len(params) - len(leaves)]
    pairs = zip(jtu.tree_leaves(args), jtu.tree_leaves(own), strict=True)
    flags = [flag for leaf, flag in pairs if eqx.is_array(leaf)]
    problem = _Problem(
        program=program,
        solver=stop_gradient(solver),
        linear=adjoint.resolved(solver, None, tags, throw=throw),
        y0=stop_gradient(y0),
        mine=stop_gradient(mine),
        rest=eqx.combine(stop_gradient(shared), static),
        memory=stop_gradient(memory),
        is_own=(*([False] * len(consts)), *flags),
        sizes=sizes,
        max_steps=max_steps,
        tags=tags,
    )
    variables, aux, result, stats = _roots([*consts, *leaves], problem=problem)
    if throw:
        failed = result != optx.RESULTS.successful
        raising = lambda reason, failed, y: nan_where(reason.error_if(failed, failed), y)
        variables = eqx.filter_vmap(raising)(stats["reason"], failed, variables)
    value = eqx.combine(variables, eqx.filter(y0, eqx.is_inexact_array, inverse=True))
    return optx.Solution(
        value=value, result=result, aux=program.complete(aux), stats=stats, state=None
    )


class _Problem(eqx.Module):
    """The root finds but for their parameters; nothing here is differentiated."""

    program: Program
    solver: AbstractRootFinder
    linear: AbstractImplicitSolve
    y0: Y
    mine: PyTree  # the arrays of args that each sample has of its own
    rest: PyTree  # the rest of args
    memory: PyTree
    is_own: tuple[bool, ...] = eqx.field(static=True)  # of the parameters
    sizes: tuple[int, ...] = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True)

    def programs(self, y: Vector, params: Sequence[Array], active: Sequence[bool]):
        """The residuals of all samples, linearised in y and the active parameters."""
        policy = self.solver.policy
        return lane_programs(self.program, y, params, self.is_own, active, policy)


@ForwardRule
def _roots(params: list[Array], *, problem: _Problem) -> PyTree:
    """(y, aux, result, stats) as a function of the parameters."""
    variables = eqx.filter(problem.y0, eqx.is_inexact_array)
    programs = problem.programs(variables, params, [False] * len(params))

    def lane(own):
        arrays, mine, memory = own
        args = eqx.combine(mine, problem.rest)
        return resumed(problem.solver, memory), programs.at(arrays), args

    def aux_of(arrays, y):
        return programs.at(arrays).linearise(y, problem.tags).aux

    first = take((programs.own, variables), 0)
    y, aux, result, stats = iterate_compacted(
        lane,
        problem.y0,
        (programs.own, problem.mine, problem.memory),
        sizes=problem.sizes,
        max_steps=problem.max_steps,
        f_struct=programs.program.out_structure,
        aux_struct=jax.eval_shape(aux_of, *first),
        tags=problem.tags,
    )
    return eqx.filter(y, eqx.is_inexact_array), aux, result, stats


@_roots.def_jvp
def _roots_jvp(primals, tangents, *, problem):
    (params,), (t_params,) = primals, tangents
    check_differentiable(problem.solver.policy)
    out = _roots(params, problem=problem)
    y, aux, _, stats = out
    good = jnp.isfinite(stats["residual_norm"])
    active = [t is not None for t in t_params]
    # Nothing of a sample without a finite residual may meet what is shared, not even times zero.
    mine = [p for p, own in zip(params, problem.is_own, strict=True) if own]
    shared = [p for p, own in zip(params, problem.is_own, strict=True) if not own]
    mine, at, data = set_aside(good, (mine, y, problem.mine))
    params = merged(mine, shared, problem.is_own)
    some = jnp.any(good)
    pairs = [(t, own) for t, own in zip(t_params, problem.is_own, strict=True) if t is not None]
    chosen = [tree.where(some, t, tree.zeros_like(t)) for t, _ in pairs]
    axes = [0 if own else None for _, own in pairs]
    lanes = linearised_lanes(problem.programs(at, params, active), at, problem.tags)
    data = LaneData(lanes.own, at, data, recalled(stats))
    solve = BatchSolve(problem.linear, lanes, data, problem.rest, good, problem.sizes)
    dy, daux = implicit_tangents(lanes.joined(at, axes), at, chosen, solve)
    daux = select(good, daux, tree.zeros_like(daux))
    flat, treedef = jtu.tree_flatten(aux)
    moved = iter(jtu.tree_leaves(daux))
    t_aux = [next(moved) if eqx.is_inexact_array(leaf) else None for leaf in flat]
    nothing = jtu.tree_map(lambda _: None, out[2:])
    return out, (dy, jtu.tree_unflatten(treedef, t_aux), *nothing)


def _as_array(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def _marked(in_axes: Any, args: Args) -> PyTree:
    """For every leaf of args: whether it is an array of which each sample has its own."""

    def part(axis, below):
        if not (axis is None or (isinstance(axis, int) and axis == 0)):
            raise ValueError(f"`in_axes` may hold 0 and None only, but it holds {axis!r}.")
        return jtu.tree_map(lambda leaf: axis is not None and eqx.is_array(leaf), below)

    return jtu.tree_map(part, in_axes, args, is_leaf=lambda x: x is None)


def _batch(y0: Y, args: Args, own: PyTree, memory: PyTree) -> int:
    arrays = eqx.filter((y0, memory), eqx.is_array), eqx.filter(args, own)
    lengths = {x.shape[0] if x.ndim else 0 for x in jtu.tree_leaves(arrays)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "Every array of y0, and every array of args that `in_axes` marks with 0, needs the "
            "batch as its first axis, of the same length and not empty; the first axes are "
            f"{sorted(lengths)}. Mark what the samples share with None."
        )
    return lengths.pop()

"""J x = b lane by lane, for the derivatives of a batch: solved lanes are taken out of it."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, PyTree

from .. import tree
from ..adjoint.base import AbstractImplicitSolve, stop_gradient
from ..adjoint.krylov import ADVICE, KrylovSolve, measured
from ..adjoint.report import code_of, tell
from ..krylov.base import AbstractKrylovSolver
from ..krylov.basis import as_real_space
from ..krylov.system import KrylovState
from ..linearise.tags import holomorphic_tag
from ..loops import any_lane
from ..newton.compacting import scatter, select, take, unfinished_rows
from ..newton.hurried import LANES, hurried
from ..typing import Args, Scalar, Vector, Y
from .lanes import BatchLinearisation


class LaneData(NamedTuple):
    """What the solve of each lane takes; every array has the lanes as its first axis."""

    own: PyTree  # of the linearisation
    y: Y
    args: PyTree  # the arrays of args of which each lane has its own
    memory: dict[str, Any]  # what the solve of each lane left


class BatchSolve(eqx.Module):
    """x ≈ J⁻¹b in every lane, as the adjoint solves; J has a block for each.

    A Krylov adjoint is compacted: stage k runs its lanes until no more than the next size are
    unsolved, which go on from where they are in fewer lanes. Any other adjoint does the same work
    in all lanes, and runs for all of them at once.
    """

    linear: AbstractImplicitSolve
    lanes: BatchLinearisation
    data: LaneData
    rest: PyTree  # the rest of args
    good: Bool[Array, " batch"]
    sizes: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, operator: lx.AbstractLinearOperator, y: Y, b: Vector) -> Vector:
        """J⁻¹ b; zero in lanes that are not good."""
        del y
        held = stop_gradient(self)

        def solve(_, b):
            return held.run(b, transposed=False)

        def transpose_solve(_, b):
            return held.run(b, transposed=True)

        b = select(self.good, b, tree.zeros_like(b))
        x = lax.custom_linear_solve(operator.mv, b, solve, transpose_solve)
        return select(self.good, x, tree.zeros_like(x))

    def run(self, b: Vector, *, transposed: bool) -> Vector:
        """J⁻¹ b, or J⁻ᵀ b."""
        linear = self.linear
        real = as_real_space(b, holomorphic_tag in linear.tags)
        if isinstance(linear, KrylovSolve):
            compacted = _Compacted(linear, self.lanes, self.rest, real, transposed)
            return compacted.run(self.data._replace(memory={}), b, self.sizes)

        def one(data, b):
            args = eqx.combine(data.args, self.rest)
            mine = with_args(linear.continuing(data.memory), args)
            prepared = mine.prepare(self.lanes.lane(data.own).operator, data.y, real=real)
            prepared = prepared.transpose() if transposed else prepared
            return mine.run(prepared, b, real=real, transposed=transposed)

        return eqx.filter_vmap(one)(self.data, b)


class _Solve(NamedTuple):
    """A batch of solves. Arrays have the lanes as their first axis."""

    x: Vector
    result: Any
    num_matvecs: Array
    done: Array


class _Compacted(NamedTuple):
    """The solve of a `KrylovAdjoint`, in stages."""

    linear: KrylovSolve
    lanes: BatchLinearisation
    rest: PyTree
    real: bool
    transposed: bool

    def run(self, data: LaneData, b: Vector, sizes: tuple[int, ...]) -> Vector:
        """x for all lanes."""
        batch = sizes[0]
        norm, target = jax.vmap(self._target)(b)
        none = jnp.zeros(batch, jnp.int32)
        result = eqx.filter_vmap(lambda _: lx.RESULTS.successful)(none)
        solve = _Solve(tree.zeros_like(b), result, none, ~(norm > target))
        solve = self._stage(data, b, target, solve, next_size(sizes, 0), first=True)
        for k, size in enumerate(sizes[1:], start=1):
            rows, source = unfinished_rows(~solve.done, size)
            lanes = take((data, b, target, solve), source)
            part = self._stage(*lanes, next_size(sizes, k), first=False)
            solve = scatter(rows, part, solve)

        return eqx.filter_vmap(self._judged)(data, b, solve, norm, target)

    def _target(self, b: Vector) -> tuple[Scalar, Scalar]:
        """‖b‖, and the residual norm that the adjoint asks for."""
        norm, eps = tree.norm2(b), tree.eps(b)
        wanted = jnp.asarray(self.linear.rtol).astype(norm.dtype)
        rtol = jnp.where(wanted > 0, jnp.maximum(wanted, 2 * eps), 50 * eps)
        return norm, jnp.asarray(self.linear.atol).astype(norm.dtype) + rtol * norm

    def _judged(
        self, data: LaneData, b: Vector, solve: _Solve, norm: Scalar, target: Scalar
    ) -> Vector:
        """x, or what the adjoint puts in place of a failed solve; reported if it asks for that."""
        results, linear = lx.RESULTS, self.linear
        missed = solve.result != results.successful

        def measure():
            state = self._prepared(data)[1]
            operator = state.operator if state.wide is None else state.wide
            return measured(operator.mv, b, solve.x, norm)

        if linear.report:
            residual, floor = measure()
        else:
            unknown = (jnp.full_like(norm, jnp.inf), jnp.zeros_like(norm))
            residual, floor = lax.cond(any_lane(missed), measure, lambda: unknown)
        at_floor = missed & (residual <= floor)
        failed = missed & ~(residual <= jnp.maximum(floor, target))
        tell(
            linear.report,
            transposed=self.transposed,
            residual_norm=residual,
            rhs_norm=norm,
            solution_norm=tree.norm2(solve.x),
            num_matvecs=solve.num_matvecs + 2,
            code=code_of(
                results.where(missed & (residual <= target), results.successful, solve.result),
                at_floor,
            ),
        )
        return linear.failure(solve.x, failed, norm, ADVICE)

    def _stage(
        self, data: LaneData, b: Vector, target: Array, solve: _Solve, left: int, *, first: bool
    ) -> _Solve:
        """Runs until at most `left` lanes are unsolved; those keep the iterate that they reached.

        Where more than that are, some have failed. A second pass, which nothing hurries, tells
        which.
        """
        moving, static = eqx.partition(solve, eqx.is_array)

        def lane(data, b, target, x, done, haste):
            linear_solver, state = self._prepared(data)
            return hurried(linear_solver, haste).run(
                state,
                b,
                tolerance=jnp.where(done, jnp.inf, target),
                real=self.real,
                guess=None if first else x,
                verify=True,
            )

        def body(loop):
            hasty, moving = loop
            old = eqx.combine(moving, static)
            haste = jnp.where(hasty, left, 0)
            axes = (eqx.if_array(0),) * 5 + (None,)
            run = eqx.filter_vmap(lane, in_axes=axes, axis_name=LANES)
            out = run(data, b, target, old.x, old.done, haste)
            certain = (out.result == lx.RESULTS.successful) | (haste == 0)
            certain |= out.result == lx.RESULTS.breakdown
            made = out.num_matvecs + out.num_transposed_matvecs
            found = _Solve(out.value, out.result, old.num_matvecs + made, certain)
            new, _ = eqx.partition(select(~old.done, found, old), eqx.is_array)
            return jnp.array(False), new

        def unsolved(loop):
            done = eqx.combine(loop[1], static).done
            return any_lane(jnp.sum(~done, dtype=jnp.int32) > left)

        _, moving = lax.while_loop(unsolved, body, (jnp.array(True), moving))
        return eqx.combine(moving, static)

    def _prepared(self, data: LaneData) -> tuple[AbstractKrylovSolver, KrylovState]:
        operator = self.lanes.lane(data.own).operator
        linear = with_args(self.linear, eqx.combine(data.args, self.rest))
        prepared = linear.prepare(operator, data.y, real=self.real)
        state = prepared.state.transpose() if self.transposed else prepared.state
        return prepared.linear_solver, state


def next_size(sizes: tuple[int, ...], k: int) -> int:
    """That of the stage after stage k; 0 after the last."""
    return (*sizes, 0)[k + 1]


def with_args(linear: AbstractImplicitSolve, args: Args) -> AbstractImplicitSolve:
    """The solve at a lane's args."""
    return eqx.tree_at(lambda s: s.args, linear, args, is_leaf=lambda x: x is None)

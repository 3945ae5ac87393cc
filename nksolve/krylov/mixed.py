"""Solve in a lower precision, refine in the vector's own."""

from typing import Any, NamedTuple

import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import PyTree

from .. import tree
from ..loops import any_lane
from ..typing import Count, Flag, LinearFn, Scalar, ScalarLike, Vector
from .system import KrylovResult, KrylovState, LinearSystem


class _Work(NamedTuple):
    """The counters of a `KrylovResult`."""

    num_steps: Count
    num_matvecs: Count
    num_transposed_matvecs: Count
    num_preconditioner_applications: Count
    num_restarts: Count

    def plus(self, out: KrylovResult) -> "_Work":
        return _Work(*(old + getattr(out, name) for name, old in self._asdict().items()))

    def matvec(self, flag: Flag) -> "_Work":
        return self._replace(num_matvecs=self.num_matvecs + tree.count(flag))


class _Refinement(NamedTuple):
    x: Vector
    r: Vector  # b − A x, where it was needed
    residual: Scalar  # ‖b − A x‖, or what the Krylov method says of it
    work: _Work
    workspace: PyTree
    passes: Count
    done: Flag
    exhausted: Flag  # the Krylov method used up its steps


def solve_mixed(
    solver: Any,
    low: LinearSystem,
    state: KrylovState,
    vector: Vector,
    *,
    real: bool,
    tolerance: ScalarLike,
    workspace: PyTree,
    norm: Scalar | None = None,
    guess: Vector | None = None,
    verify: bool = False,
) -> KrylovResult:
    """Solves A x = vector in the vector's precision by solves in that of `state.operator`, of which
    `low` is the system.

    x ← x + d, A d ≈ b − A x by the Krylov method `solver` in the lower precision, until
    ‖b − A x‖ ≤ tolerance. The residual is computed in the vector's precision by `state.wide`, but
    not where the method says that it reached the tolerance and nobody verifies it. Where a pass
    does not halve the residual (κ(A) is beyond the lower precision), the rest is solved for in the
    vector's own, with the preconditioner of the lower; each but the first pass counts as a restart.
    `workspace` is of the lower precision.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., SIAM 2002, §12.1.
    """
    assert state.wide is not None
    wide, mv = state.wide, state.wide.mv
    space = state.operator.out_structure()
    norm = tree.norm2(vector) if norm is None else norm
    target = jnp.asarray(tolerance).astype(norm.dtype)
    work = _Work(*(jnp.zeros_like(norm, jnp.int32) for _ in _Work._fields))
    x, r, residual = tree.zeros_like(vector), vector, norm
    if guess is not None:
        x, r = guess, tree.sub(vector, mv(guess))
        residual = tree.norm2(r)
        work = work.matvec(jnp.isfinite(target))
    # No pass is asked for more than its precision can give.
    floor, dtype = 50 * tree.eps(space), tree.real_dtype(space)

    def refine(c: _Refinement) -> _Refinement:
        running = ~c.done
        unit = jnp.where(running, c.residual, jnp.ones_like(c.residual))
        wanted = jnp.where(running, jnp.maximum(target / unit, floor), jnp.inf)
        out = solver.solve(
            low,
            tree.cast_like(tree.scale(1 / unit, c.r), space),
            tolerance=wanted.astype(dtype),
            workspace=c.workspace,
            norm=jnp.ones_like(norm, dtype),
        )
        x = tree.axpy(unit, tree.cast_like(out.value, vector), c.x)
        estimate = out.residual_norm.astype(norm.dtype) * unit
        check = running & (verify | ~(estimate <= target))
        r = lax.cond(any_lane(check), lambda: tree.sub(vector, mv(x)), lambda: c.r)
        residual = jnp.where(check, tree.norm2(r), estimate)
        better = running & (residual < c.residual)
        exhausted = running & (out.result == lx.RESULTS.max_steps_reached)
        return _Refinement(
            x=tree.where(better, x, c.x),
            r=tree.where(better, r, c.r),
            residual=jnp.where(better, residual, c.residual),
            work=c.work.plus(out).matvec(check),
            workspace=out.workspace,
            passes=c.passes + tree.count(running),
            done=c.done | ~(residual > target) | ~(residual <= 0.5 * c.residual) | exhausted,
            exhausted=c.exhausted | exhausted,
        )

    done = ~(residual > target)
    none, no = jnp.zeros_like(norm, jnp.int32), jnp.zeros_like(done)
    start = _Refinement(x, r, residual, work, workspace, none, done, no)
    end = lax.while_loop(lambda c: any_lane(~c.done), refine, start)
    stuck = (end.residual > target) & ~end.exhausted

    def in_own_precision() -> tuple[Vector, Scalar, _Work, lx.RESULTS]:
        out = solver.solve(
            _widened(low, wide, space),
            end.r,
            tolerance=jnp.where(stuck, target, jnp.inf),
            workspace=solver.workspace(vector, real=real),
            norm=end.residual,
            verify=verify,
        )
        residual = jnp.where(stuck, out.residual_norm, end.residual)
        result = lx.RESULTS.where(stuck, out.result, lx.RESULTS.max_steps_reached)
        return tree.add(end.x, out.value), residual, end.work.plus(out), result

    def as_it_is() -> tuple[Vector, Scalar, _Work, lx.RESULTS]:
        result = lx.RESULTS.where(
            end.exhausted, lx.RESULTS.max_steps_reached, lx.RESULTS.stagnation
        )
        return end.x, end.residual, end.work, result

    x, residual, work, failed = lax.cond(any_lane(stuck), in_own_precision, as_it_is)
    failed = lx.RESULTS.where(jnp.isfinite(residual), failed, lx.RESULTS.breakdown)
    # Each pass but the first begins with the residual of the one before.
    again = jnp.maximum(end.passes - 1, 0) + tree.count(stuck)
    work = work._replace(num_restarts=work.num_restarts + again)
    return KrylovResult(
        value=x,
        residual_norm=residual,
        descent=None if guess is not None else norm**2 - norm * residual,
        result=lx.RESULTS.where(residual <= target, lx.RESULTS.successful, failed),
        workspace=end.workspace,
        **work._asdict(),
    )


def _widened(low: LinearSystem, wide: lx.AbstractLinearOperator, space: Any) -> LinearSystem:
    """The system in the precision of `wide`, whose preconditioner works in the lower."""

    def cast(apply: LinearFn | None, vector: Any) -> LinearFn | None:
        if apply is None:
            return None
        return lambda v: tree.cast_like(apply(tree.cast_like(v, space)), vector)

    structures = wide.in_structure(), wide.out_structure()
    return LinearSystem(
        wide.mv,
        cast(low.psolve, structures[0]),
        low.real,
        lambda w: wide.transpose().mv(w),
        cast(low.transpose_psolve, structures[1]),
    )

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
    done: Flag
    exhausted: Flag  # the Krylov method used up its steps


def solve_mixed(
    solver: Any,
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
    """Solves A x = vector in the vector's precision by solves in that of `state.operator`.

    x ← x + d, A d ≈ b − A x by the Krylov method `solver` in the lower precision, until
    ‖b − A x‖ ≤ tolerance. The residual is computed in the vector's precision by `state.wide`, but
    not where the method says that it reached the tolerance and nobody verifies it. Where a pass
    does not halve the residual (κ(A) is beyond the lower precision), the rest is solved for in the
    vector's own, with the preconditioner of the lower. `workspace` is of the lower precision.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., SIAM 2002, §12.1.
    """
    assert state.wide is not None
    mv, low = state.wide.mv, state.system(real)
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
            done=c.done | ~(residual > target) | ~(residual <= 0.5 * c.residual) | exhausted,
            exhausted=c.exhausted | exhausted,
        )

    done = ~(residual > target)
    start = _Refinement(x, r, residual, work, workspace, done, jnp.zeros_like(done))
    end = lax.while_loop(lambda c: any_lane(~c.done), refine, start)
    stuck = (end.residual > target) & ~end.exhausted

    def in_own_precision() -> tuple[Vector, Scalar, _Work, lx.RESULTS]:
        out = solver.solve(
            _widened(low, mv, vector, space),
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
    return KrylovResult(
        value=x,
        residual_norm=residual,
        descent=None if guess is not None else norm**2 - norm * residual,
        result=lx.RESULTS.where(residual <= target, lx.RESULTS.successful, failed),
        workspace=end.workspace,
        **work._asdict(),
    )


def _widened(low: LinearSystem, mv: LinearFn, vector: Vector, space: Any) -> LinearSystem:
    """The system in the vector's precision, whose preconditioner works in the lower."""
    psolve = low.psolve
    if psolve is None:
        return LinearSystem(mv, None, low.real)
    return LinearSystem(
        mv, lambda v: tree.cast_like(psolve(tree.cast_like(v, space)), vector), low.real
    )

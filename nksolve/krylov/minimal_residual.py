"""The restarted minimal-residual iteration that GMRES and FGMRES share.

One matvec site: a restart is the same step as an Arnoldi step with no rows filled, applied to
b − A x instead of A z. Columns are counted for the whole batch, convergence for each lane on small
arrays, so that under `vmap` nothing selects over a basis.
"""

from typing import NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx

from .. import tree
from ..loops import any_lane
from ..typing import Count, Flag, Scalar, ScalarLike, Vector
from .base import KrylovResult, LinearSystem
from .basis import Basis
from .hessenberg import Hessenberg
from .orthogonalise import AbstractOrthogonalisation, Appended


class Workspace(eqx.Module):
    """The Arnoldi basis V, and Z of the flexible variant (`None` without)."""

    arnoldi: Basis
    search: Basis | None


class _Lane(NamedTuple):
    """The small arrays of a lane. Norms are in units of ‖b‖."""

    hessenberg: Hessenberg
    beta: Scalar  # residual norm at the start of the cycle
    residual: Scalar  # its current estimate ‖r_j‖
    steps: Count
    matvecs: Count
    restarts: Count
    running: Flag  # still extending this cycle's space
    done: Flag
    stagnated: Flag
    broken: Flag  # b or A v was not finite


class _Cycle(NamedTuple):
    j: Count  # column, −1 for the restart step; the same for every lane
    workspace: Workspace
    lane: _Lane


class _Limits(NamedTuple):
    target: Scalar  # stop at ‖r‖ ≤ target
    max_steps: int
    verify: bool
    eps: float


def minimal_residual(
    system: LinearSystem,
    vector: Vector,
    *,
    tolerance: ScalarLike,
    workspace: Workspace,
    guess: Vector | None,
    verify: bool,
    max_steps: int,
    orthogonalisation: AbstractOrthogonalisation,
    left: bool,
) -> KrylovResult:
    """Minimises ‖b − A x‖ over x₀ + span(Z): Z = M⁻¹V on the right, V on the left.

    With `left`, A and b stand for M⁻¹A and M⁻¹b, and the relative tolerance is that of M⁻¹b.
    """
    if tree.size(vector) == 0:
        return _nothing(vector, workspace)
    restart = workspace.arnoldi.size - 1
    mv, psolve, b, unit, relative = _scaled(system, vector, tolerance, left)
    flexible = workspace.search is not None
    limits = _Limits(relative, max_steps, verify, tree.eps(b))

    def step(cycle: _Cycle, x: Vector) -> _Cycle:
        j, (basis, search), lane = cycle.j, _pair(cycle.workspace), cycle.lane
        restarting = j < 0
        v = basis.row(jnp.maximum(j, 0))
        if psolve is None:
            z = tree.where(restarting, x, v)
        else:
            z = lax.cond(restarting, lambda: x, lambda: psolve(v))
        if flexible:
            search = search.set_row(jnp.maximum(j, 0), z)
        w = mv(z)
        w = tree.where(restarting, tree.sub(b, w), w)  # b − A x, or A z_j
        new = orthogonalisation.append(basis, w, j + 1)
        lane = jtu.tree_map(
            lambda after_restart, after_step: jnp.where(restarting, after_restart, after_step),
            _restarted(lane, new, limits),
            _extended(lane, jnp.maximum(j, 0), new, limits),
        )
        return _Cycle(j + 1, Workspace(new.basis, search), lane)

    def cycle(carry):
        inner, x, descent = carry
        starts_at_b = (inner.j == 0) if guess is None else jnp.array(False)
        inner = lax.while_loop(
            lambda c: any_lane(c.lane.running) & (c.j < restart), lambda c: step(c, x), inner
        )
        lane, (basis, search) = inner.lane, _pair(inner.workspace)

        def correction():
            y = lane.hessenberg.solve(lane.beta)
            columns = jnp.concatenate([y, jnp.zeros((1,), y.dtype)])
            if flexible:
                dx = search.combine(columns[: search.size], inner.j)
            else:
                dx = basis.combine(columns, inner.j)
                dx = dx if psolve is None else psolve(dx)
            # ⟨b, A dx⟩ = ⟨Vᴴb, H̄ y⟩, and Vᴴb = β e₁ in a cycle that starts at b
            known = jnp.zeros_like(columns).at[0].set(lane.beta.astype(columns.dtype))
            projected = lax.cond(starts_at_b, lambda: known, lambda: basis.dots(b, inner.j + 1))
            gained = jnp.sum((projected.conj() * lane.hessenberg.image(y)).real)
            return tree.add(x, dx), descent + gained

        # The restart step that verifies a solution makes no column: nothing to add.
        x, descent = lax.cond(inner.j > 0, correction, lambda: (x, descent))
        lane = lane._replace(
            hessenberg=lane.hessenberg.cleared(jnp.array(True)), running=~lane.done
        )
        return _Cycle(jnp.full_like(inner.j, -1), inner.workspace, lane), x, descent

    norm = tree.norm2(b)
    start = _start(b, norm, guess is not None, workspace, limits)
    x = tree.zeros_like(b)
    if guess is not None:  # worth nothing where b = 0, whose solution is known
        x = tree.where(norm > 0, tree.scale(1 / unit, guess), x)
    inner, x, descent = lax.while_loop(
        lambda carry: any_lane(~carry[0].lane.done), cycle, (start, x, jnp.zeros_like(unit))
    )
    lane = inner.lane
    return KrylovResult(
        value=tree.scale(unit, x),
        residual_norm=lane.residual * unit,
        descent=None if left else descent * unit * unit,
        result=_result(lane, limits),
        num_steps=lane.steps,
        num_matvecs=lane.matvecs,
        num_preconditioner_applications=_applications(system, lane, left, flexible),
        num_restarts=lane.restarts,
        workspace=inner.workspace,
    )


def _nothing(vector: Vector, workspace: Workspace) -> KrylovResult:
    """The solution of no equations."""
    no, none = tree.norm2(vector), jnp.zeros((), jnp.int32)
    return KrylovResult(
        vector, no, no, lx.RESULTS.successful, none, none, none, none, workspace
    )


def _scaled(system: LinearSystem, vector: Vector, tolerance: ScalarLike, left: bool):
    """(A, M⁻¹ on the right, b, unit, relative tolerance) with ‖b‖ = 1 (or 0) in units of `unit`."""
    norm = tree.norm2(vector)
    relative = jnp.asarray(tolerance).astype(norm.dtype) / _or_one(norm)
    mv, psolve = system.mv, system.psolve
    if left and psolve is not None:
        vector = psolve(vector)
        norm = tree.norm2(vector)
        return lambda v: psolve(system.mv(v)), None, *_unit(vector, norm), relative
    return mv, psolve, *_unit(vector, norm), relative


def _unit(vector: Vector, norm: Scalar) -> tuple[Vector, Scalar]:
    unit = _or_one(norm)
    return tree.scale(1 / unit, vector), unit


def _or_one(norm: Scalar) -> Scalar:
    return jnp.where((norm > 0) & jnp.isfinite(norm), norm, jnp.ones_like(norm))


def _pair(workspace: Workspace) -> tuple[Basis, Basis | None]:
    return workspace.arnoldi, workspace.search


def _start(
    b: Vector, norm: Scalar, guessed: bool, workspace: Workspace, limits: _Limits
) -> _Cycle:
    basis = workspace.arnoldi
    dtype = tree.real_dtype(b) if basis.real else tree.scalar_dtype(b)
    first = jnp.zeros((), jnp.int32)
    broken = ~jnp.isfinite(norm)
    if guessed:
        beta = jnp.full_like(norm, jnp.inf)
        done = jnp.isinf(limits.target) | broken
    else:
        beta = norm
        basis = basis.set_row(first, tree.where(broken, tree.zeros_like(b), b))
        done = ~(beta > limits.target) | broken
    beta = jnp.where(broken, jnp.nan, beta)  # which passes no test
    zero = jnp.zeros_like(beta, jnp.int32)
    no = jnp.zeros_like(done)
    hessenberg = Hessenberg.empty(basis.size - 1, dtype)
    lane = _Lane(hessenberg, beta, beta, zero, zero, zero, ~done, done, no, broken)
    j = first - 1 if guessed else first
    return _Cycle(j, Workspace(basis, workspace.search), lane)


def _extended(lane: _Lane, j: Count, new: Appended, limits: _Limits) -> _Lane:
    """After the Arnoldi step that made column j."""
    finite = jnp.isfinite(new.norm) & jnp.isfinite(new.norm_before)
    # A z_j lies in the span of the basis: the space is invariant and holds the solution, unless A
    # is singular on it.
    invariant = new.norm <= 10 * limits.eps * new.norm_before
    singular = invariant & lane.hessenberg.dependent(new.coefficients, new.norm_before)
    advance = lane.running & finite & ~singular
    hessenberg = lane.hessenberg.extended(
        j, new.coefficients, new.norm, new.norm_before, advance
    )
    steps = lane.steps + tree.count(lane.running)
    residual = jnp.where(advance, hessenberg.residual_norm(lane.beta), lane.residual)
    converged = residual <= limits.target
    # Below rounding the estimate says nothing of b − A x any more (and ‖u‖² would overflow).
    resolved = residual <= limits.eps * lane.beta
    exhausted = steps >= limits.max_steps
    finished = (exhausted & ~converged) | ~finite
    if not limits.verify:
        finished = finished | converged
    return lane._replace(
        hessenberg=hessenberg,
        residual=residual,
        steps=steps,
        matvecs=lane.matvecs + tree.count(lane.running),
        running=advance & ~(converged | resolved | exhausted | invariant),
        done=lane.done | (lane.running & finished),
        broken=lane.broken | (lane.running & ~finite),
    )


def _restarted(lane: _Lane, new: Appended, limits: _Limits) -> _Lane:
    """After the restart step, whose norm is that of the true residual b − A x."""
    live = ~lane.done
    norm = new.norm
    is_guess = jnp.isinf(lane.beta)
    converged = norm <= limits.target
    stagnated = live & ~is_guess & ~converged & (norm > (1 - limits.eps**0.5) * lane.beta)
    broken = live & ~jnp.isfinite(norm)
    exhausted = lane.steps >= limits.max_steps
    done = lane.done | (live & (converged | exhausted)) | stagnated | broken
    return lane._replace(
        beta=jnp.where(live, norm, lane.beta),
        residual=jnp.where(live, norm, lane.residual),
        matvecs=lane.matvecs + tree.count(live),
        restarts=lane.restarts + tree.count(~done & ~is_guess),
        running=~done,
        done=done,
        stagnated=lane.stagnated | stagnated,
        broken=lane.broken | broken,
    )


def _result(lane: _Lane, limits: _Limits) -> lx.RESULTS:
    where, results = lx.RESULTS.where, lx.RESULTS
    failed = where(lane.stagnated, results.stagnation, results.max_steps_reached)
    failed = where(lane.broken, results.breakdown, failed)
    return where(lane.residual <= limits.target, results.successful, failed)


def _applications(system: LinearSystem, lane: _Lane, left: bool, flexible: bool) -> Count:
    if system.psolve is None:
        return jnp.zeros_like(lane.steps)
    if left:
        return lane.matvecs + 1
    if flexible:
        return lane.steps
    return lane.steps + lane.restarts + tree.count(lane.steps > 0)  # and one at the end of each cycle


def restart_length(restart: int, vector: Vector, real: bool) -> int:
    """The restart, cut to the dimension of the space (2n for complex vectors as real ones)."""
    dimension = tree.size(vector)
    if real and any(jnp.iscomplexobj(leaf) for leaf in jtu.tree_leaves(vector)):
        dimension *= 2
    return max(min(restart, dimension), 1)



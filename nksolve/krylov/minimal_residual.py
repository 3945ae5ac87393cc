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
from equinox import AbstractVar
from jaxtyping import PyTree

from .. import tree
from ..loops import any_lane
from ..typing import Count, Flag, LinearFn, Scalar, ScalarLike, Vector
from .base import AbstractKrylovSolver, KrylovResult, LinearSystem, check_tolerances
from .basis import Basis
from .hessenberg import Hessenberg
from .orthogonalise import AbstractOrthogonalisation


class Workspace(eqx.Module):
    """The Arnoldi basis V, and Z of the flexible variant (`None` without)."""

    arnoldi: Basis
    search: Basis | None


class _Cycle(NamedTuple):
    """The Arnoldi process. Norms are in units of ‖b‖."""

    j: Count  # column, −1 for the restart step; the same for every lane
    workspace: Workspace
    hessenberg: Hessenberg
    beta: Scalar  # residual norm at the start of the cycle
    null_square: Scalar  # ‖u‖²: the residual norm now is β/‖u‖; NaN where A v was not finite
    columns: Count  # of this lane
    matvecs: Count
    running: Flag  # still extending the space


class _Solve(NamedTuple):
    """The cycles."""

    cycle: _Cycle
    x: Vector
    residual: Scalar
    previous_x: Vector  # at the start of the cycle before
    previous_beta: Scalar  # its residual norm; infinite before the first restart
    cycles: Count  # that made columns
    restart_steps: Count
    done: Flag
    broken: Flag  # b or A v was not finite


class _Limits(NamedTuple):
    target: Scalar  # stop at ‖r‖ ≤ target
    max_steps: int
    verify: bool
    eps: float


def minimal_residual(
    system: LinearSystem,
    vector: Vector,
    *,
    norm: Scalar | None,
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
    `norm` is ‖vector‖₂ where the caller knows it.
    """
    if tree.size(vector) == 0:
        return _nothing(vector, workspace)
    restart = workspace.arnoldi.size - 1
    mv, psolve, b, unit, beta, target = _scaled(system, vector, norm, tolerance, left)
    limits = _Limits(target, max_steps, verify, tree.eps(b))

    def step(carry: _Cycle, solve: _Solve) -> _Cycle:
        j = carry.j
        restarting, column = j < 0, jnp.maximum(j, 0)
        basis, search = carry.workspace.arnoldi, carry.workspace.search
        v = basis.row(column)
        if psolve is None:
            z = tree.where(restarting, solve.x, v)
        else:
            apply = psolve
            z = lax.cond(restarting, lambda: solve.x, lambda: apply(v))
            # (Without a preconditioner Z is V, and writing V's row to Z makes XLA copy V, twice.)
            search = None if search is None else search.set_row(column, z)
        w = mv(z)
        w = tree.where(restarting, tree.sub(b, w), w)  # b − A x, or A z_j
        new = orthogonalisation.append(basis, w, j + 1)
        hessenberg, added = carry.hessenberg.extended(
            column, new.coefficients, new.norm, new.norm_before, carry.null_square
        )
        # A z_j in the span of the basis: the space is invariant and holds the solution, unless A is
        # singular on it.
        finite = jnp.isfinite(new.norm_before)
        invariant = new.norm <= 10 * limits.eps * new.norm_before
        singular = invariant & added.dependent
        growth = jnp.where(finite, jnp.where(singular, 0, added.square), jnp.nan)
        extending = carry.running & ~restarting
        beta = jnp.where(carry.running & restarting, new.norm, carry.beta)
        null_square = carry.null_square + jnp.where(extending, growth, 0)
        residual = beta / jnp.sqrt(null_square)
        matvecs = carry.matvecs + tree.count(carry.running)
        # Below rounding the estimate says nothing of b − A x any more (and ‖u‖² would overflow).
        enough = residual <= jnp.maximum(limits.target, limits.eps * beta)
        stagnated = restarting & ~(new.norm <= _attainable(solve, limits))
        exhausted = matvecs - solve.restart_steps >= max_steps
        stop = enough | stagnated | exhausted | ~finite | (invariant & ~restarting)
        return _Cycle(
            j=j + 1,
            workspace=Workspace(new.basis, search),
            hessenberg=hessenberg,
            beta=beta,
            null_square=null_square,
            columns=carry.columns + tree.count(extending & finite & ~singular),
            matvecs=matvecs,
            running=carry.running & ~stop,
        )

    def corrected(carry: _Cycle, x: Vector) -> Vector:
        y = carry.hessenberg.solve(carry.beta, carry.null_square, carry.columns, carry.j)
        y = jnp.where(jnp.isfinite(carry.null_square), y, jnp.zeros_like(y))
        if psolve is not None and carry.workspace.search is not None:
            return tree.add(x, carry.workspace.search.combine(y, carry.j))
        dx = carry.workspace.arnoldi.combine(jnp.pad(y, (0, 1)), carry.j)
        return tree.add(x, dx if psolve is None else psolve(dx))

    def cycle(solve: _Solve) -> _Solve:
        restarted = tree.count((solve.cycle.j < 0) & ~solve.done)
        carry = lax.while_loop(
            lambda c: any_lane(c.running) & (c.j < restart),
            lambda c: step(c, solve._replace(restart_steps=solve.restart_steps + restarted)),
            solve.cycle._replace(running=~solve.done),
        )
        # The restart step that verifies a solution makes no column: nothing to add.
        x = lax.cond(carry.j > 0, lambda: corrected(carry, solve.x), lambda: solve.x)
        residual = jnp.where(solve.done, solve.residual, carry.beta / jnp.sqrt(carry.null_square))
        broken = ~solve.done & ~jnp.isfinite(residual)
        # What the last cycle made of x was no improvement (singular A, A x not finite): undo it.
        # Of a cycle that broke off nothing was added.
        undo = (restarted > 0) & ~(carry.beta <= solve.previous_beta)
        x = tree.where(undo, solve.previous_x, x)
        residual = jnp.where(undo, solve.previous_beta, residual)
        residual = jnp.where(broken & ~undo, carry.beta, residual)
        restart_steps = solve.restart_steps + restarted
        converged = residual <= limits.target
        certain = converged & (carry.columns == 0) if verify else converged
        hopeless = (restarted > 0) & ~(carry.beta <= _attainable(solve, limits))
        exhausted = carry.matvecs - restart_steps >= max_steps
        finished = certain | hopeless | (exhausted & ~converged) | broken
        return _Solve(
            cycle=carry._replace(
                j=jnp.full_like(carry.j, -1),
                null_square=jnp.ones_like(carry.null_square),
                columns=jnp.zeros_like(carry.columns),
            ),
            x=x,
            residual=residual,
            previous_x=solve.x,
            previous_beta=jnp.where(solve.done, solve.previous_beta, carry.beta),
            cycles=solve.cycles + tree.count(carry.columns > 0),
            restart_steps=restart_steps,
            done=solve.done | finished,
            broken=solve.broken | broken,
        )

    solve = _start(b, beta, unit, guess, workspace, limits)
    solve = lax.while_loop(lambda s: any_lane(~s.done), cycle, solve)
    steps = solve.cycle.matvecs - solve.restart_steps
    return KrylovResult(
        value=tree.scale(unit, solve.x),
        residual_norm=solve.residual * unit,
        descent=None if left or guess is not None else _descent(solve, beta) * unit * unit,
        result=_result(solve, steps, limits),
        num_steps=steps,
        num_matvecs=solve.cycle.matvecs,
        num_transposed_matvecs=jnp.zeros_like(steps),
        num_preconditioner_applications=_applications(system, solve, steps, left),
        num_restarts=jnp.maximum(solve.cycles - 1, 0),
        workspace=solve.cycle.workspace,
    )


def _nothing(vector: Vector, workspace: Workspace) -> KrylovResult:
    """The solution of no equations."""
    no, none = tree.norm2(vector), jnp.zeros((), jnp.int32)
    successful = lx.RESULTS.successful
    return KrylovResult(vector, no, no, successful, none, none, none, none, none, workspace)


def _scaled(
    system: LinearSystem,
    vector: Vector,
    norm: Scalar | None,
    tolerance: ScalarLike,
    left: bool,
) -> tuple[LinearFn, LinearFn | None, Vector, Scalar, Scalar, Scalar]:
    """(A, M⁻¹ on the right, b, unit, ‖b‖, target), b and what follows it in units of `unit`.

    ‖b‖ is 1, or 0, or NaN where the vector is not finite.
    """
    norm = tree.norm2(vector) if norm is None else norm
    mv, psolve = system.mv, system.psolve
    target = jnp.asarray(tolerance).astype(norm.dtype) / _or_one(norm)
    if left and psolve is not None:
        vector = psolve(vector)
        norm = tree.norm2(vector)
        mv, psolve = _composed(psolve, mv), None
    unit = _or_one(norm)
    beta = jnp.where(jnp.isfinite(norm), norm / unit, jnp.nan)
    return mv, psolve, tree.scale(1 / unit, vector), unit, beta, target


def _composed(outer: LinearFn, inner: LinearFn) -> LinearFn:
    return lambda v: outer(inner(v))


def _or_one(norm: Scalar) -> Scalar:
    return jnp.where((norm > 0) & jnp.isfinite(norm), norm, jnp.ones_like(norm))


def _start(
    b: Vector,
    beta: Scalar,
    unit: Scalar,
    guess: Vector | None,
    workspace: Workspace,
    limits: _Limits,
) -> _Solve:
    basis = workspace.arnoldi
    dtype = tree.real_dtype(b) if basis.real else tree.scalar_dtype(b)
    j, x, residual = jnp.zeros((), jnp.int32), tree.zeros_like(b), beta
    done = ~(beta > limits.target)
    if guess is None:
        finite = jnp.isfinite(beta)
        basis = basis.set_row(j, tree.where(finite, b, tree.zeros_like(b)))
    else:  # worth nothing where b = 0, whose solution is known
        j = j - 1
        done = ~(beta > 0) | jnp.isinf(limits.target)
        x = tree.where(done, x, tree.scale(1 / unit, guess))
    none = jnp.zeros_like(beta, jnp.int32)
    cycle = _Cycle(
        j=j,
        workspace=Workspace(basis, workspace.search),
        hessenberg=Hessenberg.empty(basis.size - 1, dtype),
        beta=beta,
        null_square=jnp.ones_like(beta),
        columns=none,
        matvecs=none,
        running=~done,
    )
    infinite = jnp.full_like(beta, jnp.inf)
    return _Solve(cycle, x, residual, x, infinite, none, none, done, ~jnp.isfinite(beta))


def _attainable(solve: _Solve, limits: _Limits) -> Scalar:
    """The residual norm after a restart above which the cycle before has gained nothing."""
    return jnp.maximum((1 - limits.eps**0.5) * solve.previous_beta, limits.target)


def _descent(solve: _Solve, beta: Scalar) -> Scalar:
    """A lower bound of ⟨b, A x⟩ = ‖b‖² − ⟨b, r⟩; exact after one cycle, where r ⟂ A x."""
    overlap = jnp.where(solve.cycles > 1, beta, solve.residual)
    return jnp.where(solve.cycles > 0, beta**2 - overlap * solve.residual, 0)


def _result(solve: _Solve, steps: Count, limits: _Limits) -> lx.RESULTS:
    where, results = lx.RESULTS.where, lx.RESULTS
    exhausted = steps >= limits.max_steps
    failed = where(exhausted, results.max_steps_reached, results.stagnation)
    failed = where(solve.broken, results.breakdown, failed)
    return where(solve.residual <= limits.target, results.successful, failed)


def _applications(system: LinearSystem, solve: _Solve, steps: Count, left: bool) -> Count:
    if system.psolve is None:
        return jnp.zeros_like(steps)
    if left:
        return solve.cycle.matvecs + 1
    if solve.cycle.workspace.search is not None:
        return steps
    return steps + solve.cycles  # one at the end of each cycle


class AbstractMinimalResidual(AbstractKrylovSolver):
    """What GMRES and FGMRES have in common: fields, their checks, and the iteration."""

    restart: AbstractVar[int]
    max_steps: AbstractVar[int | None]
    side: AbstractVar[str]
    orthogonalisation: AbstractVar[AbstractOrthogonalisation]

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        if self.restart < 1:
            raise ValueError(f"`restart` must be at least 1, but it is {self.restart}.")
        if self.max_steps is not None and self.max_steps < 0:
            raise ValueError(f"`max_steps` must not be negative, but it is {self.max_steps}.")
        if self.side not in ("left", "right"):
            raise ValueError(f"`side` must be 'left' or 'right', but it is {self.side!r}.")

    def solve(
        self,
        system: LinearSystem,
        vector: Vector,
        *,
        tolerance: ScalarLike,
        workspace: PyTree,
        norm: Scalar | None = None,
        guess: Vector | None = None,
        verify: bool = False,
    ) -> KrylovResult:
        return minimal_residual(
            system,
            vector,
            norm=norm,
            tolerance=tolerance,
            workspace=workspace,
            guess=guess,
            verify=verify,
            max_steps=10 * tree.size(vector) if self.max_steps is None else self.max_steps,
            orthogonalisation=self.orthogonalisation,
            left=self.side == "left",
        )

    def _length(self, vector: Vector, real: bool) -> int:
        """The restart, cut to the dimension of the space (2n for complex vectors as real ones)."""
        dimension = tree.size(vector)
        if real and any(jnp.iscomplexobj(leaf) for leaf in jtu.tree_leaves(vector)):
            dimension *= 2
        return max(min(self.restart, dimension), 1)

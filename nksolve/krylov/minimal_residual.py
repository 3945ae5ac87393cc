"""The restarted minimal-residual iteration that GMRES, FGMRES and GCRODR share.

One matvec site: a restart is the same step as an Arnoldi step with no rows filled, applied to
b − A x instead of A z. Columns are counted for the whole batch, convergence for each lane on small
arrays, so that under `vmap` nothing selects over a basis.

With a recycled space, A U = C, the first rows of the Arnoldi basis are C, which every vector is
made orthogonal to, and those of the search basis are U.
"""

from typing import Any

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from equinox import AbstractVar
from jaxtyping import PyTree

from .. import tree
from ..loops import any_lane
from ..typing import Count, Scalar, ScalarLike, Vector
from .base import AbstractKrylovSolver
from .cycle import Cycle, Limits, Solve, Workspace, begin, coupled, or_one, scaled
from .orthogonalise import AbstractOrthogonalisation
from .recycling import renewed
from .ritz import ArnoldiRecord
from .system import KrylovResult, LinearSystem


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
) -> KrylovResult:
    """Minimises ‖b − A x‖ over x₀ + span(Z), Z = M⁻¹V. `norm` is ‖vector‖₂ where the caller knows
    it."""
    if tree.size(vector) == 0:
        return _nothing(vector, workspace)
    restart, recycled = workspace.length, workspace.recycled
    mv, psolve, b, unit, beta, target = scaled(system, vector, norm, tolerance)
    limits = Limits(target, max_steps, verify, tree.eps(b))

    def step(carry: Cycle, solve: Solve) -> Cycle:
        j = carry.j
        restarting, column = j < 0, jnp.maximum(j, 0)
        basis, search = carry.workspace.arnoldi, carry.workspace.search
        v = basis.row(recycled + column)
        if psolve is None:
            z = tree.where(restarting, solve.x, v)
        else:
            apply = psolve
            z = lax.cond(restarting, lambda: solve.x, lambda: apply(v))
            # (Without a preconditioner Z is V, and writing V's row to Z makes XLA copy V, twice.)
            search = None if search is None else search.set_row(recycled + column, z)
        w = mv(z)
        w = tree.where(restarting, tree.sub(b, w), w)  # b − A x, or A z_j
        new = orthogonalisation.append(basis, w, recycled + j + 1)
        hessenberg, added = carry.hessenberg.extended(
            column, new.coefficients[recycled:], new.norm, new.norm_before, carry.null_square
        )
        coupling = carry.coupling
        if coupling is not None:
            c = new.coefficients[:recycled]
            coupling = lax.dynamic_update_index_in_dim(coupling, c, j + 1, 1)
        # A z_j in the span of the basis: the space is invariant and holds the solution, unless A is
        # singular on it.
        finite = jnp.isfinite(new.norm_before)
        invariant = new.norm <= 10 * limits.eps * new.norm_before
        singular = invariant & added.dependent
        growth = jnp.where(finite, jnp.where(singular, 0, added.square), jnp.nan)
        extending = carry.running & ~restarting
        begun = carry.running & restarting
        beta = jnp.where(begun, new.norm, carry.beta)
        null_square = carry.null_square + jnp.where(extending, growth, 0)
        residual = beta / jnp.sqrt(null_square)
        matvecs = carry.matvecs + tree.count(carry.running)
        # Below rounding the estimate says nothing of b − A x any more (and ‖u‖² would overflow).
        enough = residual <= jnp.maximum(limits.target, limits.eps * beta)
        stagnated = restarting & ~(new.norm_before <= _attainable(solve, limits))
        exhausted = matvecs - solve.restart_steps >= max_steps
        stop = enough | stagnated | exhausted | ~finite | (invariant & ~restarting)
        return Cycle(
            j=j + 1,
            workspace=Workspace(new.basis, search, carry.workspace.record, carry.workspace.space),
            hessenberg=hessenberg,
            coupling=coupling,
            start=jnp.where(begun, new.norm_before, carry.start),
            beta=beta,
            null_square=null_square,
            columns=carry.columns + tree.count(extending & finite & ~singular),
            matvecs=matvecs,
            running=carry.running & ~stop,
        )

    def corrected(carry: Cycle, solve: Solve) -> Vector:
        x, filled = solve.x, recycled + carry.j
        arnoldi, search = carry.workspace.arnoldi, carry.workspace.search
        finite = jnp.isfinite(carry.null_square)
        y = carry.hessenberg.solve(carry.beta, carry.null_square, carry.columns, carry.j)
        y = jnp.where(finite, y, jnp.zeros_like(y))
        if carry.coupling is not None:
            # x + U (Cᴴr − B y) + Z y, B the coupling: what is left is outside C.
            weights = jnp.concatenate([jnp.ones_like(y[:1]), -y])
            c = coupled(carry.coupling, carry.columns) @ weights
            c = jnp.where(finite & ~solve.done, c, jnp.zeros_like(c))
            y = jnp.concatenate([c, y])
            if psolve is None and search is not None:
                x = tree.add(x, search.combine(c, jnp.full_like(carry.j, recycled)))
                y = y.at[:recycled].set(0)
        if psolve is not None and search is not None:
            return tree.add(x, search.combine(y, filled))
        dx = arnoldi.combine(jnp.pad(y, (0, 1)), filled)
        return tree.add(x, dx if psolve is None else psolve(dx))

    def left_behind(carry: Cycle, solve: Solve) -> Workspace:
        arnoldi, search = carry.workspace.arnoldi, carry.workspace.search
        made = ~solve.done & (carry.columns > 0) & jnp.isfinite(carry.null_square)
        record = ArnoldiRecord.of(carry.hessenberg.matrix, carry.columns)
        record = tree.where(~solve.done & (carry.columns > 0), record, carry.workspace.record)
        space = carry.workspace.space
        if carry.coupling is None or space is None or search is None:
            return Workspace(arnoldi, search, record, space)
        new = renewed(
            arnoldi,
            search,
            space,
            carry.hessenberg.matrix,
            coupled(carry.coupling, carry.columns)[:, 1:],
            carry.columns,
            made,
            flexible=psolve is not None,
        )
        arnoldi, search = arnoldi.with_head(new.image), search.with_head(new.search)
        return Workspace(arnoldi, search, record, new.space)

    def cycle(solve: Solve) -> Solve:
        restarted = tree.count((solve.cycle.j < 0) & ~solve.done)
        carry = lax.while_loop(
            lambda c: system.wanted(c.running) & (c.j < restart),
            lambda c: step(c, solve._replace(restart_steps=solve.restart_steps + restarted)),
            solve.cycle,
        )
        # The restart step that verifies a solution makes no column: nothing to add, but from U.
        moving = (carry.j > 0) | (recycled > 0)
        x = lax.cond(moving, lambda: corrected(carry, solve), lambda: solve.x)
        residual = jnp.where(solve.done, solve.residual, carry.beta / jnp.sqrt(carry.null_square))
        broken = ~solve.done & ~jnp.isfinite(residual)
        # What the last cycle made of x was no improvement (singular A, A x not finite): undo it.
        # Of a cycle that broke off nothing was added.
        undo = (restarted > 0) & ~(carry.start <= solve.previous_start)
        x = tree.where(undo, solve.previous_x, x)
        residual = jnp.where(undo, solve.previous_start, residual)
        residual = jnp.where(broken & ~undo, carry.start, residual)
        restart_steps = solve.restart_steps + restarted
        converged = residual <= limits.target
        certain = converged & (carry.columns == 0) & (restarted > 0) if verify else converged
        hopeless = (restarted > 0) & ~(carry.start <= _attainable(solve, limits))
        exhausted = carry.matvecs - restart_steps >= max_steps
        finished = certain | hopeless | (exhausted & ~converged) | broken
        done = solve.done | finished
        return Solve(
            cycle=carry._replace(
                j=jnp.full_like(carry.j, -1),
                workspace=left_behind(carry, solve),
                running=~done,
                null_square=jnp.ones_like(carry.null_square),
                columns=jnp.zeros_like(carry.columns),
            ),
            x=x,
            residual=residual,
            previous_x=solve.x,
            previous_start=jnp.where(solve.done, solve.previous_start, carry.start),
            cycles=solve.cycles + tree.count(carry.columns > 0),
            restart_steps=restart_steps,
            done=done,
            broken=solve.broken | broken,
        )

    solve, moved = begin(mv, orthogonalisation, b, beta, unit, guess, workspace, limits)
    solve = lax.while_loop(lambda s: system.wanted(~s.done), cycle, solve)
    steps = solve.cycle.matvecs - solve.restart_steps
    return KrylovResult(
        value=tree.scale(unit, solve.x),
        residual_norm=solve.residual * unit,
        descent=None if guess is not None else _descent(solve, beta) * unit * unit,
        result=_result(solve, steps, limits),
        num_steps=steps,
        num_matvecs=solve.cycle.matvecs + moved,
        num_transposed_matvecs=jnp.zeros_like(steps),
        num_preconditioner_applications=_applications(system, solve, steps),
        num_restarts=jnp.maximum(solve.cycles - 1, 0),
        workspace=solve.cycle.workspace,
    )


def on_the_left(
    system: LinearSystem,
    vector: Vector,
    *,
    norm: Scalar | None,
    tolerance: ScalarLike,
    guess: Vector | None,
    **keywords: Any,
) -> KrylovResult:
    """The same for M⁻¹A x = M⁻¹b, with ‖M⁻¹(b − A x)‖ ≤ (tolerance/‖b‖) ‖M⁻¹b‖ tested.

    What is reported is b − A x itself, by one matvec at the end.
    """
    apply, mv = system.psolve, system.mv
    assert apply is not None
    norm = tree.norm2(vector) if norm is None else norm
    relative = jnp.asarray(tolerance).astype(norm.dtype) / or_one(norm)
    asked = (norm > 0) & jnp.isfinite(norm) & ~jnp.isposinf(relative)
    b = lax.cond(any_lane(asked), lambda: apply(vector), lambda: vector)
    size = tree.norm2(b)
    out = minimal_residual(
        LinearSystem(lambda v: apply(mv(v)), None, system.real, wanted=system.wanted),
        b,
        norm=size,
        tolerance=relative * or_one(size),
        guess=guess,
        **keywords,
    )
    image = lax.cond(any_lane(asked), lambda: mv(out.value), lambda: tree.zeros_like(vector))
    left = jnp.where(asked, tree.norm2(tree.sub(vector, image)), norm)
    once = tree.count(asked)
    return out._replace(
        residual_norm=left,
        descent=None if guess is not None else tree.vdot(vector, image).real.astype(norm.dtype),
        num_matvecs=out.num_matvecs + once,
        num_preconditioner_applications=out.num_matvecs + once,
    )


def _nothing(vector: Vector, workspace: Workspace) -> KrylovResult:
    """The solution of no equations."""
    no, none = tree.norm2(vector), jnp.zeros((), jnp.int32)
    successful = lx.RESULTS.successful
    return KrylovResult(vector, no, no, successful, none, none, none, none, none, workspace)


def _attainable(solve: Solve, limits: Limits) -> Scalar:
    """The residual norm after a restart above which the cycle before has gained nothing."""
    return jnp.maximum((1 - limits.eps**0.5) * solve.previous_start, limits.target)


def _descent(solve: Solve, beta: Scalar) -> Scalar:
    """A lower bound of ⟨b, A x⟩ = ‖b‖² − ⟨b, r⟩; exact after one cycle, where r ⟂ A x."""
    overlap = jnp.where(solve.cycles > 1, beta, solve.residual)
    moved = (solve.cycles > 0) | (solve.residual < beta)
    return jnp.where(moved, beta**2 - overlap * solve.residual, 0)


def _result(solve: Solve, steps: Count, limits: Limits) -> lx.RESULTS:
    where, results = lx.RESULTS.where, lx.RESULTS
    exhausted = steps >= limits.max_steps
    failed = where(exhausted, results.max_steps_reached, results.stagnation)
    failed = where(solve.broken, results.breakdown, failed)
    return where(solve.residual <= limits.target, results.successful, failed)


def _applications(system: LinearSystem, solve: Solve, steps: Count) -> Count:
    if system.psolve is None:
        return jnp.zeros_like(steps)
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
        if self.restart < 1:
            raise ValueError(f"`restart` must be at least 1, but it is {self.restart}.")
        if self.max_steps is not None and self.max_steps < 0:
            raise ValueError(f"`max_steps` must not be negative, but it is {self.max_steps}.")
        if self.side not in ("left", "right"):
            raise ValueError(f"`side` must be 'left' or 'right', but it is {self.side!r}.")

    def report(self, workspace: PyTree) -> dict[str, Any]:
        return {"arnoldi": workspace.record}

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
        left = self.side == "left" and system.psolve is not None
        return (on_the_left if left else minimal_residual)(
            system,
            vector,
            norm=norm,
            tolerance=tolerance,
            workspace=workspace,
            guess=guess,
            verify=verify,
            max_steps=10 * tree.size(vector) if self.max_steps is None else self.max_steps,
            orthogonalisation=self.orthogonalisation,
        )

    def _length(self, vector: Vector, real: bool) -> int:
        """The restart, cut to the dimension of the space (2n for complex vectors as real ones)."""
        dimension = tree.size(vector)
        if real and any(jnp.iscomplexobj(leaf) for leaf in jtu.tree_leaves(vector)):
            dimension *= 2
        return max(min(self.restart, dimension), 1)

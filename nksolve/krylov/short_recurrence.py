"""What the methods with short recurrences share: units, rounds, exits and reports.

A method says how its recurrence begins from a residual and how one iteration advances it. Here b is
scaled to norm 1, iterations go on until the residual is small enough, and a *round* that ended
early (breakdown, or a recurrence that lost the true residual) is followed by another from where it
left x, as long as that gains. The loops stop lane by lane: under `vmap` JAX selects over their
carries, which are few vectors.

What a recurrence calls r differs from b − A x by rounding, by at least ε times the largest ‖r‖ of
the round and ε ‖b‖. Below that it says nothing: the round ends there, and no smaller residual is
reported unless b − A x itself has been computed.
"""

import abc
from typing import Any, ClassVar, NamedTuple

import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from equinox import AbstractVar
from jaxtyping import Array, PyTree

from .. import tree
from ..typing import Count, Flag, LinearFn, Scalar, ScalarLike, Vector
from .base import AbstractKrylovSolver
from .system import KrylovResult, LinearSystem

# A round ends when its least residual has not improved for so many iterations.
_PATIENCE = 1000


class Progress(NamedTuple):
    """Where a solve stands; b has norm 1."""

    x: Vector
    r: Vector  # b − A x, by recurrence
    residual: Scalar  # ‖r‖₂ or an upper bound of it; what is tested
    num_steps: Count
    num_matvecs: Count
    num_applications: Count
    broken: Flag  # the recurrence cannot go on
    final: Flag  # … and neither could one that began anew from x

    def worked(
        self, steps: Count | int = 0, matvecs: Count | int = 0, applications: Count | int = 0
    ) -> "Progress":
        """With so much more work on the counters."""
        return self._replace(
            num_steps=self.num_steps + steps,
            num_matvecs=self.num_matvecs + matvecs,
            num_applications=self.num_applications + applications,
        )


class Context(NamedTuple):
    """What an iteration may use. `solve` is v → M⁻¹v, the identity without preconditioner."""

    mv: LinearFn
    solve: LinearFn
    preconditioned: bool
    real: bool
    target: Scalar  # stop at ‖r‖ ≤ target
    eps: float
    workspace: PyTree = None  # what `AbstractShortRecurrence.workspace` made

    def dot(self, a: Vector, b: Vector) -> Array:
        """⟨a, b⟩, conjugating a; its real part where the space counts as real."""
        product = tree.vdot(a, b)
        return product.real if self.real else product

    def norm(self, a: Vector) -> Scalar:
        """‖a‖₂ of a vector in units of b."""
        return jnp.sqrt(tree.vdot(a, a).real)


class _Rounds(NamedTuple):
    progress: Progress
    done: Flag
    rounds: Count
    fruitless: Count  # the last so many rounds gained nothing


class AbstractShortRecurrence(AbstractKrylovSolver):
    """A Krylov method that keeps a fixed, small number of vectors.

    A subclass is `begin` and `advance`; x, r and the counters are `Progress`, all else that its
    recurrence needs is its memory, a PyTree.
    """

    max_steps: AbstractVar[int | None]
    #: After so many breakdowns in a row that gained nothing the solve gives up: 2 where a round
    #: begins otherwise than the one before.
    fruitless_rounds: ClassVar[int] = 1

    def __check_init__(self):
        if self.max_steps is not None and self.max_steps < 0:
            raise ValueError(f"`max_steps` must not be negative, but it is {self.max_steps}.")

    @abc.abstractmethod
    def begin(self, context: Context, progress: Progress) -> tuple[Progress, PyTree]:
        """The memory with which a round starts from `progress.r`, and work done for it."""

    @abc.abstractmethod
    def advance(self, context: Context, progress: Progress, memory: Any) -> tuple[Progress, PyTree]:
        """One iteration."""

    def workspace(self, vector: Vector, *, real: bool) -> PyTree:
        del vector, real
        return None

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
        context, b, size, unit = scaled(system, vector, norm, tolerance)
        context = context._replace(workspace=workspace)
        target = context.target
        max_steps = self.most_steps(vector)
        start = at_guess(context, b, size, guess, unit)
        nothing_to_do = ~(start.residual > target) | start.broken

        def one_round(carry: _Rounds) -> _Rounds:
            before = carry.progress
            progress, memory = self.begin(
                context, before._replace(broken=jnp.zeros_like(before.broken))
            )
            progress, _ = self.iterate(context, progress, memory, max_steps)
            broken_off = progress.broken & progress.final & (carry.rounds == 0)
            if verify:
                progress = _with_true_residual(context, progress, b)
            progress = progress._replace(broken=progress.broken | ~_finite(progress))
            improved = progress.residual < before.residual
            kept = improved | (broken_off & _finite(progress))
            progress = progress._replace(
                x=tree.where(kept, progress.x, before.x),
                r=tree.where(kept, progress.r, before.r),
                residual=jnp.where(kept, progress.residual, before.residual),
            )
            # A round that ran to its end and did not halve the residual met its rounding level.
            least_gain = jnp.where(progress.broken, 1 - context.eps**0.5, 0.5)
            gained = progress.residual <= least_gain.astype(size.dtype) * before.residual
            fruitless = jnp.where(gained, 0, carry.fruitless + 1)
            again = gained | (progress.broken & (fruitless < self.fruitless_rounds))
            restart = again & ~progress.final & (progress.num_steps < max_steps)
            if not verify:  # with r, but nothing else, known below the rounding level
                restart = restart & progress.broken
            done = (progress.residual <= target) | ~restart
            return _Rounds(progress, done, carry.rounds + 1, fruitless)

        none = jnp.zeros_like(size, jnp.int32)
        first = _Rounds(start, nothing_to_do, none, none)
        end = lax.while_loop(lambda c: ~c.done, one_round, first)
        progress = end.progress
        applications = progress.num_applications if context.preconditioned else none
        descent = None
        if guess is None:  # ⟨b, A x⟩ = ⟨b, b − r⟩
            descent = (size**2 - tree.vdot(b, progress.r).real) * unit**2
        return KrylovResult(
            value=tree.scale(unit, progress.x),
            residual_norm=progress.residual * unit,
            descent=descent,
            result=reason(progress, target, max_steps),
            num_steps=progress.num_steps,
            num_matvecs=progress.num_matvecs,
            num_transposed_matvecs=none,
            num_preconditioner_applications=applications,
            num_restarts=jnp.maximum(end.rounds - 1, 0),
            workspace=workspace,
        )

    def most_steps(self, vector: Vector) -> int:
        """The limit of iterations: 10 n unless given."""
        return 10 * tree.size(vector) if self.max_steps is None else self.max_steps

    def iterate(
        self, context: Context, progress: Progress, memory: PyTree, max_steps: int
    ) -> tuple[Progress, PyTree]:
        """Iterations to the end of the round. No residual below the rounding level comes out."""

        def running(carry):
            progress, _, extremes = carry
            more = (progress.residual > context.target) & (progress.num_steps < max_steps)
            more = more & (progress.residual > context.eps * extremes.largest)
            return more & ~progress.broken & ~progress.final & (extremes.since < _PATIENCE)

        def body(carry):
            progress, memory, extremes = carry
            progress, memory = self.advance(context, progress, memory)
            return progress, memory, extremes.including(progress.residual)

        first, since = progress.residual, jnp.zeros_like(progress.num_steps)
        start = _Extremes(first, jnp.maximum(first, jnp.ones_like(first)), since)
        progress, memory, extremes = lax.while_loop(running, body, (progress, memory, start))
        least = context.eps * extremes.largest
        known = jnp.where(progress.residual < least, least, progress.residual)  # NaN stays
        return progress._replace(residual=known), memory


class _Extremes(NamedTuple):
    """Of the residual norms of a round, and ‖b‖."""

    least: Scalar
    largest: Scalar
    since: Count  # iterations since the least one

    def including(self, residual: Scalar) -> "_Extremes":
        since = jnp.where(residual < self.least, 0, self.since + 1)
        least, largest = jnp.minimum(residual, self.least), jnp.maximum(residual, self.largest)
        return _Extremes(least, largest, since)


def scaled(
    system: LinearSystem, vector: Vector, norm: Scalar | None, tolerance: ScalarLike
) -> tuple[Context, Vector, Scalar, Scalar]:
    """The context, b = vector / unit, ‖b‖ (1, 0, or NaN where it is not finite), and the unit."""
    norm = tree.norm2(vector) if norm is None else norm
    unit = jnp.where((norm > 0) & jnp.isfinite(norm), norm, jnp.ones_like(norm))
    psolve = system.psolve
    context = Context(
        mv=system.mv,
        solve=(lambda v: v) if psolve is None else psolve,
        preconditioned=psolve is not None,
        real=system.real,
        target=jnp.asarray(tolerance).astype(norm.dtype) / unit,
        eps=tree.eps(vector),
    )
    size = jnp.where(jnp.isfinite(norm), norm / unit, jnp.nan)
    return context, tree.scale(1 / unit, vector), size, unit


def at_guess(
    context: Context, b: Vector, size: Scalar, guess: Vector | None, unit: Scalar
) -> Progress:
    """x = guess, or 0 without, with its residual."""
    none, bad = jnp.zeros_like(size, jnp.int32), jnp.isnan(size)
    # NaN in b: nothing is computed, and `broken` says why.
    start = Progress(tree.zeros_like(b), b, size, none, none, none, bad, jnp.zeros_like(bad))
    if guess is None:
        return start
    # Worth nothing where b = 0, whose solution is known, or where nothing is asked.
    useful = (size > 0) & jnp.isfinite(context.target)
    x = tree.where(useful, tree.scale(1 / unit, guess), start.x)
    r = lax.cond(useful, lambda: tree.sub(b, context.mv(x)), lambda: b)
    residual = jnp.where(useful, context.norm(r), size)
    usable = jnp.isfinite(residual)
    return start._replace(
        x=tree.where(usable, x, start.x),
        r=tree.where(usable, r, b),
        residual=jnp.where(usable, residual, size),
        num_matvecs=tree.count(useful),
        broken=~usable,
    )


def _with_true_residual(context: Context, progress: Progress, b: Vector) -> Progress:
    r = tree.sub(b, context.mv(progress.x))
    return progress._replace(r=r, residual=context.norm(r)).worked(matvecs=1)


def _finite(progress: Progress) -> Flag:
    return jnp.isfinite(progress.residual)


def reason(progress: Progress, target: Scalar, max_steps: int) -> lx.RESULTS:
    """Why a solve ended there."""
    where, results = lx.RESULTS.where, lx.RESULTS
    exhausted = progress.num_steps >= max_steps
    failed = where(exhausted, results.max_steps_reached, results.stagnation)
    failed = where(progress.broken, results.breakdown, failed)
    return where(progress.residual <= target, results.successful, failed)

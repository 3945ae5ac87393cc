"""What the methods with short recurrences share: units, rounds, exits and reports.

A method says how its recurrence begins from a residual and how one iteration advances it. Here b is
scaled to norm 1, iterations go on until the residual is small enough, and a *round* that ended
early (breakdown, or a recurrence that lost the true residual) is followed by another from where it
left x. The loops stop lane by lane: under `vmap` JAX selects over their carries, which are few
vectors.
"""

import abc
from typing import Any, NamedTuple

import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from equinox import AbstractVar
from jaxtyping import Array, PyTree

from .. import tree
from ..typing import Count, Flag, LinearFn, Scalar, ScalarLike, Vector
from .base import AbstractKrylovSolver, KrylovResult, LinearSystem, check_tolerances

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

    def worked(self, steps: int = 0, matvecs: int = 0, applications: int = 0) -> "Progress":
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


class AbstractShortRecurrence(AbstractKrylovSolver):
    """A Krylov method that keeps a fixed, small number of vectors.

    A subclass is `begin` and `advance`; x, r and the counters are `Progress`, all else that its
    recurrence needs is its memory, a PyTree.
    """

    max_steps: AbstractVar[int | None]

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
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
        norm = tree.norm2(vector) if norm is None else norm
        unit = jnp.where((norm > 0) & jnp.isfinite(norm), norm, jnp.ones_like(norm))
        b = tree.scale(1 / unit, vector)
        size = jnp.where(jnp.isfinite(norm), norm / unit, jnp.nan)
        target = jnp.asarray(tolerance).astype(norm.dtype) / unit
        psolve = system.psolve
        context = Context(
            mv=system.mv,
            solve=(lambda v: v) if psolve is None else psolve,
            preconditioned=psolve is not None,
            real=system.real,
            target=target,
            eps=tree.eps(vector),
        )
        max_steps = 10 * tree.size(vector) if self.max_steps is None else self.max_steps
        start = _start(context, b, size, guess, unit)
        nothing_to_do = ~(start.residual > target) | (size == 0)

        def one_round(carry: _Rounds) -> _Rounds:
            before = carry.progress
            progress = self._round(context, before, max_steps)
            progress = progress._replace(broken=progress.broken | ~_finite(progress))
            if verify:
                progress = _with_true_residual(context, progress, b)
            improved = progress.residual < before.residual
            progress = progress._replace(
                x=tree.where(improved, progress.x, before.x),
                r=tree.where(improved, progress.r, before.r),
                residual=jnp.where(improved, progress.residual, before.residual),
            )
            gained = progress.residual <= (1 - context.eps**0.5) * before.residual
            exhausted = progress.num_steps >= max_steps
            done = (progress.residual <= target) | exhausted | ~gained
            return _Rounds(progress, done, carry.rounds + 1)

        none = jnp.zeros_like(norm, jnp.int32)
        end = lax.while_loop(lambda c: ~c.done, one_round, _Rounds(start, nothing_to_do, none))
        progress = end.progress
        applications = progress.num_applications if context.preconditioned else none
        descent = None
        if guess is None:  # ⟨b, A x⟩ = ⟨b, b − r⟩
            descent = (size**2 - tree.vdot(b, progress.r).real) * unit**2
        return KrylovResult(
            value=tree.scale(unit, progress.x),
            residual_norm=progress.residual * unit,
            descent=descent,
            result=_result(progress, target, max_steps),
            num_steps=progress.num_steps,
            num_matvecs=progress.num_matvecs,
            num_transposed_matvecs=none,
            num_preconditioner_applications=applications,
            num_restarts=jnp.maximum(end.rounds - 1, 0),
            workspace=workspace,
        )

    def _round(self, context: Context, before: Progress, max_steps: int) -> Progress:
        progress, memory = self.begin(
            context, before._replace(broken=jnp.zeros_like(before.broken))
        )

        def running(carry):
            progress, _, _, since = carry
            more = (progress.residual > context.target) & (progress.num_steps < max_steps)
            return more & ~progress.broken & (since < _PATIENCE)

        def body(carry):
            progress, memory, least, since = carry
            progress, memory = self.advance(context, progress, memory)
            better = progress.residual < least
            least = jnp.minimum(progress.residual, least)
            return progress, memory, least, jnp.where(better, 0, since + 1)

        carry = (progress, memory, progress.residual, jnp.zeros_like(progress.num_steps))
        return lax.while_loop(running, body, carry)[0]


def _start(
    context: Context, b: Vector, size: Scalar, guess: Vector | None, unit: Scalar
) -> Progress:
    none = jnp.zeros_like(size, jnp.int32)
    # NaN in b: nothing is computed, and `broken` says why.
    start = Progress(tree.zeros_like(b), b, size, none, none, none, jnp.isnan(size))
    if guess is None:
        return start
    start = start._replace(x=tree.scale(jnp.where(size > 0, 1 / unit, 0 * unit), guess))
    return _with_true_residual(context, start, b)


def _with_true_residual(context: Context, progress: Progress, b: Vector) -> Progress:
    r = tree.sub(b, context.mv(progress.x))
    return progress._replace(r=r, residual=context.norm(r)).worked(matvecs=1)


def _finite(progress: Progress) -> Flag:
    return jnp.isfinite(progress.residual)


def _result(progress: Progress, target: Scalar, max_steps: int) -> lx.RESULTS:
    where, results = lx.RESULTS.where, lx.RESULTS
    exhausted = progress.num_steps >= max_steps
    failed = where(exhausted, results.max_steps_reached, results.stagnation)
    failed = where(progress.broken, results.breakdown, failed)
    return where(progress.residual <= target, results.successful, failed)

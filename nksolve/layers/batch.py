"""How an implicit layer treats the samples of a batch."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, PyTree

from ..newton.base import AbstractRootFinder
from ..newton.recording import Recorded
from ..results import REASONS
from ..typing import Norm, Scalar, Vector
from ..verbs.compacted import compacted_root_find
from ..verbs.memory import resumed
from ..verbs.root_find import root_find

#: `equation(z, shared, own)`: the residual of one sample; `shared` is what all samples have in
#: common (the cell), `own` what is the sample's (its input, its key).
Equation = Callable[[Any, Any, Any], Vector]


class Settings(NamedTuple):
    """Of the solve, whatever the batch."""

    max_steps: int
    adjoint: optx.AbstractAdjoint | None
    throw: bool
    tags: frozenset[object]
    iterates: tuple[int, ...] = ()

    def keywords(self) -> dict[str, Any]:
        """For the verbs."""
        return {name: getattr(self, name) for name in ("max_steps", "adjoint", "throw", "tags")}

    def prepared(self, solver: Any, memory: PyTree) -> AbstractRootFinder:
        """The solver, going on from what an earlier solve left, with iterates to be recorded."""
        solver = resumed(solver, memory)
        if not self.iterates:
            return solver
        return Recorded(solver=solver, trials=self.iterates)  # pyright: ignore[reportCallIssue]


class Solved(NamedTuple):
    """z, the residual norm of each sample, the stats."""

    value: Any
    residual_norm: Any
    success: Any
    stats: dict[str, Any]


class AbstractBatch(eqx.Module):
    """What the leading axis of a layer's input means to the solve."""

    @abc.abstractmethod
    def lifted(self, fn: Callable[..., Any], *, shared_result: bool = False) -> Callable[..., Any]:
        """`fn(shared, *own)` of one sample as a function of all; the result is one for each, or
        must be the same for all."""

    @abc.abstractmethod
    def keys(self, key: Array, x: PyTree) -> Array:
        """A key for each sample."""

    @abc.abstractmethod
    def solve(
        self,
        equation: Equation,
        solver: AbstractRootFinder,
        z0: Any,
        shared: Any,
        own: Any,
        memory: PyTree,
        settings: Settings,
    ) -> Solved:
        """Solves `equation(z, shared, own) = 0` for every sample."""


class Single(AbstractBatch):
    """One sample, or one system of whatever the cell takes: no axis is treated specially.

    Under `jax.vmap` the lanes run in lockstep, each with its own tolerance.
    """

    def lifted(self, fn: Callable[..., Any], *, shared_result: bool = False) -> Callable[..., Any]:
        """Itself."""
        return fn

    def keys(self, key: Array, x: PyTree) -> Array:
        """The key."""
        return key

    def solve(
        self,
        equation: Equation,
        solver: AbstractRootFinder,
        z0: Any,
        shared: Any,
        own: Any,
        memory: PyTree,
        settings: Settings,
    ) -> Solved:
        """One root find."""
        solver = settings.prepared(solver, memory)
        return _solved(
            root_find(_OfPair(equation), solver, z0, (shared, own), **settings.keywords())
        )


class AbstractLeadingAxis(AbstractBatch):
    """The leading axis of every array of x and of z is that of the samples."""

    def lifted(self, fn: Callable[..., Any], *, shared_result: bool = False) -> Callable[..., Any]:
        """Vmapped over what is a sample's own."""

        def run(shared, *own):
            axes = (None, *(eqx.if_array(0) for _ in own))
            out = None if shared_result else eqx.if_array(0)
            return eqx.filter_vmap(fn, in_axes=axes, out_axes=out)(shared, *own)

        return run

    def keys(self, key: Array, x: PyTree) -> Array:
        """One for each sample."""
        return jax.random.split(key, _length(x))


class Joint(AbstractLeadingAxis):
    """The batch as one system: one Newton step, one line search, one Krylov space for all.

    The cell is vmapped over the leading axis. Tolerances bound the largest of the samples' residual
    norms (the solver's `norm`, taken sample by sample). The cheapest mode where the samples are
    alike: a Krylov basis of one long vector, no masks. One hard sample keeps all of them going.
    """

    def solve(
        self,
        equation: Equation,
        solver: AbstractRootFinder,
        z0: Any,
        shared: Any,
        own: Any,
        memory: PyTree,
        settings: Settings,
    ) -> Solved:
        """One root find for the residuals of all samples together."""
        start = z0
        own, z0, good = _set_aside(own, z0)
        norm = LargestOf(solver.norm)
        solver = eqx.tree_at(lambda s: s.norm, solver, norm)
        solver = settings.prepared(solver, memory)
        together = _Together(equation, norm.norm)
        solution = root_find(
            together, solver, z0, (shared, own), has_aux=True, **settings.keywords()
        )
        solved = _solved(solution)
        success = jnp.broadcast_to(solved.success, good.shape)
        if settings.iterates:
            per_sample = jtu.tree_map(lambda x: jnp.swapaxes(x, 0, 1), solved.stats["iterates"])
            solved = solved._replace(stats={**solved.stats, "iterates": per_sample})
        return _flagged(solved._replace(residual_norm=solution.aux, success=success), start, good)


class PerSample(AbstractLeadingAxis):
    """Each sample for itself, all in lockstep: the solve vmapped over the leading axis.

    Each has its own forcing terms, line search and Krylov space, and stops counting at its own
    tolerance; arrays hold every sample to the end, so the clock runs for the slowest.
    """

    def solve(
        self,
        equation: Equation,
        solver: AbstractRootFinder,
        z0: Any,
        shared: Any,
        own: Any,
        memory: PyTree,
        settings: Settings,
    ) -> Solved:
        """A vmapped root find."""
        start = z0
        own, z0, good = _set_aside(own, z0)

        def one(z0, shared, own, memory):
            mine = settings.prepared(solver, memory)
            return _solved(
                root_find(_OfPair(equation), mine, z0, (shared, own), **settings.keywords())
            )

        each = eqx.if_array(0)
        run = eqx.filter_vmap(one, in_axes=(each, None, each, each))
        return _flagged(run(z0, shared, own, memory), start, good)


class Compacted(AbstractLeadingAxis):
    """Each sample for itself, and finished ones are taken out of the batch, forward and backward.

    As soon as no more than the next of `fractions` of the samples are unfinished, these are
    gathered into arrays of that size, so that a few hard samples do not keep the others computing;
    see `nks.compacted_root_find`. One program holds a loop for each size, so it compiles longer.
    `info.stats["stages"]` tells what was executed.

    **Arguments:**

    - `fractions`: the sizes of the stages as fractions of the batch, from 1 down, at most five.
    """

    fractions: tuple[int | float, ...] = eqx.field(static=True, default=(1, 1 / 4, 1 / 16, 1 / 64))

    def solve(
        self,
        equation: Equation,
        solver: AbstractRootFinder,
        z0: Any,
        shared: Any,
        own: Any,
        memory: PyTree,
        settings: Settings,
    ) -> Solved:
        """A compacted root find."""
        solution = compacted_root_find(
            _OfPair(equation), settings.prepared(solver, None), z0, (shared, own),
            in_axes=(None, 0), fractions=self.fractions, memory=memory, **settings.keywords(),
        )  # fmt: skip
        return _solved(solution)


class LargestOf(eqx.Module):
    """The largest of the samples' norms."""

    norm: Norm

    def __call__(self, vector: Vector) -> Scalar:
        return jnp.max(jax.vmap(self.norm)(vector), initial=0.0)


class _OfPair(eqx.Module):
    """An equation as a residual of (z, args)."""

    equation: Equation

    def __call__(self, z: Any, args: Any) -> Vector:
        return self.equation(z, *args)


class _Together(eqx.Module):
    """The equations of all samples; their norms as aux."""

    equation: Equation
    norm: Norm

    def __call__(self, z: Any, args: Any) -> tuple[Vector, Float[Array, " batch"]]:
        shared, own = args
        axes = (eqx.if_array(0), None, eqx.if_array(0))
        f = eqx.filter_vmap(self.equation, in_axes=axes)(z, shared, own)
        return f, jax.lax.stop_gradient(jax.vmap(self.norm)(f))


def _solved(solution: optx.Solution) -> Solved:
    success = jnp.asarray(solution.result == optx.RESULTS.successful)
    return Solved(solution.value, solution.stats["residual_norm"], success, solution.stats)


def _length(own: PyTree) -> int:
    leaves = jtu.tree_leaves(eqx.filter(own, eqx.is_array))
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "A batch needs inputs whose arrays have one leading axis of the same length, but the "
            f"lengths are {sorted(lengths)}. For one sample use `batch=nks.Single()`."
        )
    return lengths.pop()


def _set_aside(own: PyTree, z0: Any) -> tuple[PyTree, Any, Bool[Array, " batch"]]:
    """Samples with NaN or infinities in what they are given become copies of one without, so that
    nothing of them reaches what the samples share; `good` marks the others."""
    length = _length((own, z0))
    inexact = jtu.tree_leaves(eqx.filter((own, z0), eqx.is_inexact_array))
    good = jnp.ones(length, bool)
    for leaf in inexact:
        good &= jnp.all(jnp.isfinite(leaf).reshape(length, -1), axis=1)
    sound = jnp.argmax(good)

    def replaced(leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        flags = good.reshape(length, *([1] * (leaf.ndim - 1)))
        return jnp.where(flags, leaf, leaf[sound])

    return jtu.tree_map(replaced, own), jtu.tree_map(replaced, z0), good


def _flagged(solved: Solved, z0: Any, good: Bool[Array, " batch"]) -> Solved:
    """The samples that were set aside: their start, and `nonfinite`."""

    def back(found, start):
        if not eqx.is_inexact_array(found):
            return found
        return jnp.where(good.reshape(-1, *([1] * (found.ndim - 1))), found, start)

    nan = jnp.full_like(solved.residual_norm, jnp.nan)
    stats = solved.stats
    flag = jax.vmap(
        lambda good, reason: REASONS.where(good, reason, REASONS.nonfinite),
        in_axes=(0, 0 if jtu.tree_leaves(stats["reason"])[0].ndim else None),
    )
    reason = flag(good, stats["reason"])
    return Solved(
        value=jtu.tree_map(back, solved.value, z0),
        residual_norm=jnp.where(good, solved.residual_norm, nan),
        success=solved.success & good,
        stats={**stats, "reason": reason},
    )

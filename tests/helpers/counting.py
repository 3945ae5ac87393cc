"""Count how often a function is *executed*, apart from how often it is traced.

`Counter.tick` is the identity, written as a JAX primitive with rules of its own:

    role of the value that passes     what one execution means
    primal                            the function was evaluated
    tangent                           its linearised map was applied forward
    transposed                        its linearised map was applied in reverse

The role changes by the rules themselves: the JVP sends the primal through `primal` and the
tangent through `tangent`; transposition swaps `tangent` for `transposed`. So a stored
linearisation, `jax.linearize(fn, y)[1]`, ticks `tangent` at each use and never `primal`.

How it counts. The value passes unchanged; beside it stands a host callback. To JAX the primitive
has no effect, so what JAX drops as dead before it lowers a program (a primal value that only its
derivative was wanted of) is not counted. To XLA the callback has a side effect, so it is neither
merged with an equal one nor moved out of a loop: a program that evaluates the function twice at
the same point counts two, whatever XLA makes of the rest. Programs with host callbacks never enter
the persistent compilation cache. Outside of `jit` nothing is dead, and everything counts.

Under `vmap` a batched execution counts once, with the number of lanes recorded. Inside a
`shard_map` every device runs the callback, so counts there are per device. Two `cond` branches
that `vmap` turned into a `select` are both executed, and both counted.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import equinox as eqx
import jax

# The sharding annotation and the emission of a callback have no public spelling that leaves the
# arguments as numpy arrays; `pure_callback` calls `device_put` on the host thread, which can
# deadlock on a machine with few cores.
from jax._src.callback import _callback_op_sharding
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


class Execution(NamedTuple):
    role: str  # "primal", "tangent" or "transposed"
    lanes: int | None  # the batch size under `vmap`, None without


class Count:
    """What was executed within one `Counter.measure()`."""

    def __init__(self) -> None:
        self.executions: list[Execution] = []

    def _number(self, role: str) -> int:
        return sum(e.role == role for e in self.executions)

    @property
    def primal(self) -> int:
        """Evaluations of the function."""
        return self._number("primal")

    @property
    def tangent(self) -> int:
        """Forward applications of its linearised map."""
        return self._number("tangent")

    @property
    def transposed(self) -> int:
        """Reverse applications of its linearised map."""
        return self._number("transposed")

    @property
    def batched(self) -> int:
        """Executions of any role that carried more than one lane by `vmap`."""
        return sum(e.lanes is not None for e in self.executions)

    def lanes(self, role: str) -> list[int | None]:
        """The batch size of each execution of this role, in the order in which they ran."""
        return [e.lanes for e in self.executions if e.role == role]

    def __repr__(self) -> str:
        return (
            f"Count(primal={self.primal}, tangent={self.tangent}, "
            f"transposed={self.transposed}, batched={self.batched})"
        )


class Counter:
    """Hand `tick` a function's input; `measure` then counts that function's executions.

    counter = Counter()
    fn = lambda y, args: residual(counter.tick(y), args)
    with counter.measure() as count:
        solve(fn)
    assert count.primal == 1
    """

    def __init__(self) -> None:
        self._active: list[Count] = []
        self._lock = threading.Lock()

    def tick(self, x: Any) -> Any:
        """The identity on a PyTree; its inexact leaves pass through one counting primitive."""
        dynamic, static = eqx.partition(x, eqx.is_inexact_array)
        leaves, treedef = jax.tree.flatten(dynamic)
        if not leaves:
            raise ValueError("Counter.tick needs at least one floating-point array")
        leaves = _tick_p.bind(*leaves, counter=self, role="primal", lanes=None)
        return eqx.combine(jax.tree.unflatten(treedef, leaves), static)

    @contextmanager
    def measure(self) -> Iterator[Count]:
        """Counts from here to the end of the block, once what was dispatched has run."""
        _wait()
        count = Count()
        with self._lock:
            self._active.append(count)
        try:
            yield count
        finally:
            _wait()
            with self._lock:
                self._active.remove(count)

    def _record(self, role: str, lanes: int | None) -> None:
        with self._lock:
            for count in self._active:
                count.executions.append(Execution(role, lanes))


def _wait() -> None:
    # Results may still be on their way: dispatch is asynchronous on every backend.
    for array in jax.live_arrays():
        if not array.is_deleted():
            array.block_until_ready()
    jax.effects_barrier()


# --- the identity ---------------------------------------------------------------------------

_tick_p = Primitive("tick")
_tick_p.multiple_results = True


@_tick_p.def_impl
def _tick_impl(*xs, counter, role, lanes):
    counter._record(role, lanes)
    return list(xs)


@_tick_p.def_abstract_eval
def _tick_abstract_eval(*xs, counter, role, lanes):
    del counter, role, lanes
    return list(xs)


def _tick_jvp(primals, tangents, *, counter, role, lanes):
    out = _tick_p.bind(*primals, counter=counter, role=role, lanes=lanes)
    # A linear map's own derivative is that map again.
    tangent_role = "tangent" if role == "primal" else role
    return out, _bind_nonzero(tangents, counter=counter, role=tangent_role, lanes=lanes)


def _tick_transpose(cotangents, *xs, counter, role, lanes):
    role = "tangent" if role == "transposed" else "transposed"
    cotangents = [
        ct if ad.is_undefined_primal(x) else None for x, ct in zip(xs, cotangents, strict=True)
    ]
    return _bind_nonzero(cotangents, counter=counter, role=role, lanes=lanes)


def _bind_nonzero(values, **params):
    """The primitive on the values that are there; symbolic zeros and `None` pass by."""
    present = [i for i, v in enumerate(values) if v is not None and type(v) is not ad.Zero]
    out = list(values)
    if present:
        ticked = _tick_p.bind(*(values[i] for i in present), **params)
        for i, value in zip(present, ticked, strict=True):
            out[i] = value
    return out


def _tick_batch(xs, dims, *, counter, role, lanes):
    size = next(x.shape[d] for x, d in zip(xs, dims, strict=True) if d is not None)
    lanes = size * (1 if lanes is None else lanes)
    return _tick_p.bind(*xs, counter=counter, role=role, lanes=lanes), dims


def _tick_lowering(ctx, *xs, counter, role, lanes):
    def callback():
        counter._record(role, lanes)
        return ()

    mlir.emit_python_callback(
        ctx.replace(avals_in=[], avals_out=[]),
        callback,
        None,
        [],
        [],
        [],
        has_side_effect=True,
        returns_token=False,
        sharding=_callback_op_sharding(ctx.module_context.axis_context, None, []),
    )
    return xs


ad.primitive_jvps[_tick_p] = _tick_jvp
ad.primitive_transposes[_tick_p] = _tick_transpose
batching.primitive_batchers[_tick_p] = _tick_batch
mlir.register_lowering(_tick_p, _tick_lowering, cacheable=False)


def weighted(count: Count, role: str) -> int:
    """Executions of this role times their lanes: the work, where `count` gives the calls."""
    return sum(lanes or 1 for lanes in count.lanes(role))

"""How far a floating-point evaluation may lie from the function: a running error analysis.

Each operation of a program errs by a few units of round-off of its own result, and passes on what
its arguments err by times its derivatives. Added up in absolute value on the way through the
program, that bounds |fl(F)(y) − F(y)| to first order in ε, whatever order of sums, fusion or
contraction the compiler chose.

Source: Wilkinson, J. IMA 8(2), 1986 (error analysis revisited); Higham, Accuracy and Stability of
Numerical Algorithms, 2nd ed., §3.3.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array

#: Round-off of one result in units of ε: sums and products are rounded to ½; libraries for the
#: elementary functions promise a few.
BASIC, ELEMENTARY = 1.0, 4.0

_ELEMENTARY = {
    "atan2", "cos", "cosh", "exp", "expm1", "log", "log1p", "pow", "sin", "sinh", "tan", "tanh",
}  # fmt: skip
_ARITHMETIC = {"add", "integer_pow", "mul", "sqrt", "square", "sub"}
#: Not rounded, and with slopes of at most 1.
_CONTRACTING = {"abs", "max", "min", "neg"}
#: Those that move numbers and change none.
_STRUCTURAL = {
    "broadcast_in_dim", "concatenate", "convert_element_type", "gather", "pad", "reshape", "rev",
    "scatter", "select_n", "slice", "squeeze", "stack", "transpose",
}  # fmt: skip
_SUMS = {"cumsum", "reduce_sum", "scatter-add"}


class _Bounded(NamedTuple):
    value: Array
    error: Array  # of the shape of a value that is inexact, else 0


def rounding_bound(fn: Callable[..., Array], *args: Any) -> Callable[..., tuple[Array, Array]]:
    """`(ε, tiny, *args) → (F, e)`: fn in float64, and |fl(F) − F| ≤ e where fl has that ε.

    `args` are like those that it will be called with, and exact; constants in the program are not:
    they are rounded. `tiny` is the least normal number, below which results are flushed to zero.
    """
    closed = jax.make_jaxpr(fn)(*args)

    def bounded(eps: Array, tiny: Array, *args: Any) -> tuple[Array, Array]:
        given = [_Bounded(jnp.asarray(x), jnp.zeros(jnp.shape(x))) for x in jax.tree.leaves(args)]
        (out,) = _followed(closed, given, eps, tiny)
        return out.value, out.error

    return bounded


def _followed(
    closed: ClosedJaxpr, args: Sequence[_Bounded], eps: Array, tiny: Array
) -> list[_Bounded]:
    known: dict[Any, _Bounded] = {}

    def constant(x: Any) -> _Bounded:
        value = jnp.asarray(x)
        if not _inexact(value):
            return _Bounded(value, jnp.zeros(value.shape))
        exact = np.asarray(x, np.float64) == np.asarray(x, np.float32)
        return _Bounded(value, jnp.where(jnp.asarray(exact), 0.0, eps * jnp.abs(value)))

    def read(atom: Any) -> _Bounded:
        return constant(atom.val) if isinstance(atom, Literal) else known[atom]

    jaxpr = closed.jaxpr
    known.update(zip(jaxpr.invars, args, strict=True))
    known.update(zip(jaxpr.constvars, map(constant, closed.consts), strict=True))
    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if inner is not None:
            outputs = _followed(inner, inputs, eps, tiny)
        elif eqn.primitive.name == "split":
            parts = (eqn.primitive.bind(x, **eqn.params) for x in inputs[0])
            outputs = [_Bounded(*pair) for pair in zip(*parts, strict=True)]
        elif eqn.primitive.multiple_results:
            raise NotImplementedError(f"no bound is known for {eqn.primitive}")
        else:
            outputs = [_after(eqn.primitive, eqn.params, inputs, eps, tiny)]
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _after(
    primitive: Any, params: dict[str, Any], inputs: list[_Bounded], eps: Array, tiny: Array
) -> _Bounded:
    """The result of an operation."""
    name = primitive.name
    bind = lambda *xs: primitive.bind(*xs, **params)
    values, errors = [x.value for x in inputs], [x.error for x in inputs]
    value = bind(*values)
    whole = name == "iota" or (name == "convert_element_type" and not _inexact(values[0]))
    if whole or not _inexact(value):
        return _Bounded(value, jnp.zeros(value.shape))
    errors = [e if _inexact(v) else v for v, e in zip(values, errors, strict=True)]
    if name in _STRUCTURAL:
        return _Bounded(value, bind(*errors))
    magnitudes = [jnp.abs(v) if _inexact(v) else v for v in values]
    if name in _SUMS:
        terms = math.prod(values[-1].shape) if name == "scatter-add" else _terms(params, values[0])
        return _Bounded(value, bind(*errors) + terms * eps * bind(*magnitudes) + tiny)
    if name == "dot_general":
        (a, b), (ea, eb) = magnitudes, errors
        contracted = params["dimension_numbers"][0][0]
        terms = math.prod(a.shape[axis] for axis in contracted) + 1
        passed = bind(ea, b) + bind(a, eb)
        return _Bounded(value, passed + terms * (eps * bind(a, b) + tiny))
    if name == "reduce_prod":
        passed = jax.jvp(bind, (magnitudes[0],), (errors[0],))[1]
        terms = _terms(params, values[0])
        return _Bounded(value, passed + terms * (eps * jnp.abs(value) + tiny))
    if name in _CONTRACTING:
        largest = functools.reduce(jnp.maximum, errors)
        return _Bounded(value, jnp.broadcast_to(largest, value.shape))
    if name == "div":
        # Not by the derivative, in which b² may underflow.
        passed = (errors[0] + jnp.abs(value) * errors[1]) / magnitudes[1]
        return _Bounded(value, passed + BASIC * eps * jnp.abs(value) + tiny)
    if name not in _ARITHMETIC | _ELEMENTARY:
        raise NotImplementedError(f"no bound is known for the operation {name!r}")
    rounding = ELEMENTARY if name in _ELEMENTARY else BASIC
    if name == "integer_pow":
        rounding = abs(params["y"])
    passed = jnp.zeros(value.shape)
    for k, error in enumerate(errors):
        one = [jnp.ones_like(v) if j == k else jnp.zeros_like(v) for j, v in enumerate(values)]
        slope = jnp.abs(jax.jvp(bind, tuple(values), tuple(one))[1])
        # Where there is no derivative, and nothing to be passed on.
        passed = passed + jnp.where(error == 0, 0.0, slope * error)
    return _Bounded(value, passed + rounding * eps * jnp.abs(value) + tiny)


def _inexact(value: Array) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.inexact))


def _terms(params: dict[str, Any], value: Array) -> int:
    axes = params["axes"] if "axes" in params else (params["axis"],)
    return math.prod(value.shape[axis] for axis in axes)

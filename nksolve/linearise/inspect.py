"""What cannot be linearised once is found here, and said.

`check_unknown` and `check_residual` look at leaves. `check_traced` walks the program of a residual
along the values that carry a tangent with respect to y, as JAX propagates it: through inexact
values only, and not through `floor`, `sign` or `stop_gradient`. Two things on that way stop a
linearisation from being made once:

- a `while_loop`: its number of trips is not known, so JAX has no place to keep its intermediate
  values. `jax.linearize` does not fail: it runs the whole loop again inside every matvec, and the
  result has no transpose;
- a `custom_vjp`: it has a reverse rule and no forward one. Reverse mode and its transpose do,
  unless the rule itself runs such a loop.

Primitives with a derivative rule of their own (`custom_jvp`, `lax.custom_linear_solve`,
`lax.custom_root`, `lx.linear_solve`) are not looked into: their rule replaces what they compute.
"""

import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.extend.core as jec
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .. import rule
from ..typing import Vector, Y
from .policies import AbstractPolicy


class LinearisationError(ValueError):
    """A residual that the chosen policy cannot linearise; the text names the place and ways out."""


def check_unknown(y: Y) -> None:
    """Refuses leaves of y that look like variables and cannot be.

    **Raises:** `TypeError`, with the leaf's key path, for integer and Boolean arrays and for Python
    numbers. Other leaves (functions, strings, `None`, Python bools, PRNG keys) are held fixed.
    """
    for path, leaf in jtu.tree_leaves_with_path(y):
        place = f"y{jtu.keystr(path)}"
        if isinstance(leaf, int | float | complex) and not isinstance(leaf, bool | np.generic):
            kind = type(leaf).__name__
            what = "integer" if isinstance(leaf, int) else "number"
            raise TypeError(
                f"The unknown has a Python {what} at `{place}` ({kind} {leaf!r}). Unknowns are "
                "floating-point or complex arrays: convert with `jnp.asarray`"
                + (" of a float" if isinstance(leaf, int) else "")
                + " if it is to be solved for; otherwise put it in `args`, or make it a static "
                "field (`eqx.field(static=True)`)."
            )
        if isinstance(leaf, jax.Array | np.ndarray | np.generic):
            dtype = leaf.dtype
            if jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_):
                raise TypeError(
                    f"The unknown has an array of dtype {dtype} at `{place}`, which has no "
                    "derivative. Pass floats (`.astype(float)`) if it is to be solved for; "
                    "otherwise put it in `args`, or make it a static field of its module."
                )


def check_residual(value: Any) -> None:
    """Refuses a residual with leaves other than inexact arrays.

    **Raises:** `TypeError` with the leaf's key path and its dtype or type.
    """
    for path, leaf in jtu.tree_leaves_with_path(value):
        if eqx.is_inexact_array(leaf) or isinstance(leaf, float | complex):
            continue
        dtype = getattr(leaf, "dtype", None)
        what = f"type {type(leaf).__name__}" if dtype is None else f"dtype {dtype}"
        raise TypeError(
            f"The residual must be a PyTree of floating-point or complex arrays; `fn` returned a "
            f"leaf of {what} at `f{jtu.keystr(path)}`. Other results belong into `aux` "
            "(`has_aux=True`)."
        )


def check_linearisable(
    residual: Callable[..., Any], y: Vector, params: Vector, policy: AbstractPolicy
) -> None:
    """`check_traced` of `residual(y, params) -> (value, aux)`, which is traced for it.

    **Raises:** `LinearisationError`; `TypeError` from the residual's own checks.
    """
    if policy.mode == "none":
        return

    def run(y, params):
        return eqx.filter(residual(y, params), eqx.is_inexact_array)

    closed = jax.make_jaxpr(run)(y, params)
    check_traced(closed.jaxpr, len(jtu.tree_leaves(y)), policy)


def check_traced(jaxpr: jec.Jaxpr, num_unknowns: int, policy: AbstractPolicy) -> None:
    """Whether `policy` can linearise a program in its first `num_unknowns` inputs.

    Work: one pass over the equations (more inside loops, until their carry settles); nothing is
    evaluated.

    **Raises:** `LinearisationError` that names the first obstacle and the ways out.
    """
    if policy.mode == "none":
        return
    num_others = len(jaxpr.invars) - num_unknowns
    walk = _Walk(policy, _while_text)
    walk.jaxpr(jaxpr, [True] * num_unknowns + [False] * num_others)
    if walk.met_custom_vjp:
        _check_transposable(jaxpr, num_unknowns, policy)


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _check_transposable(jaxpr: jec.Jaxpr, num_unknowns: int, policy: AbstractPolicy) -> None:
    # What a reverse rule does is seen only by running it. J v is the transpose of the rule, and
    # there is none of a `while_loop` on the cotangent.
    consts, inputs, outputs = (
        [_struct(var.aval) for var in variables]
        for variables in (jaxpr.constvars, jaxpr.invars, filter(_inexact, jaxpr.outvars))
    )
    is_inexact = [_inexact(atom) for atom in jaxpr.outvars]

    def pull_back(cotangents, consts, inputs):
        def run(*unknowns):
            out = jax.core.eval_jaxpr(jaxpr, consts, *unknowns, *inputs[num_unknowns:])
            return [x for x, keep in zip(out, is_inexact, strict=True) if keep]

        return jax.vjp(run, *inputs[:num_unknowns])[1](cotangents)

    closed = jax.make_jaxpr(pull_back)(outputs, consts, inputs)
    flags = [True] * len(outputs) + [False] * (len(closed.jaxpr.invars) - len(outputs))
    _Walk(policy, _reverse_while_text).jaxpr(closed.jaxpr, flags)


#: Zero derivative with an inexact result.
_FLAT = frozenset({"sign", "floor", "ceil", "round", "stop_gradient"})
#: Have a derivative rule of their own, also where they hold a jaxpr.
_OWN_RULE = frozenset({rule.NAME, "custom_jvp_call", "custom_linear_solve", "linear_solve"})


class _Walk:
    """Follows tangents through a jaxpr; raises at what the policy cannot do."""

    def __init__(self, policy: AbstractPolicy, while_text: Callable[..., str]):
        self.policy = policy
        self.while_text = while_text
        self.met_custom_vjp = False

    def jaxpr(self, jaxpr: jec.Jaxpr, inputs: Sequence[bool]) -> list[bool]:
        """Which outputs carry a tangent, when the given inputs do."""
        active = {v for v, is_active in zip(jaxpr.invars, inputs, strict=True) if is_active}

        def carries(atom: Any) -> bool:
            return not isinstance(atom, jec.Literal) and atom in active

        for eqn in jaxpr.eqns:
            flags = [carries(atom) for atom in eqn.invars]
            if any(flags):
                outputs = self.equation(eqn, flags)
                pairs = zip(eqn.outvars, outputs, strict=True)
                active.update(v for v, flag in pairs if flag and _inexact(v))
        return [carries(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: jec.JaxprEqn, inputs: list[bool]) -> list[bool]:
        name, params = eqn.primitive.name, eqn.params
        everything = [True] * len(eqn.outvars)
        if name in _FLAT:
            return [False] * len(eqn.outvars)
        if name in _OWN_RULE:
            return everything
        if name.startswith("custom_vjp_call"):
            if self.policy.mode == "forward":
                raise LinearisationError(_custom_vjp_text(eqn, self.policy))
            self.met_custom_vjp = True
            return everything
        if name == "while":
            return self.while_loop(eqn, inputs)
        if name == "scan":
            first = params["num_consts"]
            return self.loop(params["jaxpr"].jaxpr, inputs, first, params["num_carry"])
        if name == "cond":
            branches = [self.jaxpr(branch.jaxpr, inputs[1:]) for branch in params["branches"]]
            return [any(flags) for flags in zip(*branches, strict=True)]
        # jit, remat, shard_map and other calls: one inner jaxpr of the same inputs.
        inner = [_open(p) for p in params.values() if isinstance(p, jec.Jaxpr | jec.ClosedJaxpr)]
        if len(inner) == 1 and len(inner[0].invars) == len(inputs):
            outputs = self.jaxpr(inner[0], inputs)
            return outputs if len(outputs) == len(everything) else everything
        return everything

    def while_loop(self, eqn: jec.JaxprEqn, inputs: list[bool]) -> list[bool]:
        # The predicate is Boolean: y in it alone moves no tangent into the loop.
        body = inputs[eqn.params["cond_nconsts"] :]
        num_consts = eqn.params["body_nconsts"]
        if any(body) and self.policy.stores:
            raise LinearisationError(self.while_text(eqn, self.policy))
        num_carry = len(body) - num_consts
        return self.loop(_open(eqn.params["body_jaxpr"]), body, num_consts, num_carry)

    def loop(
        self, body: jec.Jaxpr, inputs: list[bool], num_consts: int, num_carry: int
    ) -> list[bool]:
        """A loop body with inputs (consts, carry, slices): repeated until the carry settles."""
        end = num_consts + num_carry
        consts, carry, slices = inputs[:num_consts], inputs[num_consts:end], inputs[end:]
        while True:
            outputs = self.jaxpr(body, [*consts, *carry, *slices])
            grown = [a or b for a, b in zip(carry, outputs[:num_carry], strict=True)]
            if grown == carry:
                return [*carry, *outputs[num_carry:]]
            carry = grown


def _open(jaxpr: jec.Jaxpr | jec.ClosedJaxpr) -> jec.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, jec.ClosedJaxpr) else jaxpr


def _inexact(var: Any) -> bool:
    dtype = getattr(var.aval, "dtype", None)
    return dtype is None or jnp.issubdtype(dtype, jnp.inexact)


def _policy_name(policy: AbstractPolicy) -> str:
    return f"`nks.{type(policy).__name__}()`"


def _while_text(eqn: jec.JaxprEqn, policy: AbstractPolicy) -> str:
    return f"""The residual runs a `while_loop` on values that depend on y{_place(eqn)}. Its \
number of trips is not known beforehand, so {_policy_name(policy)} cannot keep what its derivative \
needs. Ways out:
- `jax.lax.scan`, or `jax.lax.fori_loop` with a number of trips that is a Python integer;
- `equinox.internal.while_loop(..., kind="bounded", max_steps=...)`;
- if the loop solves an inner equation: implicit differentiation, as in `nks.root_find` or \
`jax.lax.custom_root`;
- if only a diagnostic comes out of it: `jax.lax.stop_gradient` on what goes into it;
- `policy=nks.Recompute()`, which runs the loop again at each matvec and has no transpose, hence \
no gradient;
- `policy=nks.FiniteDifference()`, likewise forward only.
A loop that depends on `args` alone does no harm."""


def _custom_vjp_text(eqn: jec.JaxprEqn, policy: AbstractPolicy) -> str:
    info = getattr(getattr(_call_jaxpr(eqn), "debug_info", None), "func_src_info", None)
    function, _, place = info.partition(" at ") if isinstance(info, str) else ("", "", "")
    name = f" `{function}`" if function else ""
    defined = f" (defined at {place})" if place else ""
    return f"""The residual calls a `jax.custom_vjp` function{name}{defined} on values that depend \
on y{_place(eqn)}. It has a reverse rule only, and {_policy_name(policy)} works in forward mode. \
Ways out:
- `policy=nks.Transposed()`, which keeps what reverse mode keeps and transposes it for J v;
- `jax.custom_jvp` in its place, which serves both modes;
- if it is a loop of Equinox or Diffrax (`kind="checkpointed"`, a recursive-checkpoint adjoint): \
`kind="bounded"`, or an adjoint with a forward mode."""


def _reverse_while_text(eqn: jec.JaxprEqn, policy: AbstractPolicy) -> str:
    return f"""The residual calls a `jax.custom_vjp` function whose reverse rule runs a \
`while_loop` on the cotangent{_place(eqn)}. {_policy_name(policy)} transposes that rule to get \
J v, and a loop whose number of trips is not known has no transpose. Ways out:
- if it is a loop of Equinox or Diffrax (`kind="checkpointed"`, a recursive-checkpoint adjoint): \
`kind="bounded"`, or an adjoint with a forward mode;
- if it solves an inner equation: implicit differentiation by a `jax.custom_jvp`, as in \
`nks.root_find` or `jax.lax.custom_root`;
- `policy=nks.FiniteDifference()`, forward only."""


def _call_jaxpr(eqn: jec.JaxprEqn) -> Any:
    found = [p for p in eqn.params.values() if isinstance(p, jec.Jaxpr | jec.ClosedJaxpr)]
    return _open(found[0]) if found else None


def _place(eqn: jec.JaxprEqn) -> str:
    """` (file:line, in function)` of the innermost frame that is not a library's, or nothing."""
    for file, line, function in _frames(eqn):
        if not _is_library(file):
            return f" ({file}:{line}, in `{function}`)"
    return ""


def _frames(eqn: jec.JaxprEqn) -> Iterator[tuple[str, int, str]]:
    # What an equation remembers of its origin is no stable part of JAX: without it, say nothing.
    frames = getattr(getattr(eqn.source_info, "traceback", None), "frames", ())
    for frame in frames:
        found = [getattr(frame, name, None) for name in ("file_name", "line_num", "function_name")]
        if None not in found:
            yield tuple(found)  # pyright: ignore[reportReturnType]


_PACKAGES = (
    "nksolve",
    "jax",
    "equinox",
    "lineax",
    "optimistix",
    "diffrax",
    "beartype",
    "jaxtyping",
)


def _is_library(file: str) -> bool:
    if file.startswith("<@beartype"):
        return True
    if file.startswith(sysconfig.get_path("stdlib")) and "site-packages" not in file:
        return True
    roots = [getattr(sys.modules.get(name), "__file__", None) for name in _PACKAGES]
    return any(root and file.startswith(os.path.dirname(root) + os.sep) for root in roots)

"""Evaluate a jaxpr in two phases: what does not depend on some of its inputs, then the rest.

A linearisation keeps arrays that depend on y ("hot": activations) and arrays that do not ("cold":
weights, their transposes, norms of weights). Inside a Newton loop the cold ones are loop
constants; only the hot ones are worth carrying. On a network the hot part is a few kB beside MB of
weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jec

_INLINED = ("jit", "pjit", "closed_call", "core_call")


def inline(closed: jec.ClosedJaxpr) -> jec.ClosedJaxpr:
    """The same program with every nested `jit` inlined, so that its parts can be told apart."""
    avals = [var.aval for var in closed.jaxpr.invars]
    structs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]

    def run(*args):
        return _interpret(closed.jaxpr, closed.consts, args)

    return jax.make_jaxpr(run)(*structs)


def _interpret(jaxpr: jec.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env: dict[Any, Any] = {}

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    _run(jaxpr.eqns, env)
    return [_read(env, atom) for atom in jaxpr.outvars]


def evaluate_linear(closed: jec.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Evaluates the jaxpr of a linear map, with `add` for `add_any`, so that zeros are pruned.

    Where one operand has no tangent, the derivative rule of `add_any` stores an array of zeros and
    adds it at each application; that of `add` does not.
    """
    return _interpret(closed.jaxpr, closed.consts, args)


def _apply(eqn: jec.JaxprEqn, inputs: list[Any]) -> list[Any]:
    if eqn.primitive.name in _INLINED:
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if isinstance(inner, jec.ClosedJaxpr):
            return _interpret(inner.jaxpr, inner.consts, inputs)
    if eqn.primitive.name == "add_any" and all(isinstance(x, jax.Array) for x in inputs):
        return [jax.lax.add(*inputs)]
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*inputs, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


class SplitJaxpr:
    """A jaxpr whose inputs are split into `num_hot` leading hot ones and cold ones."""

    def __init__(self, closed: jec.ClosedJaxpr, num_hot: int):
        self._closed = closed
        jaxpr = closed.jaxpr
        self._hot_in = jaxpr.invars[:num_hot]
        self._cold_in = jaxpr.invars[num_hot:]
        hot = set(self._hot_in)
        self._cold_eqns: list[jec.JaxprEqn] = []
        self._hot_eqns: list[jec.JaxprEqn] = []
        for eqn in _live(jaxpr):
            if any(not isinstance(atom, jec.Literal) and atom in hot for atom in eqn.invars):
                hot.update(eqn.outvars)
                self._hot_eqns.append(eqn)
            else:
                self._cold_eqns.append(eqn)
        self.hot_out = [not isinstance(atom, jec.Literal) and atom in hot for atom in jaxpr.outvars]
        read = [atom for eqn in self._hot_eqns for atom in eqn.invars] + list(jaxpr.outvars)
        self._boundary = list(
            dict.fromkeys(a for a in read if not isinstance(a, jec.Literal) and a not in hot)
        )

    def cold(self, args: Sequence[Any]) -> list[Any]:
        """Runs what depends on the cold inputs only; the result is for `hot`."""
        env = dict(zip(self._closed.jaxpr.constvars, self._closed.consts, strict=True))
        env.update(zip(self._cold_in, args, strict=True))
        _run(self._cold_eqns, env)
        return [env[var] for var in self._boundary]

    def hot(self, cold: list[Any], args: Sequence[Any]) -> list[Any]:
        """Runs the rest; returns all outputs."""
        env = dict(zip(self._boundary, cold, strict=True))
        env.update(zip(self._hot_in, args, strict=True))
        _run(self._hot_eqns, env)
        return [_read(env, atom) for atom in self._closed.jaxpr.outvars]

    def cold_outputs(self, cold: list[Any]) -> list[Any]:
        """The outputs that do not depend on the hot inputs; `None` in place of the others."""
        env = dict(zip(self._boundary, cold, strict=True))
        return [
            None if is_hot else _read(env, atom)
            for is_hot, atom in zip(self.hot_out, self._closed.jaxpr.outvars, strict=True)
        ]


def _live(jaxpr: jec.Jaxpr) -> list[jec.JaxprEqn]:
    """The equations that an output needs, or that have an effect."""
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, jec.Literal)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            needed.update(atom for atom in eqn.invars if not isinstance(atom, jec.Literal))
            live.append(eqn)
    return live[::-1]


def depends(fn: Callable[..., Any], *args: Any) -> list[bool]:
    """Which leaves of `fn(*args)` depend on the arguments at all."""
    closed = inline(jax.make_jaxpr(fn)(*args))
    return SplitJaxpr(closed, len(closed.jaxpr.invars)).hot_out


def _read(env: dict[Any, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, jec.Literal) else env[atom]


def _run(eqns: Sequence[jec.JaxprEqn], env: dict[Any, Any]) -> None:
    for eqn in eqns:
        inputs = [_read(env, atom) for atom in eqn.invars]
        env.update(zip(eqn.outvars, _apply(eqn, inputs), strict=True))


def distinct(closed: jec.ClosedJaxpr, first: int) -> tuple[jec.ClosedJaxpr, list[int]]:
    """Drops repeated outputs from position `first` on; also where each of those went."""
    kept: list[Any] = []
    seen: dict[Any, int] = {}
    places: list[int] = []
    jaxpr = closed.jaxpr
    for atom in jaxpr.outvars[first:]:
        key = id(atom) if isinstance(atom, jec.Literal) else atom
        if key not in seen:
            seen[key] = len(kept)
            kept.append(atom)
        places.append(seen[key])
    outvars = [*jaxpr.outvars[:first], *kept]
    return closed.replace(jaxpr=jaxpr.replace(outvars=outvars)), places

"""Functions with a forward-mode rule of their own, which differentiating again does not lose.

`jax.custom_jvp` does not serve here: where JAX splits the body of a `scan` into what is known and
what is not, it puts the function in the place of the call (`JaxprTrace.process_custom_jvp_call`,
jax 0.10), and the derivative of a gradient is then that of the iterations, or of a constant. A
primitive is left alone.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.extend.core as jec
import jax.interpreters.ad as ad
import jax.numpy as jnp
import jax.tree_util as jtu

from .loops import create_vprim


class ForwardRule:
    """`fn(*args, **keywords)` with a rule `rule(args, tangents, **keywords) → (out, out tangents)`.

    `None` stands for a tangent that is zero, in what the rule gets and in what it returns. The
    keywords are not differentiated, nor is what `fn` closes over: a tangent there raises
    `ValueError`. Derivatives of the rule are those of what it computes, so that it calls the
    function itself for the value.

    Used as a decorator; the rule is then given by `def_jvp`.
    """

    def __init__(self, fn: Callable[..., Any]):
        self._fn = fn
        self._rule: Callable[..., Any] | None = None

    def def_jvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Sets the rule."""
        self._rule = rule
        return rule

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        arrays, static = eqx.partition((args, keywords), eqx.is_array)
        leaves, treedef = jtu.tree_flatten(arrays)
        static_out: list[Any] = []

        def run(*leaves):
            args, keywords = eqx.combine(jtu.tree_unflatten(treedef, leaves), static)
            arrays, rest = eqx.partition(self._fn(*args, **keywords), eqx.is_array)
            static_out.append((rest, jtu.tree_structure(arrays)))
            return jtu.tree_leaves(arrays)

        closed = jax.make_jaxpr(run)(*leaves)
        rest, treedef_out = static_out[-1]
        call = _Call(self._rule, treedef, static, len(closed.consts))
        jaxpr = jec.ClosedJaxpr(_without_constants(closed.jaxpr), [])
        out = _with_rule.bind(*closed.consts, *leaves, jaxpr=jaxpr, call=call)
        return eqx.combine(jtu.tree_unflatten(treedef_out, out), rest)


_CLOSED_OVER = (
    "A derivative was asked for with respect to a value that a solver, a preconditioner or an "
    "adjoint holds or closes over, where it is not differentiated. Pass it through `args`, or "
    "apply `jax.lax.stop_gradient` to it."
)


class _Call:
    """What the rule needs of a call; compared by identity."""

    def __init__(self, rule: Any, treedef: Any, static: Any, num_consts: int):
        self._rule = rule
        self._treedef = treedef
        self._static = static
        self._num_consts = num_consts

    def tangents(self, primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        """(outputs, their tangents) by the rule."""
        fixed = tangents[: self._num_consts]
        if any(type(t) is not ad.Zero for t in fixed):
            raise ValueError(_CLOSED_OVER)
        leaves = [jnp.asarray(x) for x in primals[self._num_consts :]]
        moved = [None if type(t) is ad.Zero else t for t in tangents[self._num_consts :]]
        args, keywords = eqx.combine(jtu.tree_unflatten(self._treedef, leaves), self._static)
        t_args, t_keywords = jtu.tree_unflatten(self._treedef, moved)
        if jtu.tree_leaves(t_keywords):
            raise ValueError(_CLOSED_OVER)
        out, t_out = self._rule(args, t_args, **keywords)
        out, treedef = jtu.tree_flatten(eqx.filter(out, eqx.is_array))
        t_out = treedef.flatten_up_to(t_out)
        zero = lambda x: ad.Zero(jax.typeof(x).to_tangent_aval())
        return out, [zero(x) if t is None else t for x, t in zip(out, t_out, strict=True)]


def _without_constants(jaxpr: jec.Jaxpr) -> jec.Jaxpr:
    """The jaxpr with its constants as its first inputs."""
    invars = [*jaxpr.constvars, *jaxpr.invars]
    names = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    return jaxpr.replace(constvars=[], invars=invars, debug_info=names)


def _impl(*leaves, jaxpr, call):
    del call
    return jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *leaves)


def _abstract_eval(*leaves, jaxpr, call):
    del leaves, call
    return list(jaxpr.out_avals)


def _jvp(primals, tangents, *, jaxpr, call):
    del jaxpr
    return call.tangents(primals, tangents)


def _transpose(*_, **__):
    # Never reached by reverse mode, which transposes what the rule computes with the tangents.
    raise NotImplementedError("A function with a forward rule is not linear.")


#: The primitive's name.
NAME = "with_rule"

_with_rule = create_vprim(NAME, _impl, _abstract_eval, _jvp, _transpose)
_with_rule.def_effectful_abstract_eval(
    lambda *leaves, jaxpr, call: (_abstract_eval(*leaves, jaxpr=jaxpr, call=call), jaxpr.effects)
)

"""The same linear map in a lower precision: its jaxpr, evaluated with narrower numbers.

A linear map keeps arrays in the dtype of y. `LoweredMap` casts them once, and applies the map by
walking its jaxpr with every floating-point dtype in it replaced by the narrower one. The residual
is not evaluated again, and no operation of the map runs in the wide dtype.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jec
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array

from .. import tree
from ..typing import Vector
from .operator import AbstractLinearMap, JacobianOperator


class LoweredMap(AbstractLinearMap):
    """A linear map between spaces of narrower vectors."""

    arrays: list[Array]
    source: "_Source" = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True)

    def __init__(self, linear_map: AbstractLinearMap, operator: JacobianOperator, low: np.dtype):
        arrays, static = eqx.partition(linear_map, eqx.is_array)
        leaves, treedef = jtu.tree_flatten(arrays)
        structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
        self.arrays = tree.cast(leaves, low)
        self.source = _Source(treedef, static, structs, operator)
        self.dtype = low

    def mv(self, vector: Vector) -> Vector:
        return self._apply(lambda linear_map, v: linear_map.mv(v), vector, self.source.inputs)

    def transpose_mv(self, vector: Vector) -> Vector:
        return self._apply(
            lambda linear_map, w: linear_map.transpose_mv(w), vector, self.source.outputs
        )

    def _apply(self, apply: Callable, vector: Vector, structure: Any) -> Vector:
        source = self.source

        def run(leaves, vector):
            return apply(source.map(leaves), vector)

        closed, shape = jax.make_jaxpr(run, return_shape=True)(source.structs, structure)
        flat = [*self.arrays, *jtu.tree_leaves(vector)]
        out = _evaluate(closed.jaxpr, closed.consts, flat, self.dtype)
        return jtu.tree_unflatten(jtu.tree_structure(shape), out)


class _Source:
    """The wide map but for its arrays; compared by identity."""

    def __init__(self, treedef: Any, static: Any, structs: list, operator: JacobianOperator):
        self.treedef, self.static, self.structs = treedef, static, structs
        self.inputs, self.outputs = operator.in_structure(), operator.out_structure()

    def map(self, leaves: list[Array]) -> AbstractLinearMap:
        return eqx.combine(jtu.tree_unflatten(self.treedef, leaves), self.static)


def working(operator: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
    """The operator to solve with: on narrower vectors where the policy that made it asks for that.

    Costs one cast of the arrays that it keeps, then.
    """
    if not isinstance(operator, JacobianOperator) or operator.linear_map.low is None:
        return operator
    low = operator.linear_map.low
    structures = operator.in_structure(), operator.out_structure()
    low_in, low_out = (tree.cast(structure, low) for structure in structures)
    if (low_in, low_out) == structures:
        return operator
    return JacobianOperator(
        LoweredMap(operator.linear_map, operator, low), low_in, low_out, operator.tags
    )


def _evaluate(jaxpr: jec.Jaxpr, consts: Any, args: Any, low: np.dtype) -> list[Any]:
    env: dict[Any, Any] = {}
    env.update(zip(jaxpr.constvars, [_cast_value(c, low) for c in consts], strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        if not isinstance(atom, jec.Literal):
            return env[atom]
        return np.asarray(atom.val, tree.narrow(_dtype(atom), low))[()]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        params = eqn.primitive.get_bind_params(_narrow_params(eqn.params, low))
        with eqn.ctx.manager:
            out = eqn.primitive.bind(*inputs, **params)
        out = list(out) if eqn.primitive.multiple_results else [out]
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _cast_value(value: Any, low: np.dtype) -> Any:
    wide = getattr(value, "dtype", None)
    return value if wide is None else value.astype(tree.narrow(wide, low))


def _narrow_params(params: dict[str, Any], low: np.dtype) -> dict[str, Any]:
    """The parameters with dtypes replaced, and jaxprs in them rewritten."""

    def one(value):
        if isinstance(value, jec.ClosedJaxpr):
            return _narrow_jaxpr(value, low)
        if isinstance(value, jec.Jaxpr):
            return _narrow_jaxpr(jec.ClosedJaxpr(value, ()), low).jaxpr
        if isinstance(value, np.dtype) or (isinstance(value, type) and _is_dtype(value)):
            return tree.narrow(value, low)
        if isinstance(value, tuple):
            changed = [one(item) for item in value]
            if all(new is old for new, old in zip(changed, value, strict=True)):
                return value
            return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
        return value

    return {name: one(value) for name, value in params.items()}


def _dtype(atom: Any) -> np.dtype:
    return atom.aval.dtype


def _is_dtype(value: type) -> bool:
    return issubclass(value, np.generic)


def _narrow_jaxpr(closed: jec.ClosedJaxpr, low: np.dtype) -> jec.ClosedJaxpr:
    structs = [
        jax.ShapeDtypeStruct(var.aval.shape, tree.narrow(_dtype(var), low))
        for var in closed.jaxpr.invars
    ]

    def run(*args):
        return _evaluate(closed.jaxpr, closed.consts, args, low)

    return jax.make_jaxpr(run)(*structs)

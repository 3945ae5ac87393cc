"""A residual traced once, and its linearisation traced once: what a Newton loop runs on.

`trace` turns `fn(y, args)` into a closed program of (y, params), where params are the arrays of
args and those that fn closes over. `LinearisedProgram` is the jaxpr of a policy's linearisation of
that program: evaluating it at a point gives the residual there and the arrays of the linear maps,
whose static part is the same at every point. It is evaluated in two phases, so that what does
not depend on y is computed outside the Newton loop.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.extend.core as jec
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from .. import tree
from ..typing import Args, Aux, Fn, Vector, Y
from .inspect import check_residual, check_traced
from .linearisation import AbstractLinearisable, Linearisation
from .operator import AbstractLinearMap, JacobianOperator
from .policies import AbstractPolicy
from .split import SplitJaxpr, distinct, inline


class Program(eqx.Module):
    """`(y, params) -> (f, arrays of aux)` as a jaxpr; all of it static."""

    closed: jec.Jaxpr = eqx.field(static=True)
    out_treedef: Any = eqx.field(static=True)
    static_aux: Any = eqx.field(static=True)
    num_unknowns: int = eqx.field(static=True)

    def __call__(self, y: Vector, params: Sequence[Array]) -> tuple[Vector, Aux]:
        consts = params[: len(self.closed.constvars)]
        inputs = params[len(self.closed.constvars) :]
        out = jax.core.eval_jaxpr(self.closed, consts, *jtu.tree_leaves(y), *inputs)
        return jtu.tree_unflatten(self.out_treedef, out)

    def complete(self, aux: Aux) -> Aux:
        """aux with the leaves that are no arrays."""
        return eqx.combine(aux, self.static_aux)


def trace(fn: Fn, y: Y, args: Args, *, has_aux: bool) -> tuple[Program, list[Array]]:
    """Traces `fn` once at (y, args): the program and its parameters.

    The unknowns of the program are the inexact arrays of y; its parameters are every other array
    that the residual reads.
    """
    variables, static_y = eqx.partition(y, eqx.is_inexact_array)
    arrays, static_args = eqx.partition(args, eqx.is_array)
    static_aux: list[Any] = []

    def run(variables, arrays):
        out = fn(eqx.combine(variables, static_y), eqx.combine(arrays, static_args))
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError("With `has_aux=True`, `fn` must return a pair `(residual, aux)`.")
        value, aux = out if has_aux else (out, None)
        check_residual(value)
        aux, static = eqx.partition(aux, eqx.is_array_like)
        static_aux.append(static)
        return jtu.tree_map(jnp.asarray, (value, aux))

    closed, shapes = jax.make_jaxpr(run, return_shape=True)(variables, arrays)
    num_unknowns = len(jtu.tree_leaves(variables))
    program = Program(closed.jaxpr, jtu.tree_structure(shapes), static_aux[-1], num_unknowns)
    return program, [*map(jnp.asarray, closed.consts), *jtu.tree_leaves(arrays)]


class LinearisedProgram:
    """The linearisation of a `Program` by a policy, with respect to y and some of its parameters.

    `active` marks the parameters (by position) that the joint map takes tangents of. Static: it is
    compared by identity.
    """

    def __init__(
        self,
        program: Program,
        y: Vector,
        params: Sequence[Array],
        active: Sequence[bool],
        policy: AbstractPolicy,
    ):
        self.program = program
        self.active = tuple(active)
        self.policy = policy
        check_traced(program.closed, program.num_unknowns, policy)
        static: list[Any] = []

        def record(y, params):
            chosen, held = self.split(params)
            residual = _Partial(program, held, self.active)
            lin = policy.linearise(residual, y, chosen)
            arrays, rest = eqx.partition((lin.jacobian, lin.joint), eqx.is_array)
            static.append((rest, jtu.tree_structure(arrays)))
            return (lin.value, lin.aux), jtu.tree_leaves(arrays)

        closed, (outputs, _) = jax.make_jaxpr(record, return_shape=True)(y, list(params))
        self._static_maps, self._maps_treedef = static[-1]
        self._out_treedef = jtu.tree_structure(outputs)
        self._num_out = self._out_treedef.num_leaves
        closed, self._places = distinct(inline(closed), self._num_out)
        self._split = SplitJaxpr(closed, len(jtu.tree_leaves(y)))
        (value, smooth), _ = outputs
        self.in_structure = tree.structure(y)
        self.aux_structure = tree.structure(smooth)
        self.out_structure = tree.structure(value)

    def split(self, params: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """(active parameters, held parameters)."""
        chosen = [p for p, active in zip(params, self.active, strict=True) if active]
        held = [p for p, active in zip(params, self.active, strict=True) if not active]
        return chosen, held

    def at(self, params: Sequence[Array]) -> "ProgramAt":
        """The program at given parameters; runs what does not depend on y."""
        return ProgramAt(self, self._split.cold(params))

    def maps(
        self, cold: list[Array], kept: Sequence[Array]
    ) -> tuple[AbstractLinearMap, AbstractLinearMap]:
        """(the map of y → (f, aux), the joint one) from the kept arrays of a point."""
        hot = iter(kept)
        arrays = [
            next(hot) if value is None else value
            for value in self._split.cold_outputs(cold)[self._num_out :]
        ]
        leaves = [arrays[place] for place in self._places]
        return eqx.combine(jtu.tree_unflatten(self._maps_treedef, leaves), self._static_maps)

    def evaluate(self, cold: list[Array], y: Vector) -> tuple[Any, list[Array]]:
        """(((f, differentiable aux), other aux), kept arrays) at y: the one evaluation of fn."""
        out = self._split.hot(cold, jtu.tree_leaves(y))
        outputs = jtu.tree_unflatten(self._out_treedef, out[: self._num_out])
        is_hot = self._split.hot_out[self._num_out :]
        kept = [x for x, hot in zip(out[self._num_out :], is_hot, strict=True) if hot]
        return outputs, kept


class _Partial(eqx.Module):
    """The program as a function of y and the active parameters.

    Returns ((f, differentiable part of aux), rest of aux), so that aux is differentiated too.
    """

    program: Program
    held: list[Array]
    active: tuple[bool, ...] = eqx.field(static=True)

    def __call__(self, y: Vector, chosen: Sequence[Array]) -> tuple[Any, Any]:
        held, moving = iter(self.held), iter(chosen)
        params = [next(moving) if active else next(held) for active in self.active]
        value, aux = self.program(y, params)
        differentiable, rest = eqx.partition(aux, eqx.is_inexact_array)
        return (value, differentiable), rest


class ProgramAt(AbstractLinearisable):
    """A linearised program at given parameters: a residual that knows its linearisation.

    It stands in for `fn` inside a solver: `nks.linearise` hands calls over to `linearise`. With
    `keep`, the arrays of the linear maps come out beside aux.
    """

    program: LinearisedProgram = eqx.field(static=True)
    cold: list[Array]
    keep: bool = eqx.field(static=True, default=False)

    def keeping(self) -> "ProgramAt":
        """The same, whose aux is `(aux, kept arrays)`."""
        return ProgramAt(self.program, self.cold, keep=True)

    def linearise(self, y: Y, tags: frozenset[object]) -> Linearisation:
        variables = eqx.filter(y, eqx.is_inexact_array)
        ((value, smooth), rest), kept = self.program.evaluate(self.cold, variables)
        lin = self._assembled(value, smooth, rest, kept, tags)
        if self.keep:
            lin = eqx.tree_at(lambda x: x.aux, lin, (lin.aux, kept), is_leaf=_is_none)
        return lin

    def recalled(self, kept: Sequence[Array], tags: frozenset[object]) -> Linearisation:
        """The linearisation (without value and aux) whose kept arrays these are."""
        return self._assembled(None, None, None, kept, tags)

    def _assembled(self, value, smooth, rest, kept, tags) -> Linearisation:
        program = self.program
        jacobian, joint = program.maps(self.cold, kept)
        operator = JacobianOperator(
            First(jacobian, program.aux_structure),
            program.in_structure,
            program.out_structure,
            tags,
        )
        return Linearisation(value, eqx.combine(smooth, rest), operator, joint)


def _is_none(x: Any) -> bool:
    return x is None


class First(AbstractLinearMap):
    """The first of the two outputs of a linear map."""

    linear_map: AbstractLinearMap
    second: tuple = eqx.field(static=True, converter=tree.freeze)

    @property
    def low(self) -> np.dtype | None:
        return self.linear_map.low

    def mv(self, vector: Vector) -> Vector:
        return self.linear_map.mv(vector)[0]

    def transpose_mv(self, vector: Vector) -> Vector:
        return self.linear_map.transpose_mv((vector, tree.zeros_like(tree.thaw(self.second))))

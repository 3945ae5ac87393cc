"""A solve as a differentiable function of its parameters, at no further evaluation of `fn`.

Two functions with forward-mode rules, one inside the other:

- `root(params) → (y, aux, …)`, the solve. Its rule calls
- `root_and_kept(params) → ((y, aux, …), kept)`, the same solve whose linearisations are taken in
  the perturbed parameters too; `kept` are the arrays of the last one. The tangent of y is a linear
  solve with the map that they make.

The rule of the second gives the tangents of `kept`, which costs one evaluation of `fn`; it is
reached only when derivatives are differentiated again.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .. import tree
from ..adjoint.base import (
    AbstractImplicitSolve,
    check_differentiable,
    implicit_tangents,
    tangents_at,
)
from ..linearise.trace import LinearisedProgram, Program
from ..newton.base import AbstractRootFinder, iterate
from ..newton.reuse import AbstractReuse, KeepLinearisation
from ..rule import ForwardRule
from ..typing import Args, Vector, Y


class Problem(eqx.Module):
    """A root find but for its parameters; nothing here is differentiated."""

    program: Program
    solver: AbstractRootFinder
    linear: AbstractImplicitSolve
    reuse: AbstractReuse
    y0: Y
    args: Args
    options: dict[str, Any]
    max_steps: int = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True)

    @property
    def variables(self) -> Vector:
        """The unknowns at the start."""
        return eqx.filter(self.y0, eqx.is_inexact_array)

    def linearised(self, params: Sequence[Array], active: Sequence[bool]) -> LinearisedProgram:
        """The program's linearisation in y and the active parameters."""
        return LinearisedProgram(self.program, self.variables, params, active, self.solver.policy)

    def solve(
        self, linearised: LinearisedProgram, params: Sequence[Array], *, keep: bool
    ) -> tuple[PyTree, list[Array] | None]:
        """((y, aux, result, stats), kept arrays of the linearisation at y)."""
        residual = linearised.at(params)
        residual = residual.keeping() if keep else residual
        aux_struct = jax.eval_shape(lambda: residual.linearise(self.variables, self.tags).aux)
        y, aux, result, stats = iterate(
            self.solver,
            residual,
            self.y0,
            self.args,
            self.options,
            max_steps=self.max_steps,
            f_struct=linearised.out_structure,
            aux_struct=aux_struct,
            tags=self.tags,
        )
        aux, kept = aux if keep else (aux, None)
        return (eqx.filter(y, eqx.is_inexact_array), aux, result, stats), kept


@ForwardRule
def root(params: list[Array], *, problem: Problem) -> PyTree:
    """(y, aux, result, stats) of a root find as a function of its parameters."""
    linearised = problem.linearised(params, [False] * len(params))
    return problem.solve(linearised, params, keep=False)[0]


@root.def_jvp
def _root_jvp(primals, tangents, *, problem):
    (params,), (t_params,) = primals, tangents
    check_differentiable(problem.solver.policy)
    if not isinstance(problem.reuse, KeepLinearisation):
        out = root(params, problem=problem)
        policy = problem.solver.policy
        linear = problem.linear.continuing(out[3])
        moved = tangents_at(problem.program, out[0], params, t_params, policy, linear)
        return out, _output_tangents(out, *moved)
    linearised = problem.linearised(params, [t is not None for t in t_params])
    out, kept = _root_and_kept(params, problem=problem, linearised=linearised)
    lin = linearised.at(params).recalled(kept, problem.tags)
    chosen = [t for t in t_params if t is not None]
    linear = problem.linear.continuing(out[3])
    return out, _output_tangents(out, *implicit_tangents(lin, out[0], chosen, linear))


@ForwardRule
def _root_and_kept(params, *, problem, linearised):
    return problem.solve(linearised, params, keep=True)


@_root_and_kept.def_jvp
def _root_and_kept_jvp(primals, tangents, *, problem, linearised):
    (params,), (t_params,) = primals, tangents
    out, kept = _root_and_kept(params, problem=problem, linearised=linearised)
    y, linear = out[0], problem.linear.continuing(out[3])
    active = [t is not None for t in t_params]
    if all(known for known, wanted in zip(linearised.active, active, strict=True) if wanted):
        lin = linearised.at(params).recalled(kept, problem.tags)
        pairs = zip(params, t_params, linearised.active, strict=True)
        chosen = [tree.zeros_like(p) if t is None else t for p, t, known in pairs if known]
        dy, daux = implicit_tangents(lin, y, chosen, linear)
    else:  # parameters that the maps at hand know nothing of
        policy = problem.solver.policy
        dy, daux = tangents_at(problem.program, y, params, t_params, policy, linear)

    def kept_at(y, moving):
        moving = iter(moving)
        moved = [next(moving) if a else p for a, p in zip(active, params, strict=True)]
        return linearised.evaluate(linearised.at(moved).cold, y)[1]

    chosen = [p for a, p in zip(active, params, strict=True) if a]
    t_chosen = [t for t in t_params if t is not None]
    _, t_kept = jax.jvp(kept_at, (y, chosen), (dy, t_chosen))
    t_kept = [t if eqx.is_inexact_array(k) else None for k, t in zip(kept, t_kept, strict=True)]
    return (out, kept), (_output_tangents(out, dy, daux), t_kept)


def _output_tangents(out: PyTree, dy: Vector, daux: PyTree) -> PyTree:
    _, aux, result, stats = out
    flat, treedef = jtu.tree_flatten(aux)
    moved = iter(jtu.tree_leaves(daux))
    t_aux = [next(moved) if eqx.is_inexact_array(leaf) else None for leaf in flat]
    nothing = jtu.tree_map(lambda _: None, (result, stats))
    return (dy, jtu.tree_unflatten(treedef, t_aux), *nothing)

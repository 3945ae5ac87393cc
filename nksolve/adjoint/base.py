"""Derivatives of a solve by the implicit function theorem, matrix-free."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax.lax as lax
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from equinox import AbstractVar
from jaxtyping import Array, PyTree

from .. import tree
from ..krylov.basis import as_real_space
from ..linearise.linearisation import Linearisation
from ..linearise.policies import AbstractPolicy, Linearise
from ..linearise.split import depends
from ..linearise.tags import holomorphic_tag
from ..linearise.trace import LinearisedProgram, trace
from ..loops import while_loop
from ..newton.base import AbstractRootFinder
from ..newton.reuse import AbstractReuse, Relinearise
from ..rule import ForwardRule
from ..typing import Args, Aux, ScalarLike, Vector, Y

_Adjoint = TypeVar("_Adjoint", bound="AbstractImplicitAdjoint")


class AbstractImplicitSolve(eqx.Module):
    """x ≈ J⁻¹ b at a root, so that it can be differentiated and transposed any number of times.

    Law: `run` on `prepare(…)` and on its transpose are approximations of J⁻¹ and J⁻ᵀ. Where they
    are linear in b and each other's transposes, forward and reverse mode agree to rounding.
    """

    args: AbstractVar[Args]
    tags: AbstractVar[frozenset[object]]

    def continuing(self, stats: dict[str, Any]) -> "AbstractImplicitSolve":
        """The same, with what the forward solve left in its stats."""
        del stats
        return self

    @abc.abstractmethod
    def prepare(self, operator: lx.AbstractLinearOperator, y: Y, *, real: bool) -> Any:
        """What `run` needs of the Jacobian at the root; its `transpose()` is that of Jᵀ."""

    @abc.abstractmethod
    def run(self, prepared: Any, b: Vector, *, real: bool, transposed: bool) -> Vector:
        """J⁻¹ b, or what stands for it. `transposed` says that J is the transpose of another."""

    def __call__(self, operator: lx.AbstractLinearOperator, y: Y, b: Vector) -> Vector:
        """J⁻¹ b."""
        real = as_real_space(b, holomorphic_tag in self.tags)
        prepared = self.prepare(stop_gradient(operator), stop_gradient(y), real=real)

        def solve(_, b):
            return self.run(prepared, b, real=real, transposed=False)

        def transpose_solve(_, b):
            return self.run(prepared.transpose(), b, real=real, transposed=True)

        return lax.custom_linear_solve(operator.mv, b, solve, transpose_solve)


class AbstractImplicitAdjoint(optx.AbstractAdjoint):
    """Implicit differentiation of F(y, θ) = 0, by some way to solve with J or to do without.

    Forward mode takes ẏ ≈ −J⁻¹(∂F/∂θ) θ̇; reverse mode λ ≈ J⁻ᵀȳ and −(∂F/∂θ)ᵀλ; both from one
    linearisation at the root. Second derivatives replace each solve with J that their formula
    holds. Works in `nks.root_find` and in `optx.root_find`, where it costs one evaluation of `fn`.

    `reuse` is `nks.KeepLinearisation()`, `nks.Relinearise()`, or `None` for what the nonlinear
    solver has in its `reuse`.
    """

    reuse: AbstractVar[AbstractReuse | None]

    @abc.abstractmethod
    def resolved(
        self, solver: Any, args: Args, tags: frozenset[object], *, throw: bool
    ) -> AbstractImplicitSolve:
        """How to solve with J, with what is left open taken from the nonlinear solver."""

    def reuse_in(self, solver: Any) -> AbstractReuse:
        """Where the linearisation at the root comes from."""
        if self.reuse is not None:
            return self.reuse
        return solver.reuse if isinstance(solver, AbstractRootFinder) else Relinearise()

    def tolerating(self: _Adjoint, rtol: ScalarLike) -> _Adjoint:
        """The same, with this relative tolerance where it would take the nonlinear solver's."""
        del rtol
        return self

    def apply(
        self,
        primal_fn: Callable[..., Any],
        rewrite_fn: Callable[..., Any],
        inputs: PyTree,
        tags: frozenset[object],
    ) -> PyTree:
        """Optimistix's entry: differentiates `primal_fn` through `rewrite_fn(root, …) = 0`."""
        _, solver, _, args, *_ = inputs
        inputs = (*inputs, eqx.Partial(while_loop, kind="lax"))
        policy = solver.policy if isinstance(solver, AbstractRootFinder) else Linearise()
        linear = self.resolved(solver, stop_gradient(args), tags, throw=True)
        return _implicit(
            inputs, primal_fn=primal_fn, rewrite_fn=rewrite_fn, policy=policy, linear=linear
        )


def implicit_tangents(
    lin: Linearisation, y: Vector, tangents: Sequence[Array], solve: Callable[..., Vector]
) -> tuple[Vector, Aux]:
    """(ẏ, aux tangent) from θ̇: J ẏ = −(∂F/∂θ) θ̇, by the joint map of (F, aux)."""

    def explicit(tangents):
        return lin.joint.mv((tree.zeros_like(y), tangents))

    df, daux = explicit(list(tangents))
    flags = depends(lambda t: explicit(t)[0], list(tangents))
    dy = solve(lin.operator, y, tree.neg(anchored(df, flags, tangents)))
    if jtu.tree_leaves(daux):
        _, daux = lin.joint.mv((dy, list(tangents)))
    return dy, daux


def anchored(vector: Vector, depends: list[bool], tangents: Sequence[Array]) -> Vector:
    """The vector, every leaf of it depending on the tangents, as the transpose of
    `lax.custom_linear_solve` needs."""
    smallest = min((t for t in tangents if t.size > 0), key=lambda t: t.size, default=None)
    if all(depends) or smallest is None:
        return vector
    nothing = 0 * smallest.reshape(-1)[0].real
    leaves, treedef = jtu.tree_flatten(vector)
    anchored = [
        x if known else x + nothing.astype(x.dtype)
        for x, known in zip(leaves, depends, strict=True)
    ]
    return jtu.tree_unflatten(treedef, anchored)


def stop_gradient(value: PyTree) -> PyTree:
    """`value` with no derivative through its arrays."""
    arrays, rest = eqx.partition(value, eqx.is_array)
    return eqx.combine(lax.stop_gradient(arrays), rest)


def check_differentiable(policy: AbstractPolicy) -> None:
    """Raises for a policy that has no transpose."""
    if policy.mode == "none":
        raise NotImplementedError(
            f"A solve with `policy={type(policy).__name__}()` cannot be differentiated: it has "
            "neither a transpose nor the derivative with respect to args. Use `nks.Linearise()`, "
            "or `nks.Transposed()` where the residual has a `jax.custom_vjp`."
        )


@ForwardRule
def _implicit(inputs, *, primal_fn, rewrite_fn, policy, linear):
    return primal_fn(inputs)


@_implicit.def_jvp
def _implicit_jvp(primals, tangents, *, primal_fn, rewrite_fn, policy, linear):
    (inputs,), (t_inputs,) = primals, tangents
    check_differentiable(policy)
    out = _implicit(
        inputs, primal_fn=primal_fn, rewrite_fn=rewrite_fn, policy=policy, linear=linear
    )
    root, residual = out

    def fn(y, inputs):
        return rewrite_fn(y, residual, inputs)

    if isinstance(residual, tuple) and residual and isinstance(residual[-1], dict):
        linear = linear.continuing(residual[-1])  # the stats
    program, params = trace(fn, root, inputs, has_aux=False)
    arrays, treedef = jtu.tree_flatten(eqx.filter(inputs, eqx.is_array))
    t_arrays = treedef.flatten_up_to(t_inputs)
    t_params = [*([None] * (len(params) - len(arrays))), *t_arrays]
    dy, _ = tangents_at(program, root, params, t_params, policy, linear)
    nothing: Callable[[Any], None] = lambda _: None
    return out, (dy, jtu.tree_map(nothing, residual))


def tangents_at(
    program: Any,
    y: Vector,
    params: Sequence[Array],
    t_params: Sequence[Array | None],
    policy: AbstractPolicy,
    linear: AbstractImplicitSolve,
) -> tuple[Vector, Aux]:
    """The tangents at a root, from a new linearisation there (one evaluation of `fn`)."""
    active = [t is not None for t in t_params]
    linearised = LinearisedProgram(program, y, params, active, policy)
    lin = linearised.at(params).linearise(y, linear.tags)
    return implicit_tangents(lin, y, [t for t in t_params if t is not None], linear)

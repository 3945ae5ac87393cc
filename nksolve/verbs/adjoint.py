"""Derivatives of a solve by the implicit function theorem, matrix-free."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, PyTree

from .. import tree
from ..krylov.base import AbstractKrylovSolver, KrylovState
from ..krylov.basis import as_real_space
from ..krylov.gcrodr import GCRODR
from ..krylov.recycling import RecycledSpace
from ..linearise.linearisation import Linearisation
from ..linearise.lower import working
from ..linearise.policies import AbstractPolicy, Linearise
from ..linearise.split import depends
from ..linearise.tags import holomorphic_tag
from ..linearise.trace import LinearisedProgram, trace
from ..loops import while_loop
from ..newton.base import AbstractRootFinder
from ..typing import Args, Aux, Flag, ScalarLike, Vector, Y


class AbstractReuse(eqx.Module):
    """Where the linearisation at the root comes from when a solve is differentiated."""


class KeepLinearisation(AbstractReuse):
    """The one that the forward solve ended with: no further evaluation of `fn`.

    The Newton loop of a solve that is differentiated linearises in args too, and carries what the
    joint linear map needs of y: as much as reverse mode through one evaluation of `fn`.
    """


class Relinearise(AbstractReuse):
    """A new one at the root: one further evaluation of `fn`, nothing carried by the Newton loop."""


class KrylovAdjoint(optx.AbstractAdjoint):
    """Implicit differentiation of F(y, θ) = 0 with a Krylov method, never n × n.

    Forward mode solves J ẏ = −(∂F/∂θ) θ̇; reverse mode solves Jᵀλ = ȳ with the transposed
    preconditioner M⁻ᵀ and returns −(∂F/∂θ)ᵀλ; both from one linearisation at the root. Works in
    `nks.root_find`, and in `optx.root_find` where it costs one evaluation of `fn`.

    **Arguments:**

    - `linear_solver`: the Krylov method, with its preconditioner; that of the forward solver by
      default.
    - `rtol`, `atol`: tolerances of that solve, ‖r‖ ≤ atol + rtol ‖rhs‖; by default the `rtol` of
      the nonlinear solver and 0. An `rtol` below 50 units of round-off counts as that.
    - `reuse`: `nks.KeepLinearisation()` or `nks.Relinearise()`.

    A linear solve that fails raises where the verb has `throw=True`, and otherwise gives NaN
    derivatives.

    Work: one Krylov solve for a JVP or a VJP. Storage: a Krylov workspace of its own.
    """

    linear_solver: AbstractKrylovSolver | None = None
    rtol: ScalarLike | None = None
    atol: ScalarLike = 0.0
    reuse: AbstractReuse = KeepLinearisation()

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

    def resolved(
        self, solver: Any, args: Args, tags: frozenset[object], *, throw: bool
    ) -> "ImplicitSolve":
        """The adjoint with its defaults taken from the nonlinear solver."""
        linear_solver = self.linear_solver
        if linear_solver is None:
            if not isinstance(solver, AbstractRootFinder):
                raise ValueError(
                    "`KrylovAdjoint()` takes its Krylov method from the nonlinear solver, but "
                    f"{type(solver).__name__} has none: pass `linear_solver=nks.GMRES()`."
                )
            linear_solver = solver.linear_solver
            if isinstance(linear_solver, GCRODR):  # what it began with; its own space is better
                linear_solver = linear_solver.starting_from(None)
        rtol = solver.rtol if self.rtol is None else self.rtol
        solve = ImplicitSolve(linear_solver, rtol, self.atol, args, tags, throw)
        return stop_gradient(solve)


class ImplicitSolve(eqx.Module):
    """J x = b at a root, so that it can be differentiated and transposed any number of times."""

    linear_solver: AbstractKrylovSolver
    rtol: ScalarLike
    atol: ScalarLike
    args: Args
    tags: frozenset[object] = eqx.field(static=True)
    throw: bool = eqx.field(static=True)
    recycled: RecycledSpace | None = None

    def continuing(self, stats: dict[str, Any]) -> "ImplicitSolve":
        """The same, starting from the space that a solve with `GCRODR` ended with."""
        space = stop_gradient(stats.get("recycled"))
        return eqx.tree_at(lambda s: s.recycled, self, space, is_leaf=lambda x: x is None)

    def __call__(self, operator: lx.AbstractLinearOperator, y: Y, b: Vector) -> Vector:
        """J⁻¹ b."""
        real = as_real_space(b, holomorphic_tag in self.tags)
        held, y = stop_gradient(operator), stop_gradient(y)
        linear_solver = self.linear_solver.chosen(lambda: working(held), y, self.args)
        state = linear_solver.prepare(held, y, self.args)
        space = self.recycled

        def solve(_, b):
            return self._run(_starting(linear_solver, space, b, real), state, b, real)

        def transpose_solve(_, b):
            mirrored = None if space is None else space.transpose()
            solver = _starting(linear_solver, mirrored, b, real)
            return self._run(solver, state.transpose(), b, real)

        return lax.custom_linear_solve(operator.mv, b, solve, transpose_solve)

    def _run(
        self, linear_solver: AbstractKrylovSolver, state: KrylovState, b: Vector, real: bool
    ) -> Vector:
        norm = tree.norm2(b)
        rtol = jnp.maximum(jnp.asarray(self.rtol).astype(norm.dtype), 50 * tree.eps(b))
        out = linear_solver.run(
            state,
            b,
            tolerance=jnp.asarray(self.atol).astype(norm.dtype) + rtol * norm,
            real=real,
            verify=True,
        )
        failed = out.result != lx.RESULTS.successful
        if self.throw:
            failed = eqx.error_if(
                failed,
                failed,
                "The linear solve for a derivative of the root did not converge. Loosen "
                "`KrylovAdjoint(rtol=...)`, precondition the Krylov method, or use a longer "
                "`restart`; with `throw=False` the derivative is NaN instead.",
            )
        return nan_where(failed, out.value)


def _starting(
    linear_solver: AbstractKrylovSolver, space: RecycledSpace | None, b: Vector, real: bool
) -> AbstractKrylovSolver:
    """The Krylov method with a space to start from, where it takes one and has none."""
    if not isinstance(linear_solver, GCRODR) or linear_solver.recycled is not None:
        return linear_solver
    fits = linear_solver.fits(space, b, real=real)
    return linear_solver.starting_from(space) if fits else linear_solver


def nan_where(failed: Flag, vector: Vector) -> Vector:
    """NaN in place of a vector that is not to be used.

    With a flag that has been through `eqx.error_if` this threads the error on to the vector: the
    check itself must see scalars only, since it would gather a vector that is sharded.
    """
    return jtu.tree_map(lambda x: jnp.where(failed, jnp.full_like(x, jnp.nan), x), vector)


def implicit_tangents(
    lin: Linearisation, y: Vector, tangents: Sequence[Array], solve: Callable[..., Vector]
) -> tuple[Vector, Aux]:
    """(ẏ, aux tangent) from θ̇: J ẏ = −(∂F/∂θ) θ̇, by the joint map of (F, aux)."""

    def explicit(tangents):
        return lin.joint.mv((tree.zeros_like(y), tangents))

    df, daux = explicit(list(tangents))
    flags = depends(lambda t: explicit(t)[0], list(tangents))
    dy = solve(lin.operator, y, tree.neg(_anchored(df, flags, tangents)))
    if jtu.tree_leaves(daux):
        _, daux = lin.joint.mv((dy, list(tangents)))
    return dy, daux


def _anchored(vector: Vector, depends: list[bool], tangents: Sequence[Array]) -> Vector:
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


@eqx.filter_custom_jvp
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
    linear: Callable[..., Vector],
) -> tuple[Vector, Aux]:
    """The tangents at a root, from a new linearisation there (one evaluation of `fn`)."""
    active = [t is not None for t in t_params]
    linearised = LinearisedProgram(program, y, params, active, policy)
    lin = linearised.at(params).linearise(y, frozenset())
    return implicit_tangents(lin, y, [t for t in t_params if t is not None], linear)

"""A stage of a Rosenbrock method as a differentiable function of what it was solved from."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from ... import tree
from ...adjoint.base import anchored
from ...linearise.views import weighted
from ...rule import ForwardRule
from ...typing import Scalar, Vector
from ..attach import Increment
from ..mass import Mass
from .linear import AbstractTightLinear


class Explicit(eqx.Module):
    """What a stage was solved from: W u = γ (F(t, z) + M v + F'(t0, y0)(0, τ)), W = M − γ F_y."""

    t: Scalar
    z: Vector
    history: Vector  # v = Σ_j c_ij u_j
    t0: Scalar
    y0: Vector
    tau: Scalar  # γ_i h
    increment: Increment
    mass: Mass


@ForwardRule
def attach(
    explicit: Explicit, *, found: Vector, gamma: Scalar, linear: AbstractTightLinear
) -> Vector:
    """u, which was `found` beforehand."""
    del explicit, gamma, linear
    return found


@attach.def_jvp
def _attach_jvp(primals, tangents, *, found, gamma, linear):
    """W u̇ = d(γ (F(t, z) + M v + F'(t0, y0)(u, τ)) − M u) with u held: the derivative of A u is
    that of one directional derivative, and W is the step's own."""
    (explicit,), (t_explicit,) = primals, tangents
    u = attach(explicit, found=found, gamma=gamma, linear=linear)
    leaves, treedef = jtu.tree_flatten(explicit)
    d_leaves = treedef.flatten_up_to(t_explicit)
    active = [d is not None for d in d_leaves]

    def right(*moving):
        moving = iter(moving)
        merged = [next(moving) if a else x for a, x in zip(active, leaves, strict=True)]
        at: Explicit = jtu.tree_unflatten(treedef, merged)
        _, slope = jax.jvp(at.increment, (at.t0, at.y0), (at.tau, u))
        total = tree.add(at.increment(at.t, at.z), slope)
        if at.mass is None:
            return tree.sub(tree.scale(gamma, tree.add(total, at.history)), u)
        total = tree.add(total, weighted(at.mass, at.history))
        return tree.sub(tree.scale(gamma, total), weighted(at.mass, u))

    chosen = [x for x, a in zip(leaves, active, strict=True) if a]
    d_chosen = [
        jnp.asarray(d, x.dtype) for x, d in zip(leaves, d_leaves, strict=True) if d is not None
    ]
    _, rhs = jax.jvp(right, tuple(chosen), tuple(d_chosen))
    rhs = anchored(rhs, [False] * len(jtu.tree_leaves(rhs)), d_chosen)

    def matvec(v):
        _, slope = jax.jvp(lambda y: explicit.increment(explicit.t0, y), (explicit.y0,), (v,))
        return tree.axpy(-gamma, slope, weighted(explicit.mass, v))

    solve = lambda _, b: linear.derivative(b, transposed=False)
    transpose_solve = lambda _, b: linear.derivative(b, transposed=True)
    return u, lax.custom_linear_solve(matvec, rhs, solve, transpose_solve)

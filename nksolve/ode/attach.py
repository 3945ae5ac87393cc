"""A converged stage as a differentiable function of what it was solved from.

    z − base − γ F(t, z) = 0,    k = F(t, z)

is the only place where implicit stages are differentiated: by the implicit function theorem at the
stage itself, from one linearisation there, so that the derivative of a step is that of the exact
discrete equations. An explicit stage is the same with γ = 0: z = base.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from .. import tree
from ..adjoint.base import anchored, stop_gradient
from ..linearise.linearisation import linearise
from ..linearise.views import shifted
from ..rule import ForwardRule
from ..typing import Args, Flag, Scalar, ScalarLike, Vector
from .linear import AbstractStageLinear


class Increment(eqx.Module):
    """F(t, z) = f(t, z, args) · control, which for an ODE is h f, with all it depends on as leaves,
    what the terms close over included."""

    fn: Callable[[ScalarLike, Vector], Vector]

    @classmethod
    def of(cls, terms: Any, args: Args, t0: ScalarLike, t1: ScalarLike, y0: Vector) -> "Increment":
        """That of a step from t0 to t1, which begins at y0."""
        control = terms.contr(t0, t1)
        fn = lambda t, z: terms.vf_prod(t, z, args, control)
        return cls(eqx.filter_closure_convert(fn, jnp.asarray(t0), y0))

    def __call__(self, t: ScalarLike, z: Vector) -> Vector:
        return self.fn(jnp.asarray(t), z)


class Explicit(eqx.Module):
    """What a stage was solved from."""

    base: Vector
    t: ScalarLike
    increment: Increment


@ForwardRule
def attach(
    explicit: Explicit,
    *,
    found: tuple[Vector, Vector],
    gamma: Scalar,
    is_explicit: Flag,
    linear: AbstractStageLinear,
) -> tuple[Vector, Vector]:
    """(z, k), which were `found` beforehand."""
    del explicit, gamma, is_explicit, linear
    return found


@attach.def_jvp
def _attach_jvp(primals, tangents, *, found, gamma, is_explicit, linear):
    (explicit,), (t_explicit,) = primals, tangents
    keywords = dict(found=found, gamma=gamma, is_explicit=is_explicit, linear=linear)
    out = attach(explicit, **keywords)
    z, _ = out
    d_base = _materialised(explicit.base, t_explicit.base)
    leaves, treedef = jtu.tree_flatten((explicit.t, explicit.increment))
    d_leaves = treedef.flatten_up_to((t_explicit.t, t_explicit.increment))
    active = [d is not None for d in d_leaves]

    def fn(z, moving):
        moving = iter(moving)
        merged = [next(moving) if a else x for a, x in zip(active, leaves, strict=True)]
        t, increment = jtu.tree_unflatten(treedef, merged)
        return increment(t, z)

    pairs = [(x, d) for x, d in zip(leaves, d_leaves, strict=True) if d is not None]
    chosen = [x for x, _ in pairs]
    d_chosen = [jnp.asarray(d, x.dtype) for x, d in pairs]
    lin = linearise(fn, z, chosen)
    nothing = tree.zeros_like(d_base)

    # ḃase + γ F'(0, ṫ, θ̇) is the right-hand side; of an explicit stage, k̇ = F'(ḃase, ṫ, θ̇).
    direct = lin.joint.mv((tree.where(is_explicit, d_base, nothing), d_chosen))
    rhs = tree.axpy(gamma, direct, d_base)
    unknown = [False] * len(jtu.tree_leaves(rhs))
    rhs = anchored(rhs, unknown, [*jtu.tree_leaves(d_base), *d_chosen])
    operator = shifted(lin.operator, gamma)
    held, at, by = stop_gradient((operator, z, linear))

    def solve(_, b):
        return lax.cond(is_explicit, lambda b: b, lambda b: by.tight(by.at(held, at), b), b)

    def transpose_solve(_, b):
        transposed = lambda b: by.tight(by.at(held, at).transpose(), b)
        return lax.cond(is_explicit, lambda b: b, transposed, b)

    dz = lax.custom_linear_solve(operator.mv, rhs, solve, transpose_solve)
    safe = jnp.where(is_explicit, jnp.ones_like(gamma), gamma)
    dk = tree.where(is_explicit, direct, tree.scale(1 / safe, tree.sub(dz, d_base)))
    return out, (dz, dk)


def _materialised(primal: Vector, tangent: Any) -> Vector:
    """The tangent, with zeros in the place of `None`."""
    one = lambda x, d: jnp.zeros_like(x) if d is None else jnp.asarray(d, x.dtype)
    return jtu.tree_map(one, primal, tangent, is_leaf=lambda x: x is None)

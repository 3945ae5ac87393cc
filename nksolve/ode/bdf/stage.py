"""The converged solution of a BDF step as a differentiable function of what it was solved from."""

from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from ... import tree
from ...adjoint.base import anchored, stop_gradient
from ...linearise.linearisation import linearise
from ...linearise.operator import JacobianOperator
from ...linearise.views import shifted, times, weighted
from ...rule import ForwardRule
from ...typing import Scalar, ScalarLike, Vector
from ..attach import Increment
from ..linear import AbstractStageLinear
from ..mass import Mass, mass_shifted
from .rows import with_rows


class Explicit(eqx.Module):
    """What a step was solved from: M (z − base) = γ F(t, z)."""

    base: Vector
    t: ScalarLike
    increment: Increment
    mass: Mass


def matrix(mass: Mass, operator: JacobianOperator, gamma: Scalar) -> JacobianOperator:
    """W = M − γ A."""
    return shifted(operator, gamma) if mass is None else mass_shifted(mass, operator, gamma)


@ForwardRule
def attach(
    explicit: Explicit,
    *,
    found: tuple[Vector, Vector],
    gamma: Scalar,
    linear: AbstractStageLinear,
    rows: Vector | None,
) -> tuple[Vector, Vector]:
    """(z, z − base), which were `found` beforehand."""
    del explicit, gamma, linear, rows
    return found


@attach.def_jvp
def _attach_jvp(primals, tangents, *, found, gamma, linear, rows):
    """W ż = M ḃase − Ṁ (z − base) + γ F'(0, ṫ, θ̇), from one linearisation at z."""
    (explicit,), (t_explicit,) = primals, tangents
    out = attach(explicit, found=found, gamma=gamma, linear=linear, rows=rows)
    z, w = out
    d_base = _materialised(explicit.base, t_explicit.base)
    leaves, treedef = jtu.tree_flatten((explicit.t, explicit.increment))
    d_leaves = treedef.flatten_up_to((t_explicit.t, t_explicit.increment))
    chosen, d_chosen, merged = _moving(leaves, d_leaves)

    def fn(z, moving):
        t, increment = jtu.tree_unflatten(treedef, merged(moving))
        return increment(t, z)

    lin = linearise(fn, z, chosen)
    direct = lin.joint.mv((tree.zeros_like(d_base), d_chosen))
    weights, weights_def = jtu.tree_flatten(explicit.mass)
    d_weights = weights_def.flatten_up_to(t_explicit.mass) if weights else []
    weights, d_weights, all_weights = _moving(weights, d_weights)
    product = lambda moving, v: weighted(jtu.tree_unflatten(weights_def, all_weights(moving)), v)
    _, moved = jax.jvp(product, (weights, tree.scale(-1.0, w)), (d_weights, d_base))
    rhs = tree.axpy(gamma, direct, moved)
    operator = matrix(stop_gradient(explicit.mass), lin.operator, gamma)
    if rows is not None:
        rhs, operator = times(rhs, rows), with_rows(operator, rows)
    unknown = [False] * len(jtu.tree_leaves(rhs))
    rhs = anchored(rhs, unknown, [*jtu.tree_leaves(d_base), *d_chosen, *d_weights])
    held, at, by = stop_gradient((operator, z, linear))
    solve = lambda _, b: by.tight(by.at(held, at), b)
    transpose_solve = lambda _, b: by.tight(by.at(held, at).transpose(), b)
    dz = lax.custom_linear_solve(operator.mv, rhs, solve, transpose_solve)
    return out, (dz, tree.sub(dz, d_base))


def _moving(leaves: list[Any], d_leaves: list[Any]) -> tuple[list[Any], list[Any], Any]:
    """The leaves that have tangents, those, and a function that puts such leaves among the rest."""
    active = [d is not None for d in d_leaves]
    chosen = [x for x, a in zip(leaves, active, strict=True) if a]
    d_chosen = [
        jnp.asarray(d, x.dtype) for x, d in zip(leaves, d_leaves, strict=True) if d is not None
    ]

    def merged(moving: list[Any]) -> list[Any]:
        rest = iter(moving)
        return [next(rest) if a else x for a, x in zip(active, leaves, strict=True)]

    return chosen, d_chosen, merged


def _materialised(primal: Vector, tangent: Any) -> Vector:
    """The tangent, with zeros in the place of `None`."""
    one = lambda x, d: jnp.zeros_like(x) if d is None else jnp.asarray(d, x.dtype)
    return jtu.tree_map(one, primal, tangent, is_leaf=lambda x: x is None)

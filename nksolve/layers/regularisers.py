"""Regularisation of the Jacobian of a fixed-point map."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PRNGKeyArray

from .. import tree
from ..linearise.linearisation import linearise
from ..linearise.policies import AbstractPolicy, Linearise
from ..typing import Args, Fn, Scalar, Vector, Y


def jacobian_frobenius(
    fn: Fn,
    z: Y,
    args: Args = None,
    *,
    key: PRNGKeyArray,
    num_probes: int = 1,
    policy: AbstractPolicy = Linearise(),
) -> Scalar:
    """An unbiased estimate of ‖J‖_F²/d for J = ∂fn/∂z: add a multiple of it to a loss.

    The mean of ‖J v‖²/d over random signs v, whose expectation is ‖J‖_F²/d, at a variance of
    2 (‖JᵀJ‖_F² − Σ (JᵀJ)ᵢᵢ²)/(d² num_probes). It holds ρ(J) down, so that plain iterations converge
    and Newton–Krylov needs fewer matvecs. All probes go through one linearisation.

    Differentiable in the parameters of `fn`, in args and in z. At z = `layer(x)` the derivative
    in z joins the layer's other cotangents, in one adjoint solve; `jax.lax.stop_gradient(z)`
    leaves it out.

    **Arguments:**

    - `fn`: the map, `fn(z, args)`, such as the cell of an `nks.ImplicitLayer` with args = x.
    - `z`: the point, usually its fixed point; a PyTree. d is the number of its entries (complex
      ones count twice): for a batch, with `fn` mapped over it by `eqx.filter_vmap`, the result is
      the mean of the samples' own.
    - `key`: for the probes. Take a new one each training step.
    - `num_probes`: v's to average over, in one batch.
    - `policy`: what the linearisation stores.

    Storage: one linearisation, `num_probes` vectors. Work: one evaluation of `fn`, `num_probes`
    matvecs (the paper has vᵀJ, of the same expectation; J v needs no transposition before the
    gradient's own).

    Source: Bai, Koltun & Kolter, Stabilizing equilibrium models by Jacobian regularization, ICML
    2021; Hutchinson, Commun. Stat. Simul. Comput. 18(3), 1989 (random signs).
    """
    if num_probes < 1:
        raise ValueError(f"`num_probes` must be at least 1, but it is {num_probes}.")
    lin = linearise(fn, z, args, policy=policy)
    variables = eqx.filter(z, eqx.is_inexact_array)
    leaves = jtu.tree_leaves(variables)
    dimension = sum(x.size * (2 if jnp.iscomplexobj(x) else 1) for x in leaves)
    if dimension == 0:
        return jnp.zeros((), tree.real_dtype(variables))

    def one(key: PRNGKeyArray) -> Scalar:
        image = lin.operator.mv(_signs(key, variables))
        return tree.vdot(image, image).real / dimension

    return jnp.mean(jax.vmap(one)(jax.random.split(key, num_probes)))


def _signs(key: PRNGKeyArray, variables: Vector) -> Vector:
    """Independent entries ±1; ±1 ± i where they are complex."""
    leaves, treedef = jtu.tree_flatten(variables)

    def drawn(key, x):
        if not jnp.iscomplexobj(x):
            return jax.random.rademacher(key, x.shape, x.dtype)
        parts = jax.random.rademacher(key, (2, *x.shape), x.real.dtype)
        return jax.lax.complex(parts[0], parts[1])

    keys = jax.random.split(key, len(leaves))
    return jtu.tree_unflatten(treedef, [drawn(k, x) for k, x in zip(keys, leaves, strict=True)])

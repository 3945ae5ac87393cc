"""What a step size controller is told: of the error, and of the iteration that found the step."""

from typing import Any

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from .. import tree
from ..linearise.views import divided
from ..typing import Flag, Scalar, Vector
from .newton import SimplifiedNewton

# Of Diffrax's `PIDController`: the next step is this over ‖error‖^(1/order) times the last.
_SAFETY = 0.9


def asking(
    newton: SimplifiedNewton,
    error: Vector,
    scale: Vector,
    *,
    contraction: Scalar,
    converged: Flag,
    error_order: Any,
) -> Vector:
    """The error estimate, larger where the iteration for the stages forbids the step that it
    would allow.

    The contraction θ of a simplified Newton iteration is about proportional to h. A controller that
    sees the error alone lets h grow until the iteration diverges, cuts it, and begins again: half
    of the steps are lost. So no step is asked for at which θ would exceed 0.4: the next h is
    at most 0.4/θ times this one. Where the iteration failed, h is at least halved.

    A controller of Diffrax sees nothing but the error, so this is told in its language: the norm
    that makes it choose that h. It saves steps where tolerances are loose: at rtol 1e-4 Kvaerno5
    takes 318 in place of 408 on the Oregonator, 246 in place of 360 on Van der Pol's oscillator
    (rejected ones included); at 1e-6 none. Where Newton's tolerances are not the controller's, a
    failure is an infinite error, and all else the error as it is.

    Source: Gustafsson & Söderlind, Control strategies for the iterative solution of nonlinear
    equations in ODE solvers, SIAM J. Sci. Comput. 18(1), 1997, section 4.
    """
    refused = jtu.tree_map(lambda e: jnp.full_like(e, jnp.inf), error)
    if not newton.is_controlled:  # no word that the controller would understand
        return tree.where(converged, error, refused)
    error, scale, theta = lax.stop_gradient((error, scale, contraction))
    dtype = theta.dtype
    norm_of = lambda v: newton.norm(v).astype(dtype)
    ratio = 0.4 / jnp.maximum(theta, 1e-3)
    ratio = jnp.where(converged, ratio, jnp.minimum(ratio, 0.5))
    ratio = jnp.clip(ratio, 0.1, 10.0)
    least = (_SAFETY / ratio) ** jnp.asarray(error_order, dtype)
    ones = jtu.tree_map(jnp.ones_like, scale)
    told = jtu.tree_map(
        lambda s, e: (s * (least / norm_of(ones)).astype(s.dtype)).astype(e.dtype), scale, error
    )
    norm = norm_of(divided(error, scale))
    chosen = tree.where(norm >= least, error, told)
    lost = ~jnp.isfinite(theta) | ~(norm < jnp.inf)
    return tree.where(lost, refused, chosen)

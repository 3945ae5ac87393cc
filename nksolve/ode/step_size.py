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
    size: Vector,
    starting: Flag,
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

    A step that begins at a start or a jump is refused as one of order 1: its error, of fast modes
    that the smooth solution does not have, falls about with h (measured, 0.8 to 1.2) and not with
    h^`error_order`, and a controller that takes it for the latter tries one step after the other.
    With Kvaerno5 on the two-dimensional Brusselator at 1e-5 and `PIDController(pcoeff=0.3,
    icoeff=0.3)` 13 of 24 rejected steps were of this kind, and with it 4 of 14.

    A controller of Diffrax sees nothing but the error, so this is told in its language: the norm
    that makes it choose that h. It saves steps where tolerances are loose: at rtol 1e-4 Kvaerno5
    takes 318 in place of 408 on the Oregonator, 246 in place of 360 on Van der Pol's oscillator
    (rejected ones included); at 1e-6 none. Where Newton's tolerances are not the controller's, a
    failure is an infinite error, and all else the error as it is.

    `scale` is that of the step's begin, `size` the controller's, of the larger of begin and end;
    `starting` whether the step begins at a start or a jump.

    Source: Gustafsson & Söderlind, Control strategies for the iterative solution of nonlinear
    equations in ODE solvers, SIAM J. Sci. Comput. 18(1), 1997, section 4.
    """
    refused = jtu.tree_map(lambda e: jnp.full_like(e, jnp.inf), error)
    if not newton.is_controlled:  # no word that the controller would understand
        return tree.where(converged, error, refused)
    error, scale, size, theta = lax.stop_gradient((error, scale, size, contraction))
    dtype = theta.dtype
    norm_of = lambda v: newton.norm(v).astype(dtype)
    order = jnp.asarray(error_order, dtype)
    norm = norm_of(divided(error, size))
    # The controller takes a root of `order`; beyond 1e6 every one cuts as far as it ever does.
    more = jnp.where(starting & (norm > 1), jnp.minimum(norm ** (order - 1), 1e6), 1.0)
    error = tree.scale(more.astype(dtype), error)
    ratio = 0.4 / jnp.maximum(theta, 1e-3)
    ratio = jnp.where(converged, ratio, jnp.minimum(ratio, 0.5))
    ratio = jnp.clip(ratio, 0.1, 10.0)
    least = (_SAFETY / ratio) ** order
    ones = jtu.tree_map(jnp.ones_like, scale)
    told = jtu.tree_map(
        lambda s, e: (s * (least / norm_of(ones)).astype(s.dtype)).astype(e.dtype), scale, error
    )
    norm = norm_of(divided(error, scale))
    chosen = tree.where(norm >= least, error, told)
    lost = ~jnp.isfinite(theta) | ~(norm < jnp.inf)
    return tree.where(lost, refused, chosen)

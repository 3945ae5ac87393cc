"""The factor that the step size is to change by, written as an error that a controller reads.

Diffrax hands a controller nothing but `y_error`. An I-controller with the safety 0.9 makes 0.9/√e
of an error of the norm e and of order 2, so that e = (0.9/F)² brings about the factor F, within the
bounds of the controller. Only such a step that is accepted although the next is to be shorter
cannot be written so: for it the errors from 0.9025 to 1 are set aside, which
`diffrax.PIDController` reads as a step to be repeated at the same size.
"""

import jax.numpy as jnp

from ...typing import Flag, Scalar

ERROR_ORDER = 2.0
_SAFETY = 0.9
_HOLD = 0.95**2
_WIDTH = 0.998 * (1 - _HOLD)


def encoded(accepted: Flag, factor: Scalar) -> Scalar:
    """The norm of the error that stands for a verdict."""
    grown = (_SAFETY / jnp.maximum(factor, 1)) ** 2
    shrunk = _HOLD + _WIDTH * (1 - jnp.clip(factor, 0, 1))
    refused = (_SAFETY / jnp.clip(factor, 1e-3, 0.85)) ** 2
    return jnp.where(accepted, jnp.where(factor > 1, grown, shrunk), refused)


def decoded(error: Scalar) -> tuple[Flag, Scalar]:
    """(whether the step is accepted, the factor), which may be any for an error that is inf."""
    accepted = error < 1
    shrunk = 1 - (error - _HOLD) / _WIDTH
    # Rounding: a norm in float32 is known to a few units of 1e-7.
    shrunk = jnp.where(jnp.abs(shrunk - 1) < 1e-3, 1, jnp.clip(shrunk, 0, 1))
    read = _SAFETY / jnp.sqrt(jnp.maximum(error, 1e-30))
    between = accepted & (error > (_HOLD + _SAFETY**2) / 2)
    return accepted, jnp.where(between, shrunk, read).astype(error.dtype)

"""Why a solve stopped, each reason with advice, and what that means to Optimistix."""

from typing import Any

import jax.numpy as jnp
import optimistix as optx

from .loops import Enumeration
from .typing import Count, Flag


class REASONS(Enumeration):  # pyright: ignore[reportGeneralTypeIssues]
    """Why a nonlinear solve stopped. The names follow PETSc's SNES reasons.

    `residual_atol` and `residual_rtol` are success; every other reason is a failure (or, inside a
    solve, `iterating`). `nks.REASONS[reason]` is the text.
    """

    residual_rtol = "Converged: the residual norm fell below rtol times its initial value (+ atol)."
    residual_atol = "Converged: the residual norm fell below atol."
    iterating = "The solve has not stopped."
    max_steps = (
        "The maximum number of trial steps was reached before the residual test held. Allow more "
        "with `max_steps`, loosen `rtol`/`atol`, precondition the Krylov solver, or start nearer."
    )
    step_small = (
        "The step became too small to change y although the residual test does not hold. The "
        "tolerance may lie below the rounding level of the residual in this dtype (compute in "
        "float64 or loosen it), or y is a local minimum of the residual norm (start elsewhere)."
    )
    line_search_failed = (
        "The line search found no step along the Newton direction that decreases the residual "
        "norm. The Jacobian may be wrong (a non-smooth residual, a stopped gradient) or singular, "
        "the linear solve too loose, or the tolerance below the rounding level. Try a smaller "
        "forcing term, another globalisation, or another start."
    )
    linear_solve_failed = (
        "The Krylov solver stagnated or broke down without reducing the linear residual. The "
        "Jacobian may be singular; otherwise precondition it, or use a longer `restart`."
    )
    diverged = (
        "The residual norm grew past the divergence threshold times its initial value. Use a "
        "globalisation that monitors decrease (`nks.Backtracking()`), or start nearer to a root."
    )
    stagnated = (
        "The best residual norm has not decreased over many steps. The residual may have no root "
        "near here, or the tolerance may lie below its rounding level. Start elsewhere, loosen the "
        "tolerance, or compute in float64."
    )
    nonfinite = (
        "The residual is NaN or infinite at the initial point, or a full step led to such a point. "
        "Check the residual there; a line search (`nks.Backtracking()`) steps back from NaN."
    )
    trust_region_failed = (
        "The trust region shrank to nothing: no step, however short, decreased the residual norm "
        "as the linear model promised. The Jacobian may be wrong, or y is a local minimum of the "
        "residual norm. Start elsewhere, or try another globalisation."
    )


# The order of the table is the order of the members above.
_OPTX: tuple[tuple[Any, Any], ...] = (
    (REASONS.residual_rtol, optx.RESULTS.successful),
    (REASONS.residual_atol, optx.RESULTS.successful),
    (REASONS.iterating, optx.RESULTS.successful),
    (REASONS.max_steps, optx.RESULTS.nonlinear_max_steps_reached),
    (REASONS.step_small, optx.RESULTS.stagnation),
    (REASONS.line_search_failed, optx.RESULTS.nonlinear_divergence),
    (REASONS.linear_solve_failed, optx.RESULTS.breakdown),
    (REASONS.diverged, optx.RESULTS.nonlinear_divergence),
    (REASONS.stagnated, optx.RESULTS.stagnation),
    (REASONS.nonfinite, optx.RESULTS.nonfinite),
    (REASONS.trust_region_failed, optx.RESULTS.nonlinear_divergence),
)


def code(reason: REASONS) -> Count:
    """The integer that stands for a reason."""
    return jnp.asarray(reason._value)


def reason_name(reason: REASONS | int) -> str:
    """The name of a reason (or of its integer code), such as `"residual_rtol"`."""
    value: Any = getattr(reason, "_value", reason)
    return list(REASONS._name_to_item)[int(value)]


def to_optimistix(reason: REASONS) -> optx.RESULTS:
    """The `optimistix.RESULTS` member that stands for `reason`."""
    result: Any = optx.RESULTS.successful
    for ours, theirs in _OPTX:
        result = optx.RESULTS.where(reason == ours, theirs, result)
    return result


def is_success(reason: REASONS) -> Flag:
    """Whether the residual test held at the returned point."""
    return code(reason) <= code(REASONS.residual_atol)  # the two first members


def first_of(*cases: tuple[Flag, REASONS], otherwise: REASONS) -> REASONS:
    """The reason of the first case whose flag holds."""
    reason = otherwise
    for flag, candidate in reversed(cases):
        reason = REASONS.where(jnp.asarray(flag), candidate, reason)
    return reason

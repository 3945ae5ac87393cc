"""Tell the user how a solve goes while it runs; absent from the program unless asked for."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from ..results import REASONS, code, reason_name
from ..typing import Count, Flag, Scalar


class StepReport(NamedTuple):
    """One trial of a running solve, as host scalars.

    `reason` is a name of `nks.REASONS`, empty while the solve goes on.
    """

    trial: int
    norm: float
    eta: float
    num_matvecs: int
    step_length: float
    accepted: bool
    reason: str


def print_report(report: StepReport) -> None:
    """Prints one line."""
    state = "accepted" if report.accepted else "rejected"
    line = (
        f"trial {report.trial:3d}   ‖F‖ {report.norm:.6e}   λ {report.step_length:.2e}   "
        f"η {report.eta:.1e}   matvecs {report.num_matvecs:4d}   {state}"
    )
    print(f"{line}   {report.reason}" if report.reason else line)


def emit(
    receiver: Callable[[StepReport], None],
    running: Flag,
    trial: Count,
    norm: Scalar,
    eta: Scalar,
    num_matvecs: Count,
    step_length: Scalar,
    accepted: Flag,
    reason: REASONS,
) -> None:
    """Calls `receiver` on the host for every lane that is running."""

    def call(running, trial, norm, eta, num_matvecs, step_length, accepted, reason):
        if running:
            name = reason_name(int(reason))
            receiver(
                StepReport(
                    int(trial),
                    float(norm),
                    float(eta),
                    int(num_matvecs),
                    float(step_length),
                    bool(accepted),
                    "" if name == "iterating" else name,
                )
            )

    jax.debug.callback(
        call, running, trial, norm, eta, num_matvecs, step_length, accepted, code(reason)
    )

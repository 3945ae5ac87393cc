"""Tell the user how a solve goes while it runs; absent from the program unless asked for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from ..loops import NoProgressMeter
from ..results import REASONS, code, is_success, reason_name
from ..typing import Count, Flag, Vector


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


class Choice(eqx.Module):
    """What `nks.AutoLinear` or `nks.Auto` chose, and why. Static: no array, and the same in every
    lane."""

    text: str = eqx.field(static=True)

    def __str__(self) -> str:
        return self.text


def print_choice(text: str) -> None:
    """Prints it when the program runs; nothing where there was no choice."""
    if text:
        jax.debug.callback(lambda: print(text))


def print_report(report: StepReport) -> None:
    """Prints one line."""
    state = "accepted" if report.accepted else "rejected"
    line = (
        f"trial {report.trial:3d}   ‖F‖ {report.norm:.6e}   λ {report.step_length:.2e}   "
        f"η {report.eta:.1e}   matvecs {report.num_matvecs:4d}   {state}"
    )
    print(f"{line}   {report.reason}" if report.reason else line)


def told(solver: Any, old: Any, new: Any, running: Flag, row: dict[str, Any], value: Vector) -> Any:
    """The new state after a trial was recorded, printed and metered, where the solver asks to.

    `row` holds `norm`, `eta`, `num_matvecs`, `step_length` and `accepted` of the trial, `value` is
    the residual there.
    """
    if new.history is not None:
        leaves = {"value": value, "of": solver.norm}
        history = new.history.record(old.trial, running, reason=new.reason, **row, **leaves)
        new = new._replace(history=history)
    if solver.verbose:
        receiver = print_report if solver.verbose is True else solver.verbose
        _emit(receiver, running, old.trial, row, new.reason)
    if not isinstance(solver.progress_meter, NoProgressMeter):
        initial = new.initial_norm
        done = jnp.log(new.best.test_norm / initial) / jnp.log(solver.target(initial) / initial)
        done = jnp.where(jnp.isfinite(done), jnp.clip(done, 0.0, 1.0), 0.0)
        done = jnp.where(is_success(new.reason), jnp.ones_like(done), done)
        new = new._replace(meter=solver.progress_meter.step(old.meter, done))
    return new


def _emit(
    receiver: Callable[[StepReport], None],
    running: Flag,
    trial: Count,
    row: dict[str, Any],
    reason: REASONS,
) -> None:
    """Calls `receiver` on the host for every lane that is running."""

    def call(running, trial, reason, norm, eta, num_matvecs, step_length, accepted):
        if running:
            name = reason_name(int(reason))
            receiver(
                StepReport(
                    trial=int(trial),
                    norm=float(norm),
                    eta=float(eta),
                    num_matvecs=int(num_matvecs),
                    step_length=float(step_length),
                    accepted=bool(accepted),
                    reason="" if name == "iterating" else name,
                )
            )

    jax.debug.callback(call, running, trial, code(reason), **row)

"""Figures of a solve. Matplotlib, the extra `plot`, is imported only when one is drawn."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .results import REASONS, code

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MANY = 24  # the numbers and markers of more trials than this run into each other


class _Rows(NamedTuple):
    norm: np.ndarray
    num_matvecs: np.ndarray
    accepted: np.ndarray


def plot_history(
    history: Any, ax: "Axes", *, label: str | None = None, target: float | None = None
) -> "Axes":
    """‖F‖ at every trial of a solve on a logarithmic axis, drawn into `ax`, which is returned.

    **Arguments:**

    - `history`: `solution.stats["history"]`, or the array `history` of the command line's `.npz`.
    - `label`: for a legend of several solves. Without it one solve is drawn: each accepted point is
      annotated with the matvecs of the linear solve that starts there (unless there are many),
      rejected trials are crossed.
    - `target`: the residual norm at which the solve succeeds, drawn as a dashed line.
    """
    rows = _rows(history)
    trial = np.arange(rows.norm.size)
    size = 5 if trial.size <= _MANY else 3
    shown = np.isfinite(rows.norm) & (rows.norm > 0)
    kept, lost = shown & rows.accepted, shown & ~rows.accepted
    (line,) = ax.semilogy(
        trial[kept], rows.norm[kept], "o-", markersize=size, linewidth=1.4, label=label
    )
    if lost.any():
        ax.semilogy(
            trial[lost], rows.norm[lost], "x", color="0.45" if label is None else line.get_color(),
            markersize=size + 1, label="rejected trial" if label is None else None,
        )  # fmt: skip
    annotated = np.flatnonzero(kept & (rows.num_matvecs > 0))
    if label is None and trial.size <= _MANY:
        for i in annotated:
            ax.annotate(
                str(rows.num_matvecs[i]),
                (float(i), float(rows.norm[i])),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
                color="0.3",
            )
        ax.plot([], [], " ", label="numbers: matvecs of the linear solve")
    if target is not None and target > 0:
        ax.axhline(target, linestyle="--", linewidth=1, color="tab:green", label="tolerance")
    ax.locator_params(axis="x", integer=True)
    ax.margins(x=0.08, y=0.1)
    ax.set(xlabel="trial point", ylabel="residual norm ‖F‖")
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=8)
    return ax


def plot_field(field: Any, ax: "Axes", *, label: str = "y") -> "Axes":
    """A 1-D array as a curve, a 2-D array as an image with a colour bar, drawn into `ax`.

    The axes count nodes; axis 0 of a 2-D array runs to the right, axis 1 upwards. Raises
    `ValueError` for other numbers of dimensions.
    """
    values = np.asarray(field)
    if values.ndim == 1:
        marker = "o-" if values.size <= 20 else "-"
        ax.plot(np.arange(values.size), values, marker, markersize=4, linewidth=1.4)
        ax.locator_params(axis="x", integer=True)
        ax.set(xlabel="node", ylabel=label)
        ax.grid(alpha=0.3)
    elif values.ndim == 2:
        figure = ax.figure
        image = ax.imshow(values.T, origin="lower", cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=ax, label=label, shrink=0.85)
        ax.set(xlabel="node along axis 0", ylabel="node along axis 1")
    else:
        raise ValueError(f"a field has one or two dimensions to be drawn, not {values.ndim}")
    return ax


def plot_solve(
    history: Any, field: Any | None, *, title: str, target: float | None = None
) -> "Figure":
    """The history and, where there is one, the field beside it, as a new figure."""
    figure = new_figure(1 if field is None else 2)
    plot_history(history, figure.axes[0], target=target).set_title("convergence", fontsize=10)
    if field is not None:
        plot_field(field, figure.axes[1]).set_title("solution", fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def new_figure(columns: int = 1) -> "Figure":
    """A figure with a row of axes, which belongs to no window: `figure.savefig(path)` ends it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.0 + 4.7 * columns, 4.2), dpi=150, layout="constrained")
    figure.subplots(1, columns)
    return figure


def can_write(path: Path) -> bool:
    """Whether matplotlib knows the format that the name ends in."""
    from matplotlib.backend_bases import FigureCanvasBase

    return path.suffix.lstrip(".").lower() in FigureCanvasBase.get_supported_filetypes()


def _rows(history: Any) -> _Rows:
    """The rows that a solve has written, of a `History` or of a structured array."""
    if isinstance(history, np.ndarray):
        return _Rows(history["norm"], history["num_matvecs"], history["accepted"])
    reason = np.asarray(history.reason)
    # A row that was not written looks like one that iterates, and so does the last one where
    # max_steps ended the solve.
    written = (reason != int(code(REASONS.iterating))) | np.isfinite(np.asarray(history.norm))
    length = int(np.flatnonzero(written).max(initial=-1)) + 1
    columns = (history.norm, history.num_matvecs, history.accepted)
    return _Rows(*(np.asarray(column)[:length] for column in columns))

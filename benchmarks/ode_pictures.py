"""The work–precision diagrams of `python -m benchmarks --ode`."""

from pathlib import Path
from typing import Any

import matplotlib

from .ode_problems import problem
from .ode_tables import useful

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"
DIAGRAMS = ("rober", "hires", "orego", "bruss-1000", "grid-32", "gray-32")
_STYLES = {
    "nksolve Kvaerno3": "C0v-", "nksolve Kvaerno5": "C0o-", "nksolve Rodas5P": "C0s-",
    "nksolve Rosenbrock23": "C0x-", "nksolve BDF": "C0*-",
    "Diffrax Kvaerno3": "C1v--", "Diffrax Kvaerno5": "C1o--",
    "Diffrax Kvaerno3, Newton(lx.GMRES)": "C3v:", "Diffrax Kvaerno5, Newton(lx.GMRES)": "C3o:",
    "SciPy BDF": "C2*--", "SciPy Radau": "C2D--",
    "CVODE dense": "k*-", "CVODE band": "k*-", "CVODE GMRES": "k*:",
}  # fmt: skip


def diagrams(results: dict[str, dict[str, Any]]) -> None:
    """Those of the problems that were measured."""
    for name in DIAGRAMS:
        start = f"{name} | "
        rows = {k.removeprefix(start): row for k, row in results.items() if k.startswith(start)}
        if rows:
            _diagram(name, rows)


def _diagram(name: str, rows: dict[str, dict[str, Any]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.8), sharey=True)
    for contender, row in rows.items():
        for axis, what in zip(axes, ("work", "seconds"), strict=True):
            points = [p for p in useful(row) if p.get(what)]
            scale = 1e3 if what == "seconds" else 1.0
            axis.loglog(
                [scale * p[what] for p in points],
                [p["error"] for p in points],
                _STYLES[contender],
                ms=4,
                lw=1,
                label=contender,
            )
    axes[0].set(xlabel="evaluations + matvecs", ylabel="error at the end")
    axes[1].set(xlabel="milliseconds")
    for axis in axes:
        axis.grid(color="0.9")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="center right", frameon=False)
    figure.suptitle(problem(name).title, fontsize=10)
    figure.tight_layout(rect=(0, 0, 0.78, 1))
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"ode-{name}.png", dpi=80)
    plt.close(figure)

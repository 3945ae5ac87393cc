"""The end values that the contenders of `python -m benchmarks --ode` are compared with."""

from pathlib import Path

import numpy as np

from . import ode_ours as ours
from .ode_problems import Problem


def reference(known: Problem, folder: Path) -> np.ndarray:
    """The end value: the problem's own, or one made at the first call and kept.

    The latter is by Rodas5P at a tolerance far below those compared; `checked` says how far
    another method is from it.
    """
    return _reference(known, folder)[0]


def checked(known: Problem, folder: Path) -> float | None:
    """How far BDF, at ten times the tolerance, is from the reference that was made here."""
    return _reference(known, folder)[1]


def _reference(known: Problem, folder: Path) -> tuple[np.ndarray, float | None]:
    if known.given.end is not None and not known.lanes:
        return known.given.end, None
    path = folder / f"reference-{known.name}.npz"
    if not path.exists():
        rtol = 1e-10 if known.shape == "grid" else 1e-11
        value = ours.runner(known, "nksolve Rodas5P").solve(rtol).y
        other = ours.runner(known, "nksolve BDF").solve(10 * rtol).y
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(path, y=value, checked=known.error(other, value))
    with np.load(path) as kept:
        return kept["y"], float(kept["checked"])

"""An initial value problem with a known end value."""

import dataclasses
from collections.abc import Callable
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Array


@dataclasses.dataclass(frozen=True, eq=False)
class InitialValueProblem:
    """y' = fn(t, y, args) from `y0` at `span[0]` to `span[1]`.

    - `source`: where equations and end values are from.
    - `end`: y at `span[1]`, as NumPy float64, or `None`.
    - `atol_factor`: atol/rtol of the usual accuracy runs, for variables far from 1.
    - `jumps`: times at which `fn` is discontinuous.
    """

    name: str
    source: str
    fn: Callable[[Any, Any, Any], Any]
    y0: Array = dataclasses.field(repr=False)
    span: tuple[float, float]
    args: Any = dataclasses.field(default=None, repr=False)
    end: np.ndarray | None = dataclasses.field(default=None, repr=False)
    atol_factor: float = 1.0
    jumps: tuple[float, ...] = ()


def kept_end(name: str) -> np.ndarray:
    """An end value from `nksolve/problems/data`."""
    with (resources.files("nksolve.problems") / "data" / f"{name}.npz").open("rb") as file:
        return np.load(file)["y"]

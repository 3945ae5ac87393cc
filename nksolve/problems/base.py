"""What a test problem is: a residual, a start, and the answers that have been published for it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The leading `dimensions` axes of y are a grid, and `fn` works on a grid of any size.

    - `boundary`: "dirichlet" (interior nodes, zero outside), "neumann" (nodes with both ends, no
      flux) or "periodic".
    - `order`: the power of the mesh width that the residual is multiplied by.
    """

    dimensions: int
    boundary: Literal["dirichlet", "neumann", "periodic"]
    order: int


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Find y with `fn(y, args) = 0`, starting from `y0`.

    `fn` is a module-level function, the same object each time the problem is built, so that
    compiled solvers are reused; every number that can vary is an array in `args`. The residual has
    the structure, shapes and dtype of `y`.

    - `name`: the name under which `nksolve.problems.get` finds it; `title`: what it is, in one
      line.
    - `source`: the paper or program, with the number of the equation or example.
    - `root`: an exact root of the residual (published or analytic), `None` if none is known. Its
      distance from the true root is rounding, or that of the digits published.
    - `continuum`: for a discretised differential equation, its exact solution at the nodes. The
      root differs from it by the discretisation error.
    - `bounds`: the pair (lower, upper) that the source puts on y, each of the structure of y.
    - `tags`: words to choose by: "published" (numbers to compare with), "pde", "1d", "2d",
      "singular-root" (the Jacobian is singular at the root), "nonlinear-library" (one of the 23 of
      Burkardt's test_nonlin), "trap" (‖f‖ has a local minimum that is no root), ...
    - `published`: published numbers by name, such as "newton_steps" or "centre"; each docstring
      says what they are.
    - `mesh`: the grid that y lives on, for multigrid, or `None`.
    - `field`: takes a solution and returns the array to plot (1-D or 2-D), or is `None`.
    """

    name: str
    title: str
    source: str
    fn: Callable[[Any, Any], Any]
    y0: PyTree[Array] = dataclasses.field(repr=False)
    args: PyTree = dataclasses.field(default=None, repr=False)
    root: PyTree[Array] | None = dataclasses.field(default=None, repr=False)
    continuum: PyTree[Array] | None = dataclasses.field(default=None, repr=False)
    bounds: tuple[PyTree[Array], PyTree[Array]] | None = dataclasses.field(default=None, repr=False)
    tags: frozenset[str] = frozenset()
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None
    field: Callable[[Any], Any] | None = dataclasses.field(default=None, repr=False)


def floating(dtype: DTypeLike | None) -> np.dtype:
    """The dtype asked for, or JAX's default floating dtype; `ValueError` unless real."""
    chosen = np.dtype(jnp.result_type(float) if dtype is None else dtype)
    if not jnp.issubdtype(chosen, jnp.floating):
        raise ValueError(f"a problem needs a real floating-point dtype, not {chosen}")
    return chosen


def at_least(name: str, value: int, least: int) -> None:
    """Raises `ValueError` unless the size called `name` is at least `least`."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def interior(n: int) -> np.ndarray:
    """The n interior nodes i/(n+1) of the unit interval, in float64."""
    return np.arange(1, n + 1) / (n + 1)


def identity(y: Any) -> Any:
    """The `field` of a problem whose solution is itself the array to plot."""
    return y

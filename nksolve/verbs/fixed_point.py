"""`fixed_point`: solve y = g(y, args)."""

from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import optimistix as optx

from .. import tree
from ..typing import Args, Aux, Fn, Vector, Y
from .root_find import root_find


def fixed_point(
    fn: Fn,
    solver: optx.AbstractRootFinder | optx.AbstractFixedPointSolver,
    y0: Y,
    args: Args = None,
    options: dict[str, Any] | None = None,
    *,
    has_aux: bool = False,
    max_steps: int = 256,
    adjoint: optx.AbstractAdjoint | None = None,
    throw: bool = True,
    tags: frozenset[object] = frozenset(),
) -> optx.Solution:
    """Finds y with y = fn(y, args), and lets you differentiate it with respect to args.

    The root find of F(y) = fn(y, args) − y: solvers, adjoints, counters, reasons and what is raised
    are those of `nks.root_find`, and tolerances are on ‖fn(y) − y‖.

    **Arguments:**

    - `fn`: the map, `fn(y, args)` with the structure, shapes and dtypes of y; with `has_aux` a pair
      `(fn(y, args), aux)`.
    - `solver`: `nks.NewtonKrylov`, an accelerated iteration such as `nks.Anderson`, or any root
      finder or fixed-point solver of Optimistix.
    - `tags`: Lineax tags promised of ∂fn/∂y − I.
    - the rest: as for `nks.root_find`.

    **Returns:** `optimistix.Solution`, as `nks.root_find` does.
    """
    if isinstance(solver, optx.AbstractFixedPointSolver):
        solution = optx.fixed_point(
            fn, solver, y0, args, options, has_aux=has_aux, max_steps=max_steps,
            adjoint=optx.ImplicitAdjoint() if adjoint is None else adjoint,
            throw=throw, tags=tags,
        )  # fmt: skip
        return solution
    residual = Displacement(fn, has_aux)
    return root_find(
        residual, solver, y0, args, options, has_aux=has_aux, max_steps=max_steps, adjoint=adjoint,
        throw=throw, tags=tags,
    )  # fmt: skip


class Displacement(eqx.Module):
    """The residual of a fixed-point problem: F(y) = g(y) − y."""

    fn: Fn
    has_aux: bool = eqx.field(static=True)

    def __call__(self, y: Y, args: Args) -> Vector | tuple[Vector, Aux]:
        out = self.fn(y, args)
        value, aux = out if self.has_aux else (out, None)
        moved = displacement(value, y)
        return (moved, aux) if self.has_aux else moved


def displacement(value: Y, y: Y) -> Vector:
    """value − y on the unknowns, after a check that both are of one space."""
    variables = eqx.filter(y, eqx.is_inexact_array)
    value = eqx.filter(value, eqx.is_inexact_array)
    if tree.structure(value) != tree.structure(variables):
        raise ValueError(
            "A fixed point needs a map into its own space: `fn(y, args)` must have the structure, "
            f"shapes and dtypes of y. y is {_told(variables)}, fn(y, args) is {_told(value)}. "
            "Reshape or cast what `fn` returns to match y."
        )
    return tree.sub(value, variables)


def _told(vector: Vector) -> str:
    return str(jtu.tree_map(lambda x: f"{x.dtype}{list(x.shape)}", tree.structure(vector)))

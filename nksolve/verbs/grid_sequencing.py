"""`grid_sequence`: solve on coarse grids first, and start each finer one from there."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx

from .. import tree
from ..adjoint.base import AbstractImplicitAdjoint
from ..adjoint.krylov import KrylovAdjoint
from ..newton.base import AbstractRootFinder
from ..precondition.multigrid import cast_args, coarser, grid_of, same_args, sampled
from ..precondition.transfer import AbstractTransfer, over_axes
from ..typing import Args, Fn, Y
from .root_find import root_find


def grid_sequence(
    fn: Fn | Sequence[Fn],
    solver: AbstractRootFinder,
    y0: Y,
    args: Args = None,
    *,
    grid: AbstractTransfer | Sequence[AbstractTransfer],
    num_levels: int = 3,
    coarsen: Callable[[Args], Args] = same_args,
    has_aux: bool = False,
    max_steps: int = 256,
    adjoint: AbstractImplicitAdjoint | None = None,
    throw: bool = True,
    tags: frozenset[object] = frozenset(),
) -> optx.Solution:
    """Finds y with fn(y, args) = 0 by nested iteration over `num_levels` grids.

    y0 is sampled down to the coarsest grid and solved there; each solution, interpolated by cubic
    polynomials, is the start on the next finer grid. Every grid is solved to
    ‖F‖ ≤ atol + rtol ‖F(y0 sampled there)‖, so that on the finest grid the tolerance is that of a
    solve from y0 itself: measured against the residual of the interpolated start it would ask for
    far more. Success there is therefore reported as `residual_atol`.

    **Arguments:**

    - `fn`: a residual that works on every grid, or a sequence of them, finest first.
    - `solver`: `nks.NewtonKrylov(...)` or another of nksolve's root finders; its preconditioner, if
      any, must work on every grid. The start on finer grids being good, a tight forcing term
      (`EisenstatWalker2(eta_0=1e-3)`) saves steps.
    - `y0`, `args`: on the finest grid.
    - `grid`: how an axis is coarsened, as for `Multigrid`.
    - `num_levels`: grids, the finest included. Each is a program of its own to compile.
    - `coarsen`: args → args on the next coarser grid.
    - `has_aux`, `max_steps`, `adjoint`, `throw`, `tags`: as in `nks.root_find`; a coarse solve that
      fails is not an error, its best point is used.

    **Returns:** the `optimistix.Solution` on the finest grid; `stats["levels"]` has the stats of
    every grid, coarsest first, and `stats["start_residual_norm"]` is ‖F(y0)‖, which costs one
    evaluation of `fn` beside `num_fn_evals`.

    Derivatives are those of the finest solve alone (`nks.KrylovAdjoint`); nothing is differentiated
    through the coarse grids.

    **Raises:** `ValueError` for a grid that cannot be coarsened so often.

    Source: Trottenberg, Oosterlee & Schüller, Multigrid, 2001, section 2.6; Knoll & Keyes,
    J. Comput. Phys. 193, 2004, section 3.4.
    """
    if not isinstance(solver, AbstractRootFinder):
        raise TypeError(
            f"`grid_sequence` needs one of nksolve's root finders, such as `nks.NewtonKrylov`, but "
            f"got {solver!r}."
        )
    fns = [fn] * num_levels if callable(fn) else list(fn)
    if num_levels < 1 or len(fns) != num_levels:
        raise ValueError(
            f"`num_levels` must be at least 1 and the number of residuals, but it is {num_levels} "
            f"and there are {len(fns)} residuals."
        )
    variables, static = eqx.partition(y0, eqx.is_inexact_array)
    structures = coarser(
        grid_of(grid, tree.structure(variables)), tree.structure(variables), 0, num_levels - 1
    )
    axes = grid_of(grid, structures[0])
    starts, arguments = [lax.stop_gradient(variables)], [args]
    for structure in structures[1:]:
        starts.append(sampled(axes, starts[-1], structure))
        arguments.append(cast_args(coarsen(arguments[-1]), structure))
    if adjoint is None:
        adjoint = KrylovAdjoint()
    adjoint = adjoint.tolerating(solver.rtol)  # the solver's own is zero below

    guess, levels, norm = starts[-1], [], None
    solution: Any = None
    for depth in reversed(range(num_levels)):
        start = eqx.combine(starts[depth], static)
        norm = _start_norm(fns[depth], start, arguments[depth], solver, has_aux)
        solution = root_find(
            fns[depth],
            _absolute(solver, norm),
            eqx.combine(guess, static),
            arguments[depth] if depth == 0 else _stopped(arguments[depth]),
            has_aux=has_aux,
            max_steps=max_steps,
            adjoint=adjoint,
            throw=throw and depth == 0,
            tags=tags,
        )
        levels.append({**solution.stats, "start_residual_norm": norm})
        if depth > 0:
            found = eqx.filter(solution.value, eqx.is_inexact_array)
            guess = over_axes(axes, _interpolate, found)
            guess = _like(guess, starts[depth - 1])
    stats = {**solution.stats, "start_residual_norm": norm, "levels": tuple(levels)}
    return eqx.tree_at(lambda s: s.stats, solution, stats)


@eqx.filter_jit
def _start_norm(fn, start, args, solver, has_aux):
    value = fn(start, _stopped(args))
    return solver.norm(value[0] if has_aux else value)


def _absolute(solver: Any, norm: Any) -> Any:
    """The solver with tolerances 0 and atol + rtol · norm."""
    atol = jnp.asarray(solver.atol).astype(norm.dtype)
    target = atol + jnp.asarray(solver.rtol).astype(norm.dtype) * norm
    target = lax.stop_gradient(target)
    return eqx.tree_at(lambda s: (s.rtol, s.atol), solver, (0.0, target))


def _stopped(args: Args) -> Args:
    arrays, rest = eqx.partition(args, eqx.is_array)
    return eqx.combine(lax.stop_gradient(arrays), rest)


def _like(vector: Any, like: Any) -> Any:
    return jtu.tree_map(lambda x, s: x.astype(s.dtype), vector, like)


def _interpolate(transfer: AbstractTransfer, x: Any, axis: int) -> Any:
    return transfer.interpolate(x, axis)

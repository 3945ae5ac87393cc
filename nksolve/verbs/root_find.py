"""`root_find`: solve F(y, args) = 0."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx

from ..adjoint.base import AbstractImplicitAdjoint, stop_gradient
from ..adjoint.failure import nan_where
from ..adjoint.krylov import KrylovAdjoint
from ..linearise.inspect import check_unknown
from ..linearise.trace import trace
from ..newton.base import AbstractRootFinder
from ..typing import Args, Fn, Y
from .implicit import Problem, root


def root_find(
    fn: Fn,
    solver: optx.AbstractRootFinder,
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
    """Finds y with fn(y, args) = 0, and lets you differentiate it with respect to args.

    As `optimistix.root_find`, with matrix-free derivatives, all counters in `stats`, and success
    only where the residual test holds at the returned point.

    **Arguments:**

    - `fn`: the residual, `fn(y, args) -> f` with the structure, shapes and dtypes of y; with
      `has_aux` a pair `(f, aux)`. It is traced once for each structure of the inputs; keep the
      same function object between calls so that nothing is compiled again, and pass numbers that
      change as arrays in `args`.
    - `solver`: `nks.NewtonKrylov(rtol, atol)`, or any `optimistix` root finder.
    - `y0`: the initial point, any PyTree. Its inexact arrays are the unknowns; leaves that are no
      arrays (functions in an `eqx.Module`) are held fixed; integers are refused.
    - `args`: passed on to `fn`.
    - `options`: of the solver; nksolve's have none.
    - `max_steps`: most trial points after the initial one.
    - `adjoint`: how the solve is differentiated; `nks.KrylovAdjoint()` by default.
    - `throw`: raise on failure. Otherwise the best finite iterate is returned, with
      `result` and `stats["reason"]` saying why the solve stopped.
    - `tags`: Lineax tags promised of ∂fn/∂y, and `nks.holomorphic_tag`.

    **Returns:** `optimistix.Solution`: `value`, `result`, `aux`, and `stats` with `num_steps`
    (accepted), `num_rejected_steps`, `num_fn_evals`, `num_linearisations`, `num_matvecs`,
    `num_transposed_matvecs`, `num_preconditioner_applications`, `num_preconditioner_updates`,
    `num_probes` (matvecs that built preconditioners), `num_linear_failures`, `residual_norm`,
    `initial_residual_norm`, `reason`, `max_steps`; `arnoldi` (for `nks.ritz_values`) and `recycled`
    of the Krylov methods that have them, `choice` of automatic ones, `num_inner_matvecs` where the
    preconditioner makes matvecs, and `history` where asked for.

    **Raises:** `TypeError`, `ValueError` or `nks.LinearisationError` for problems that are not well
    posed, before anything is solved.
    """
    if not isinstance(max_steps, int) or max_steps < 0:
        raise ValueError(f"`max_steps` must be a non-negative integer, but it is {max_steps!r}.")
    ours = isinstance(solver, AbstractRootFinder)
    if adjoint is None:
        adjoint = KrylovAdjoint() if ours else optx.ImplicitAdjoint()
    y0 = jtu.tree_map(_as_array, y0)
    if not ours or not isinstance(adjoint, AbstractImplicitAdjoint):
        # Optimistix counts the evaluation of the initial point, which is the first of our steps.
        solution = optx.root_find(
            fn, solver, y0, args, options, has_aux=has_aux, max_steps=max_steps + ours,
            adjoint=adjoint, throw=throw, tags=tags,
        )  # fmt: skip
        return eqx.tree_at(lambda s: s.stats["max_steps"], solution, max_steps)
    check_unknown(y0)
    return _root_find(
        fn, solver, y0, args, {} if options is None else options, has_aux, max_steps, adjoint,
        throw, frozenset(tags),
    )  # fmt: skip


@eqx.filter_jit
def _root_find(fn, solver, y0, args, options, has_aux, max_steps, adjoint, throw, tags):
    program, params = trace(fn, y0, args, has_aux=has_aux)
    problem = Problem(
        program=program,
        solver=stop_gradient(solver),
        linear=adjoint.resolved(solver, args, tags, throw=throw),
        reuse=adjoint.reuse_in(solver),
        y0=stop_gradient(y0),
        args=stop_gradient(args),
        options=options,
        max_steps=max_steps,
        tags=tags,
    )
    variables, aux, result, stats = root(params, problem=problem)
    if throw:
        failed = result != optx.RESULTS.successful
        variables = nan_where(stats["reason"].error_if(failed, failed), variables)
    value = eqx.combine(variables, eqx.filter(y0, eqx.is_inexact_array, inverse=True))
    solution = optx.Solution(
        value=value, result=result, aux=program.complete(aux), stats=stats, state=None
    )
    return solution


def _as_array(leaf: Any) -> Any:
    """Python floats and NumPy arrays become JAX arrays; anything else is left as it is."""
    if isinstance(leaf, (float, complex, np.ndarray, np.inexact)):
        return jnp.asarray(leaf)
    return leaf

"""What all our integrators share."""

from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from equinox import AbstractVar

from .. import tree
from ..adjoint.base import stop_gradient
from ..krylov.base import AbstractKrylovSolver
from ..linearise.linearisation import Linearisation, linearise
from ..typing import Args, Scalar, ScalarLike, Vector, Y
from .attach import Increment
from .newton import SimplifiedNewton


class AbstractStiffSolver(dfx.AbstractImplicitSolver, dfx.AbstractAdaptiveSolver):
    """A Diffrax solver of implicit stages, matrix-free forward and in reverse."""

    linear_solver: AbstractVar[AbstractKrylovSolver]
    root_finder: AbstractVar[SimplifiedNewton]
    adjoint_rtol: AbstractVar[ScalarLike | None]

    @property
    def root_find_max_steps(self) -> int:
        """Most Newton iterations of a stage; part of Diffrax's interface."""
        return self.root_finder.max_steps

    def func(self, terms: dfx.AbstractTerm, t0: Any, y0: Y, args: Args) -> Any:
        return terms.vf(t0, y0, args)


def derivative_tolerance(
    root_finder: SimplifiedNewton, adjoint_rtol: ScalarLike | None, y: Vector
) -> Scalar:
    """The relative tolerance of what derivatives are solved to."""
    dtype = tree.real_dtype(y)
    least = jnp.asarray(50 * tree.eps(y), dtype)
    if adjoint_rtol is None:
        wanted = jnp.minimum(1e-2 * jnp.asarray(root_finder.rtol), 1e-6)
    else:
        wanted = jnp.asarray(adjoint_rtol)
    return jnp.maximum(wanted.astype(dtype), least)


def linearised(increment: Increment, t: ScalarLike, y: Vector) -> Linearisation:
    """F(t, ·) at y, for what finds stages: not differentiated."""
    increment, t, y = stop_gradient((increment, t, y))
    return linearise(lambda z, _: increment(t, z), y)


def check_state(y: Y) -> None:
    """Raises for states that are not all inexact arrays."""
    for leaf in jtu.tree_leaves(y):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                "The state of a stiff solver must be floating-point or complex arrays, but a leaf "
                f"is {jax.eval_shape(lambda leaf=leaf: jnp.asarray(leaf))}. Constants belong in "
                "`args`."
            )


def result_of(successful: Any) -> dfx.RESULTS:
    """Diffrax's code; with an adaptive controller a failed step is merely rejected."""
    results: Any = dfx.RESULTS
    return results.where(successful, results.successful, results.nonlinear_divergence)

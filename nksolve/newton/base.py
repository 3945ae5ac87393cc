"""What nksolve's own drivers need of a root finder beyond Optimistix's interface."""

from typing import Any, ClassVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from equinox import AbstractVar
from jaxtyping import PyTree

from .. import tree
from ..krylov.base import AbstractKrylovSolver
from ..linearise.policies import AbstractPolicy
from ..loops import any_lane
from ..typing import Args, Aux, Fn, Norm, ScalarLike, Y
from .reuse import AbstractReuse, KeepLinearisation


class AbstractRootFinder(optx.AbstractRootFinder):
    """An Optimistix root finder that linearises through `nks.linearise` and may run batched.

    Laws beyond Optimistix's:

    - `fn` is evaluated only by `nks.linearise(fn, y, args, policy=self.policy)`, so that a driver
      may pass a residual that knows its linearisation.
    - Once a lane has terminated, `step` leaves it as it is, so that a driver may run the lanes of a
      batch in lockstep without selecting over their states.
    - The first `step` evaluates the initial point; every later one is one trial.
    """

    policy: AbstractVar[AbstractPolicy]
    linear_solver: AbstractVar[AbstractKrylovSolver]
    #: Where derivatives take their linearisation from, unless the adjoint says.
    reuse: ClassVar[AbstractReuse] = KeepLinearisation()


class AbstractWrapper(AbstractRootFinder):
    """A root finder around another, which has the other's tolerances, norm, and means."""

    solver: AbstractVar[Any]

    @property
    def rtol(self) -> ScalarLike:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the solver."""
        return self.solver.rtol

    @property
    def atol(self) -> ScalarLike:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the solver."""
        return self.solver.atol

    @property
    def norm(self) -> Norm:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the solver, for the residuals that it sees."""
        return self.solver.norm

    @property
    def policy(self) -> AbstractPolicy:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the solver."""
        return self.solver.policy

    @property
    def linear_solver(self) -> AbstractKrylovSolver:  # pyright: ignore
        """Of the solver."""
        return self.solver.linear_solver

    @property
    def reuse(self) -> AbstractReuse:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the solver."""
        return self.solver.reuse


def iterate(
    solver: AbstractRootFinder,
    fn: Fn,
    y0: Y,
    args: Args,
    options: dict[str, Any],
    *,
    max_steps: int,
    f_struct: PyTree,
    aux_struct: PyTree,
    tags: frozenset[object],
) -> tuple[Y, Aux, optx.RESULTS, dict[str, Any]]:
    """Steps until every lane has terminated or has used `max_steps` trials.

    As `optimistix.iterative_solve`, but for the predicate, which is that of the whole batch.
    """
    state = solver.init(fn, y0, args, options, f_struct, aux_struct, tags)
    aux = tree.zeros_like(aux_struct)
    carry, static = eqx.partition((y0, aux, state), eqx.is_array)

    def unfinished(loop):
        i, carry = loop
        y, _, state = eqx.combine(carry, static)
        stop, _ = solver.terminate(fn, y, args, options, state, tags)
        return any_lane(~stop) & (i <= max_steps)

    def body(loop):
        i, carry = loop
        y, _, state = eqx.combine(carry, static)
        y, state, aux = solver.step(fn, y, args, options, state, tags)
        carry, new_static = eqx.partition((y, aux, state), eqx.is_array)
        assert eqx.tree_equal(static, new_static) is True
        return i + 1, carry

    _, carry = lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), carry))
    y, aux, state = eqx.combine(carry, static)
    stop, result = solver.terminate(fn, y, args, options, state, tags)
    exhausted = (result == optx.RESULTS.successful) & ~stop
    result = optx.RESULTS.where(exhausted, optx.RESULTS.nonlinear_max_steps_reached, result)
    y, aux, stats = solver.postprocess(fn, y, aux, args, options, state, tags, result)
    return y, aux, result, {**stats, "max_steps": max_steps}


def check_square(variables: PyTree, residual: PyTree) -> None:
    """Raises where the structures of the unknowns and of the residual differ."""
    if variables == residual:
        return

    def describe(structure):
        return jtu.tree_map(lambda x: f"{x.dtype}{list(x.shape)}", structure)

    raise ValueError(
        "A root find needs as many equations as unknowns, in the same PyTree of the same shapes "
        f"and dtypes. y is {describe(variables)}, the residual is {describe(residual)}. Reshape or "
        "cast what `fn` returns to match y."
    )

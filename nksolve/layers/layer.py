"""Implicit layers: Equinox modules whose output solves an equation."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, PyTree

from .. import tree
from ..adjoint.base import stop_gradient
from ..krylov.fgmres import FGMRES
from ..krylov.gmres import GMRES
from ..krylov.ritz import ArnoldiRecord
from ..newton.base import AbstractRootFinder
from ..newton.newton_krylov import NewtonKrylov
from ..precondition.base import Identity
from ..typing import Vector
from ..verbs.fixed_point import displacement
from ..verbs.memory import recalled
from .batch import AbstractBatch, Settings, Single
from .diagnostics import ContractionEstimate, history_contraction, krylov_contraction


class LayerInfo(eqx.Module):
    """How a layer's solve went. Under a batch mode the first axis is that of the samples.

    **Attributes:**

    - `success`: whether the residual test holds at z.
    - `residual_norm`: that of the equation at z, in the solver's norm.
    - `stats`: everything that `nks.root_find` reports: `num_steps`, `num_fn_evals`, `num_matvecs`,
      `reason`, …; without a batch axis where the samples are solved together.
    - `guess_error`: mean of |guess(x) − z|², differentiable in the parameters of `guess` alone: add
      it to the loss to learn the initial guess. `None` if z₀ was given.
    - `iterates`: z after the trials that the layer was asked to record, stacked along a new axis
      (after the batch's), each with the derivative of one application of the cell; or `None`.
    - `state`: of a stateful cell, updated once after the solve; or `None`.
    - `record`: what the last Krylov solve of a Newton iteration left, where it tells of ∂cell/∂z:
      GMRES without a preconditioner; else `None`.
    - `memory`: what the next call may go on from, as `layer(x, z, memory=info.memory)`: the
      recycled space of `GCRODR`, the approximate inverse of `Broyden`; else empty.
    """

    success: Array
    residual_norm: Array
    stats: dict[str, Any]
    guess_error: Array | None
    iterates: PyTree
    state: PyTree
    record: ArnoldiRecord | None
    memory: PyTree

    def contraction(self) -> ContractionEstimate:
        """ρ(∂cell/∂z) at the root as far as the solve has seen it, at no matvec.

        From `record` (see `nks.krylov_contraction`), one estimate for each system solved, or else
        from the residuals of a plain iteration with a `history_length` (`nks.history_contraction`);
        NaN where there is neither. Test `estimate.within(0.1)`; for a number to rely on,
        `nks.spectral_radius(cell, z, x, key=key)`.
        """
        if self.record is not None:
            return _each(krylov_contraction, self.record, self.record.columns.ndim)
        history = self.stats.get("history")
        if history is not None and "arnoldi" not in self.stats:
            return _each(history_contraction, history.norm, history.norm.ndim - 1)
        nan = jnp.full_like(self.residual_norm, jnp.nan)
        return ContractionEstimate(nan, jnp.inf + 0 * nan, jnp.zeros((), jnp.int32))


class AbstractImplicitLayer(eqx.Module):
    """A layer whose output z solves an equation in z and the input x; its cell defines it."""

    cell: Callable[..., Any]
    solver: AbstractRootFinder = NewtonKrylov(1e-5, 1e-6)
    adjoint: optx.AbstractAdjoint | None = None
    batch: AbstractBatch = Single()
    guess: Callable[[Any], Any] | None = None
    max_steps: int = eqx.field(static=True, default=100, kw_only=True)
    inference_solver: AbstractRootFinder | None = eqx.field(default=None, kw_only=True)
    inference_max_steps: int | None = eqx.field(static=True, default=None, kw_only=True)
    iterates: tuple[int, ...] = eqx.field(static=True, default=(), kw_only=True)
    throw: bool = eqx.field(static=True, default=False, kw_only=True)
    tags: frozenset[object] = eqx.field(static=True, default=frozenset(), kw_only=True)
    inference: bool = eqx.field(default=False, kw_only=True)

    @abc.abstractmethod
    def equation(self) -> "AbstractEquation":
        """What z solves."""

    def __call__(
        self,
        x: Any,
        z0: Any = None,
        *,
        key: Array | None = None,
        state: Any = None,
        memory: PyTree = None,
    ) -> tuple[Any, LayerInfo]:
        """`(z, info)`.

        **Arguments:**

        - `x`: the input, any PyTree.
        - `z0`: the initial point; `guess(x)` by default. Pass the last z to start warm.
        - `key`: for cells that take one, `cell(z, x, key=key)`: the same in every evaluation of a
          solve, so that a dropout mask is frozen.
        - `state`: for stateful cells, `cell(z, x, state) -> (z, state)`: frozen during the solve,
          updated once at its end, without a derivative.
        - `memory`: that of an earlier call's `info`.
        """
        guess = None if z0 is not None else self._guessed(x)
        equation = self.equation()
        solver, max_steps = self._budget()
        cell = FrozenCell(self.cell, state)
        own = (x, None if key is None else self.batch.keys(key, x))
        solved = self.batch.solve(
            equation,
            solver,
            stop_gradient(guess if z0 is None else z0),
            cell,
            own,
            memory,
            Settings(max_steps, self.adjoint, self.throw, self.tags, self.iterates),
        )
        z = solved.value
        on_the_way = None
        if self.iterates:
            several = eqx.filter_vmap(equation.moved, in_axes=(None, eqx.if_array(0), None))
            on_the_way = self.batch.lifted(several)(cell, solved.stats["iterates"], own)
        return z, LayerInfo(
            success=solved.success,
            residual_norm=solved.residual_norm,
            stats=solved.stats,
            guess_error=None if guess is None else _mean_square(guess, stop_gradient(z)),
            iterates=on_the_way,
            state=None if state is None else self._updated(cell, z, own),
            record=_telling(solver, solved.stats),
            memory=recalled(solved.stats),
        )

    def _guessed(self, x: Any) -> Any:
        if self.guess is None:
            raise ValueError(
                "A layer without `guess` does not know the shape of z: pass `z0`, or construct it "
                "with `guess=lambda x: jnp.zeros(64)` or with a module that learns to guess."
            )
        return self.batch.lifted(lambda guess, x: guess(x))(self.guess, x)

    def _budget(self) -> tuple[AbstractRootFinder, int]:
        if not self.inference:
            return self.solver, self.max_steps
        solver, steps = self.inference_solver, self.inference_max_steps
        return (
            self.solver if solver is None else solver,
            self.max_steps if steps is None else steps,
        )

    def _updated(self, cell: "FrozenCell", z: Any, own: Any) -> Any:
        """The state after one more evaluation of the cell, at z."""
        frozen = stop_gradient((cell, z, own))
        return self.batch.lifted(FrozenCell.next_state, shared_result=True)(*frozen)


class ImplicitLayer(AbstractImplicitLayer):
    """The equilibrium layer: z with z = cell(z, x).

    The derivative is that of the solution, by the implicit function theorem: with J = ∂cell/∂z,
    reverse mode solves (I − J)ᵀλ = z̄ and returns (∂cell/∂θ)ᵀλ. What is stored does not grow with
    the number of steps.

    ```python
    layer = nks.ImplicitLayer(cell, nks.NewtonKrylov(1e-5, 1e-6), guess=lambda x: jnp.zeros(64))
    z, info = layer(x)
    ```

    **Arguments:**

    - `cell`: a module or function `cell(z, x)` of one sample, with values like z. Its parameters
      are trained through the layer, x is differentiated too; what it closes over is a constant.
    - `solver`: `nks.NewtonKrylov`, an accelerated iteration, `nks.Switching`, …; tolerances are on
      ‖cell(z, x) − z‖.
    - `adjoint`: how it is differentiated; `nks.KrylovAdjoint()` by default.
    - `batch`: what the leading axis of x and z means: `nks.Single()` (nothing), `nks.Joint()`,
      `nks.PerSample()`, `nks.Compacted()`.
    - `guess`: z₀ from x, for one sample; may be a module that is learned (`info.guess_error`).
    - `max_steps`: most trial points after the initial one.
    - `inference_solver`, `inference_max_steps`: what takes their place when `inference` holds,
      which `eqx.nn.inference_mode` sets.
    - `iterates`: trials after which z is recorded in `info.iterates`, for losses on the trajectory.
    - `throw`: raise on failure. By default the best finite iterate is returned, and `info.success`
      tells; derivatives of a failed adjoint solve are NaN unless the adjoint says otherwise.
    - `tags`: Lineax tags promised of ∂cell/∂z − I.

    Source: Bai, Kolter & Koltun, Deep equilibrium models, NeurIPS 2019.
    """

    def equation(self) -> "AbstractEquation":
        """cell(z, x) − z = 0."""
        return FixedPointEquation()


class ResidualLayer(AbstractImplicitLayer):
    """The layer whose output z solves cell(z, x) = 0.

    Reverse mode solves Jᵀλ = z̄ with J = ∂cell/∂z and returns −(∂cell/∂θ)ᵀλ. Recorded iterates
    have no derivative.

    **Arguments:** as for `nks.ImplicitLayer`; tolerances are on ‖cell(z, x)‖, `tags` are of
    ∂cell/∂z.
    """

    def equation(self) -> "AbstractEquation":
        """cell(z, x) = 0."""
        return RootEquation()


class FrozenCell(eqx.Module):
    """The cell with its state held; what the state becomes is dropped."""

    cell: Callable[..., Any]
    state: PyTree

    def __call__(self, z: Any, x: Any, key: Array | None) -> Any:
        keywords = {} if key is None else {"key": key}
        if self.state is None:
            return self.cell(z, x, **keywords)
        return self.cell(z, x, self.state, **keywords)[0]

    def next_state(self, z: Any, own: Any) -> Any:
        """What the state becomes at z."""
        x, key = own
        keywords = {} if key is None else {"key": key}
        return self.cell(z, x, self.state, **keywords)[1]


class AbstractEquation(eqx.Module):
    """What one sample's z solves, made of its cell."""

    @abc.abstractmethod
    def __call__(self, z: Any, cell: "FrozenCell", own: Any) -> Vector:
        """The residual."""

    @abc.abstractmethod
    def moved(self, cell: "FrozenCell", z: Any, own: Any) -> Any:
        """z with the derivative that an iterate is to have."""


class FixedPointEquation(AbstractEquation):
    """cell(z, x) − z = 0."""

    def __call__(self, z: Any, cell: "FrozenCell", own: Any) -> Vector:
        return displacement(cell(z, *own), z)

    def moved(self, cell: "FrozenCell", z: Any, own: Any) -> Any:
        """cell(z, x)."""
        return cell(z, *own)


class RootEquation(AbstractEquation):
    """cell(z, x) = 0."""

    def __call__(self, z: Any, cell: "FrozenCell", own: Any) -> Vector:
        return cell(z, *own)

    def moved(self, cell: "FrozenCell", z: Any, own: Any) -> Any:
        """z, without a derivative."""
        return z


def _telling(solver: AbstractRootFinder, stats: dict[str, Any]) -> ArnoldiRecord | None:
    """The Arnoldi record of J itself, where there is one."""
    method = solver.linear_solver
    bare = isinstance(method, GMRES | FGMRES) and isinstance(method.preconditioner, Identity)
    return stats.get("arnoldi") if bare else None


def _each(estimate: Callable[..., ContractionEstimate], x: Any, axes: int) -> ContractionEstimate:
    return jax.vmap(estimate)(x) if axes else estimate(x)


def _mean_square(a: Any, b: Any) -> Array:
    difference = tree.sub(eqx.filter(a, eqx.is_inexact_array), eqx.filter(b, eqx.is_inexact_array))
    return tree.vdot(difference, difference).real / max(tree.size(difference), 1)

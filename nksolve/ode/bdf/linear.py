"""W = M − γA of a BDF step, with a factorisation or a preconditioner kept from earlier steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx

from ... import tree
from ...adjoint.base import stop_gradient
from ...krylov.base import AbstractKrylovSolver
from ...krylov.direct import AbstractDirect
from ...krylov.system import KrylovState
from ...linearise.linearisation import Linearisation
from ...linearise.operator import JacobianOperator
from ...loops import any_lane
from ...precondition.base import AbstractPreconditioner, Identity, Skeleton, join, split
from ...precondition.lagged import Lagged
from ...typing import Count, Flag, Scalar, Vector
from ..linear import AbstractStageLinear, Correction, KrylovStageLinear, Stage
from .rows import undone, with_rows

# Factors are renewed with every change of the order or the step size, for that costs less than the
# iterations that they would take longer: 2.0 to 2.2 a step instead of 2.3 to 2.5 with CVODE's 0.3.
FACTORS_CHANGE = 1e-3
# An old preconditioner costs Krylov iterations, never Newton's: with CVODE's 0.3 and 20 steps there
# are nearly twice as many set-ups for a tenth fewer iterations on the diurnal kinetics.
PRECONDITIONER_CHANGE = 0.5


class OldFactors(AbstractStageLinear):
    """By the factorisation of an earlier W = I − γ_old A_old, the correction being multiplied by
    2/(1 + γ/γ_old); for a derivative's solve, by one of that W.

    Source: Hindmarsh et al., SUNDIALS, ACM Trans. Math. Softw. 31 (2005), section 2.1.
    """

    inverse: lx.AbstractLinearOperator
    solver: AbstractDirect
    stage: Stage
    factor: Scalar

    def workspace(self) -> Any:
        return None

    def correction(self, r: Vector, tolerance: Scalar, workspace: Any) -> tuple[Correction, Any]:
        del tolerance
        none = jnp.zeros((), jnp.int32)
        return Correction(tree.scale(self.factor, self.inverse.mv(r)), none, none + 1), workspace

    def at(self, operator: lx.AbstractLinearOperator, z: Vector) -> KrylovState:
        return self.solver.prepare(operator, z, self.stage)

    def tight(self, state: KrylovState, b: Vector) -> Vector:
        return state.preconditioner.mv(b)


class Keeper:
    """The linear solver of a step, whose factors or preconditioner are arrays that are carried on.

    A direct solver's A is linearised where the factors are renewed and nowhere else. A Krylov
    method's products are with the A of the step, only its preconditioner is old.
    """

    def __init__(
        self,
        solver: AbstractKrylovSolver,
        linearisation: Callable[[], Linearisation],
        matrix: Callable[[JacobianOperator], JacobianOperator],
        y: Vector,
        stage: Stage,
        *,
        scale: Vector,
        rows: Vector | None,
        adjoint_rtol: Scalar,
    ):
        operator = lambda: matrix(linearisation().operator)
        self.solver = solver.chosen(operator, y, stage)
        self.is_direct = isinstance(self.solver, AbstractDirect)
        self.kept = kept_preconditioner(self.solver)
        self._y, self._stage, self._scale = y, stage, scale
        self._adjoint_rtol = adjoint_rtol
        held = None if self.is_direct else linearisation()
        self._operator = operator if held is None else (lambda: matrix(held.operator))
        #: F at y, where it is known.
        self.value = None if held is None else stop_gradient(held.value)
        #: Weights of the rows in what `linear` solves.
        self.rows = None if self.is_direct else rows
        self._skeleton = self._shapes()[1]

    @property
    def keeps(self) -> bool:
        """Whether there is anything to renew."""
        return not isinstance(self.kept, Identity)

    def nothing(self) -> list[Any]:
        """Zeros for the arrays."""
        return tree.zeros_like(self._shapes()[0])

    def is_due(self, arrays: list[Any]) -> Flag:
        """Whether the arrays are to be renewed before they are used."""
        if not self.keeps:
            return jnp.array(False)
        return self.kept.is_due(join(arrays, self._skeleton), self._y, self._stage)

    def renewed(self, arrays: list[Any], due: Flag, is_first: Flag) -> list[Any]:
        """The arrays, made anew in the lanes where they are due."""
        if not self.keeps:
            return arrays

        def fresh():
            if _updates_by_init(self.kept):
                return self._init()
            old = join(arrays, self._skeleton)
            operator = self._operator()
            update = lambda: split(self.kept.update(old, operator, self._y, self._stage))[0]
            return lax.cond(is_first, self._init, update)

        made = lax.cond(any_lane(due), fresh, lambda: arrays)
        return tree.where(due, made, arrays)

    def linear(self, arrays: list[Any]) -> AbstractStageLinear:
        """What solves with W."""
        state = join(arrays, self._skeleton)
        inverse = self.kept.as_operator(state)
        if isinstance(self.solver, AbstractDirect):
            ratio = jnp.asarray(self._stage.gamma).astype(state.gamma.dtype) / state.gamma
            factor = jnp.where(jnp.isfinite(ratio), 2 / (1 + ratio), 1)
            linear = OldFactors(inverse, self.solver, self._stage, factor)
        else:
            operator = self._operator()
            if self.rows is not None:
                operator, inverse = with_rows(operator, self.rows), undone(inverse, self.rows)
            linear = KrylovStageLinear(
                operator, inverse, self.solver, self._scale, self._adjoint_rtol
            )
        return stop_gradient(linear)

    def after(self, arrays: list[Any], num_steps: Count) -> list[Any]:
        """The arrays to carry on after a step of so many Krylov iterations a solve."""
        if not self.keeps:
            return arrays
        state = self.kept.observe(join(arrays, self._skeleton), num_steps)
        return stop_gradient(split(state)[0])

    def _init(self) -> list[Any]:
        return split(self.kept.init(self._operator(), self._y, self._stage))[0]

    def _shapes(self) -> tuple[Any, Skeleton]:
        skeletons: list[Skeleton] = []

        def init():
            arrays, skeleton = split(self.kept.init(self._operator(), self._y, self._stage))
            skeletons.append(skeleton)
            return arrays

        shapes = jax.eval_shape(init)
        return shapes, skeletons[0]


def kept_preconditioner(solver: AbstractKrylovSolver) -> AbstractPreconditioner:
    """The solver's preconditioner, kept from step to step by rules like CVODE's.

    It serves for 50 steps, until hγ has changed too much, or until Newton's iteration fails. One
    that has an `update` of its own (`nks.Lagged` too) is left alone.
    """
    kept = solver.preconditioner
    if not kept.is_rebuilt or isinstance(kept, Identity):
        return kept
    change = FACTORS_CHANGE if isinstance(solver, AbstractDirect) else PRECONDITIONER_CHANGE
    gamma = lambda y, stage: stage.gamma
    return Lagged(kept, max_age=50, shift=gamma, max_shift_change=change)


def _updates_by_init(preconditioner: AbstractPreconditioner) -> bool:
    if isinstance(preconditioner, Lagged):
        return preconditioner.preconditioner.is_rebuilt
    return preconditioner.is_rebuilt

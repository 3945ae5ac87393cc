"""A Krylov method as the preconditioner of another."""

from typing import Any

import equinox as eqx
import lineax as lx

from .. import tree
from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..linearise.tags import holomorphic_tag
from ..precondition.base import AbstractPreconditioner, probes_where_due, update_where_due
from ..typing import Args, Count, Vector, Y
from .base import AbstractKrylovSolver
from .basis import as_real_space
from .system import KrylovState


class InnerKrylov(AbstractPreconditioner):
    """M⁻¹v = the x of a Krylov solve of J x = v, stopped at the method's own tolerance.

    Not linear: what it does depends on v. `nks.FGMRES` allows for that; methods that need one
    linear M⁻¹ do not converge with it:
    `FGMRES(preconditioner=InnerKrylov(GMRES(rtol=1e-2, max_steps=10)))`. The transpose, of which
    the adjoint makes use, is the same method on Jᵀ with its transposed preconditioner.

    **Arguments:**

    - `solver`: the inner method, with a preconditioner of its own. It stops at
      ‖v − J x‖ ≤ atol + rtol ‖v‖ or after `max_steps` iterations, whichever comes first; what it
      has then is used.

    The inner matvecs are not among `num_matvecs`, which counts those of the outer method:
    `matvecs_per_application` bounds them for each of `num_preconditioner_applications`.

    Storage: the workspace of the inner method, made anew for each application. Work: an inner
    solve for each application.

    Source: Saad, SIAM J. Sci. Comput. 14(2), 1993, section 4; van der Vorst & Vuik, Numer. Linear
    Algebra Appl. 1(4), 1994 (GMRESR).
    """

    solver: AbstractKrylovSolver

    def __check_init__(self):
        if not isinstance(self.solver, AbstractKrylovSolver):
            raise TypeError(
                "`InnerKrylov(solver)` takes one of nksolve's Krylov methods, such as "
                f"`nks.GMRES(rtol=1e-2, max_steps=10)`, but got {self.solver!r}."
            )

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> "InnerState":
        self.solver.check_operator(operator)
        return InnerState(operator, self.solver.preconditioner.init(operator, y, args))

    def update(
        self, state: "InnerState", operator: lx.AbstractLinearOperator, y: Y, args: Args
    ) -> "InnerState":
        own = update_where_due(self.solver.preconditioner, state.preconditioner, operator, y, args)
        return InnerState(operator, own)

    def as_operator(self, state: "InnerState") -> lx.AbstractLinearOperator:
        operator = state.operator
        inverse = self.solver.preconditioner.as_operator(state.preconditioner)
        holomorphic = True
        if isinstance(operator, JacobianOperator):
            holomorphic = holomorphic_tag in operator.tags
        real = as_real_space(tree.zeros_like(operator.out_structure()), holomorphic)
        linear_map = _InnerSolve(self.solver, KrylovState(operator, inverse), real)
        return JacobianOperator(linear_map, operator.out_structure(), operator.in_structure())

    def observe(self, state: "InnerState", num_steps: Count) -> "InnerState":
        own = self.solver.preconditioner.observe(state.preconditioner, num_steps)
        return InnerState(state.operator, own)

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        return self.solver.preconditioner.num_probes(operator, y, args)

    def num_update_probes(
        self, state: "InnerState", operator: lx.AbstractLinearOperator, y: Y, args: Args
    ) -> int | Count:
        return probes_where_due(self.solver.preconditioner, state.preconditioner, operator, y, args)

    def matvecs_per_application(self, operator: lx.AbstractLinearOperator) -> int:
        """At most so many: one for each iteration and restart, and those of the preconditioner."""
        size = tree.size(operator.in_structure())
        steps = getattr(self.solver, "max_steps", None)
        steps = 10 * size if steps is None else steps
        restarts = -(-steps // max(min(getattr(self.solver, "restart", steps), size), 1))
        own = self.solver.preconditioner.matvecs_per_application(operator)
        return (steps + restarts) * (1 + own)

    @property
    def is_rebuilt(self) -> bool:
        return self.solver.preconditioner.is_rebuilt

    @property
    def is_variable(self) -> bool:
        return True

    @property
    def needs_transpose(self) -> bool:
        return self.solver.needs_transpose


class InnerState(eqx.Module):
    """J, and the state of the inner method's own preconditioner."""

    operator: lx.AbstractLinearOperator
    preconditioner: Any


class _InnerSolve(AbstractLinearMap):
    """v → x with J x ≈ v; linear only in the limit of a tight tolerance."""

    solver: AbstractKrylovSolver
    state: KrylovState
    real: bool = eqx.field(static=True)

    def mv(self, vector: Vector) -> Vector:
        return self._solve(self.state, vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        return self._solve(self.state.transpose(), vector)

    def _solve(self, state: KrylovState, vector: Vector) -> Vector:
        tolerance = self.solver.tolerance(vector)
        return self.solver.run(state, vector, tolerance=tolerance, real=self.real).value

"""Flexible GMRES."""

import equinox as eqx
from jaxtyping import PyTree

from .. import tree
from ..precondition.base import AbstractPreconditioner, Identity
from ..typing import Scalar, ScalarLike, Vector
from .base import AbstractKrylovSolver, KrylovResult, LinearSystem, check_tolerances
from .basis import Basis
from .minimal_residual import Workspace, minimal_residual, restart_length
from .orthogonalise import CGS2, AbstractOrthogonalisation


class FGMRES(AbstractKrylovSolver):
    """Flexible GMRES for square A x = b with a right preconditioner that may change.

    Minimises ‖b − A x_k‖₂ over x₀ + span(Z_k), z_j = P_j⁻¹ v_j, and leaves a cycle as soon as
    ‖r_k‖ ≤ atol + rtol ‖b‖. Arguments and reports as for `nks.GMRES`, always on the right.

    Storage: 2 m + 3 vectors. Work: one matvec, one preconditioner application, two reductions an
    iteration; one matvec more per cycle.

    Source: Saad, SIAM J. Sci. Comput. 14(2), 1993, algorithm 2.2.
    """

    rtol: ScalarLike = 1e-6
    atol: ScalarLike = 0.0
    restart: int = eqx.field(static=True, default=30)
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: AbstractPreconditioner = Identity()
    orthogonalisation: AbstractOrthogonalisation = CGS2()

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        if self.restart < 1:
            raise ValueError(f"`restart` must be at least 1, but it is {self.restart}.")

    def workspace(self, vector: Vector, *, real: bool) -> PyTree:
        length = restart_length(self.restart, vector, real)
        arnoldi = Basis.allocate(vector, length + 1, real=real)
        return Workspace(arnoldi, Basis.allocate(vector, length, real=real))

    def solve(
        self,
        system: LinearSystem,
        vector: Vector,
        *,
        tolerance: ScalarLike,
        workspace: PyTree,
        norm: Scalar | None = None,
        guess: Vector | None = None,
        verify: bool = False,
    ) -> KrylovResult:
        return minimal_residual(
            system,
            vector,
            norm=norm,
            tolerance=tolerance,
            workspace=workspace,
            guess=guess,
            verify=verify,
            max_steps=10 * tree.size(vector) if self.max_steps is None else self.max_steps,
            orthogonalisation=self.orthogonalisation,
            left=False,
        )

"""Flexible GMRES."""

from typing import ClassVar

import equinox as eqx
from jaxtyping import PyTree

from ..precondition.base import AbstractPreconditioner, Identity
from ..typing import Scalar, ScalarLike, Vector
from .basis import Basis
from .minimal_residual import AbstractMinimalResidual, Workspace
from .orthogonalise import CGS2, AbstractOrthogonalisation
from .ritz import ArnoldiRecord
from .system import KrylovResult, LinearSystem


class FGMRES(AbstractMinimalResidual):
    """Flexible GMRES for square A x = b with a right preconditioner that may change.

    Minimises ‖b − A x_k‖₂ over x₀ + span(Z_k), z_j = P_j⁻¹ v_j, and leaves a cycle as soon as
    ‖r_k‖ ≤ atol + rtol ‖b‖. Arguments and reports as for `nks.GMRES`, always on the right.

    Storage: 2 m + 4 vectors (m + 4 without a preconditioner, where Z is V). Work: one matvec, one
    preconditioner application, three reductions (`CGS2`) an iteration; one matvec more per cycle.

    Source: Saad, SIAM J. Sci. Comput. 14(2), 1993, algorithm 2.2.
    """

    rtol: ScalarLike = 1e-6
    atol: ScalarLike = 0.0
    restart: int = eqx.field(static=True, default=30)
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: AbstractPreconditioner = Identity()
    orthogonalisation: AbstractOrthogonalisation = CGS2()
    side: ClassVar[str] = "right"
    is_flexible: ClassVar[bool] = True

    def workspace(self, vector: Vector, *, real: bool) -> PyTree:
        length = self._length(vector, real)
        arnoldi = Basis.allocate(vector, length + 1, real=real)
        # Without a preconditioner Z is V.
        plain = isinstance(self.preconditioner, Identity)
        search = None if plain else Basis.allocate(vector, length, real=real)
        return Workspace(arnoldi, search, ArnoldiRecord.allocate(vector, length, real=real))

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
        if system.psolve is not None and workspace.search is None:
            # The preconditioner came with the operator (`options` of `lx.linear_solve`).
            search = Basis.allocate(vector, workspace.length, real=workspace.arnoldi.real)
            workspace = Workspace(workspace.arnoldi, search, workspace.record)
        return super().solve(
            system,
            vector,
            tolerance=tolerance,
            workspace=workspace,
            norm=norm,
            guess=guess,
            verify=verify,
        )

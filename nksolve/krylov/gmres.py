"""GMRES."""

from typing import Literal

import equinox as eqx
from jaxtyping import PyTree

from .. import tree
from ..precondition.base import AbstractPreconditioner, Identity
from ..typing import Scalar, ScalarLike, Vector
from .base import AbstractKrylovSolver, KrylovResult, LinearSystem, check_tolerances
from .basis import Basis
from .minimal_residual import Workspace, minimal_residual, restart_length
from .orthogonalise import CGS2, AbstractOrthogonalisation


class GMRES(AbstractKrylovSolver):
    """Restarted GMRES for square A x = b.

    Minimises ‖b − A x_k‖₂ over x₀ + M⁻¹ K_k(A M⁻¹, r₀) and leaves a cycle as soon as
    ‖r_k‖ ≤ atol + rtol ‖b‖. The true residual is recomputed at each restart, and once more before
    success is reported to `lx.linear_solve`.

    **Arguments:**

    - `rtol`, `atol`: tolerances of a solve by `lx.linear_solve` and of the adjoint. Newton passes
      its forcing term instead.
    - `restart`: length m of a cycle.
    - `max_steps`: at most this many iterations in all; 10 n by default.
    - `preconditioner`: see `nks.AbstractPreconditioner`.
    - `side`: `"right"` leaves the residual that is minimised and tested as it is; `"left"`
      minimises and tests ‖M⁻¹(b − A x)‖₂ relative to ‖M⁻¹b‖₂.
    - `orthogonalisation`: `nks.CGS2()` or `nks.MGS()`.

    Reports `max_steps_reached`; `stagnation` when a whole cycle reduced the true residual by less
    than √ε of itself (singular A, or a tolerance below the rounding level); `breakdown` when A v is
    not finite.

    Storage: m + 3 vectors. Work: one matvec, one preconditioner application, two reductions an
    iteration; per cycle one matvec and one preconditioner application more.

    Source: Saad & Schultz, SIAM J. Sci. Stat. Comput. 7(3), 1986; right preconditioning: Saad,
    Iterative Methods for Sparse Linear Systems, 2nd ed., algorithm 9.5.
    """

    rtol: ScalarLike = 1e-6
    atol: ScalarLike = 0.0
    restart: int = eqx.field(static=True, default=30)
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: AbstractPreconditioner = Identity()
    side: Literal["left", "right"] = eqx.field(static=True, default="right")
    orthogonalisation: AbstractOrthogonalisation = CGS2()

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        if self.restart < 1:
            raise ValueError(f"`restart` must be at least 1, but it is {self.restart}.")
        if self.side not in ("left", "right"):
            raise ValueError(f"`side` must be 'left' or 'right', but it is {self.side!r}.")

    def workspace(self, vector: Vector, *, real: bool) -> PyTree:
        rows = restart_length(self.restart, vector, real) + 1
        return Workspace(Basis.allocate(vector, rows, real=real), None)

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
            left=self.side == "left",
        )

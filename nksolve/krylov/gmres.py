"""GMRES."""

from typing import Literal

import equinox as eqx
from jaxtyping import PyTree

from ..precondition.base import AbstractPreconditioner, Identity
from ..typing import ScalarLike, Vector
from .basis import Basis
from .minimal_residual import AbstractMinimalResidual, Workspace
from .orthogonalise import CGS2, AbstractOrthogonalisation
from .ritz import ArnoldiRecord


class GMRES(AbstractMinimalResidual):
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
      minimises and tests ‖M⁻¹(b − A x)‖₂ relative to ‖M⁻¹b‖₂, and reports ‖b − A x‖₂ all the
      same, at one matvec a solve.
    - `orthogonalisation`: `nks.CGS2()` or `nks.MGS()`.

    Reports `max_steps_reached`; `stagnation` when a whole cycle reduced the true residual by less
    than √ε of itself (singular A, or a tolerance below the rounding level); `breakdown` when A v is
    not finite.

    Storage: m + 1 vectors of the basis, and b, x, the x before the last cycle: m + 4. Work: one
    matvec, one preconditioner application, three reductions (`CGS2`) an iteration; per cycle one
    matvec and one preconditioner application more.

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

    def workspace(self, vector: Vector, *, real: bool) -> PyTree:
        length = self._length(vector, real)
        arnoldi = Basis.allocate(vector, length + 1, real=real)
        return Workspace(arnoldi, None, ArnoldiRecord.allocate(vector, length, real=real))

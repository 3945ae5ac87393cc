"""GCRO-DR: GMRES that recycles a space from cycle to cycle and from solve to solve."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .. import tree
from ..precondition.base import AbstractPreconditioner, Identity
from ..typing import Scalar, ScalarLike, Vector
from .basis import Basis
from .cycle import Workspace
from .minimal_residual import AbstractMinimalResidual
from .orthogonalise import CGS2, AbstractOrthogonalisation
from .recycling import RecycledSpace, Space
from .ritz import ArnoldiRecord
from .system import KrylovResult, LinearSystem


class GCRODR(AbstractMinimalResidual):
    """Flexible GCRO-DR for square A x = b: GMRES with a recycled space of k search directions.

    Keeps U and C with A U = C and CᴴC = I, minimises ‖b − A x‖₂ over x₀ + span(U, Z) with Z from
    the Arnoldi process of (I − C Cᴴ) A M⁻¹, and leaves a cycle as soon as ‖r‖ ≤ atol + rtol ‖b‖.
    After each cycle U becomes the k smallest harmonic Ritz vectors of the space searched. For the
    next operator, in a Newton method the next Jacobian, A U is computed anew in one batched
    application, C by its QR factorisation.

    **Arguments:**

    - `rtol`, `atol`, `max_steps`, `preconditioner`, `orthogonalisation`: as for `nks.GMRES`, the
      preconditioner on the right, and free to change from one iteration to the next.
    - `restart`: length m of a cycle, in Arnoldi steps.
    - `recycle`: k < m, how many vectors are kept; with 0 this is (flexible) GMRES.
    - `recycled`: start from the space of another solve, its `stats["recycled"]`: of any operator
      and right-hand side with vectors of the same shapes, the same `recycle`, and a `restart` that
      leaves as many.

    Reports as `nks.GMRES`; `stats["recycled"]` is the space after the solve. Raises `ValueError`
    for `recycle` ≥ `restart` and for a space that does not fit.

    Storage: m + 2 k + 4 vectors without preconditioner, as GMRES(m + 2 k); with one 2 m + 2 k + 4,
    as FGMRES(m + k); 2 k more while the space is renewed. Work: one matvec, one application of
    M⁻¹, three reductions (`CGS2`) an iteration; one matvec and three reductions more a cycle;
    k matvecs more a solve that begins with a space. Each cycle solves a nonsymmetric eigenproblem
    of order m + k in LAPACK; on a TPU, which has none, the right singular vectors of least singular
    values take the place of the harmonic Ritz vectors.

    Source: Parks, de Sturler, Mackey, Johnson & Maiti, SIAM J. Sci. Comput. 28(5), 2006; flexible:
    Carvalho, Gratton, Lago & Vasseur, SIAM J. Matrix Anal. Appl. 32(4), 2011.
    """

    rtol: ScalarLike = 1e-6
    atol: ScalarLike = 0.0
    restart: int = eqx.field(static=True, default=30)
    recycle: int = eqx.field(static=True, default=10)
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: AbstractPreconditioner = Identity()
    orthogonalisation: AbstractOrthogonalisation = CGS2()
    recycled: RecycledSpace | None = None
    side: ClassVar[str] = "right"
    is_flexible: ClassVar[bool] = True

    def __check_init__(self):
        if not 0 <= self.recycle < self.restart:
            raise ValueError(
                f"`recycle` must be at least 0 and less than `restart` = {self.restart}, but it is "
                f"{self.recycle}: a cycle must bring more vectors than are kept of it."
            )

    def workspace(self, vector: Vector, *, real: bool) -> PyTree:
        length = self._length(vector, real)
        size = self._kept(length)
        record = ArnoldiRecord.allocate(vector, length, real=real)
        # Without a preconditioner Z is V, and only U is stored beside it.
        rows = size if isinstance(self.preconditioner, Identity) else size + length
        search = Basis.allocate(vector, rows, real=real) if rows else None
        arnoldi = Basis.allocate(vector, size + length + 1, real=real)
        if size == 0:
            return Workspace(arnoldi, search, record, None)
        space = Space.empty(size, record.matrix.dtype)
        return self._with_space(Workspace(arnoldi, search, record, space), vector)

    def report(self, workspace: PyTree) -> dict[str, Any]:
        space = None
        if workspace.space is not None:
            k = workspace.recycled
            space = RecycledSpace(
                workspace.search.head(k),
                workspace.arnoldi.head(k),
                workspace.space.overlap,
                workspace.space.alive,
            )
        return {"arnoldi": workspace.record, "recycled": space}

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
        allocated, search = workspace, workspace.search
        rows = workspace.recycled + workspace.length
        if system.psolve is not None and (search is None or search.size < rows):
            # The preconditioner came with the operator (`options` of `lx.linear_solve`).
            larger = Basis.allocate(vector, rows, real=workspace.arnoldi.real)
            if search is not None:
                larger = larger.with_head(search.head(workspace.recycled))
            workspace = Workspace(workspace.arnoldi, larger, workspace.record, workspace.space)
        out = super().solve(
            system,
            vector,
            tolerance=tolerance,
            workspace=workspace,
            norm=norm,
            guess=guess,
            verify=verify,
        )
        if workspace is allocated:
            return out
        if search is not None:
            search = search.with_head(out.workspace.search.head(workspace.recycled))
        left = out.workspace
        return out._replace(workspace=Workspace(left.arnoldi, search, left.record, left.space))

    def for_derivatives(self) -> "GCRODR":
        return self.starting_from(None)  # what a solve began with; its own space is better

    def starting_from(self, space: RecycledSpace | None) -> "GCRODR":
        """The same method with `recycled=space`."""
        none = lambda x: x is None
        return eqx.tree_at(lambda s: s.recycled, self, space, is_leaf=none)

    def fits(self, space: Any, vector: Vector, *, real: bool) -> bool:
        """Whether `space` can be the `recycled` of a solve with right-hand sides like `vector`."""
        size = self._kept(self._length(vector, real))
        if not isinstance(space, RecycledSpace) or space.size != size:
            return False
        shapes = jtu.tree_map(lambda x: (size, *x.shape), vector)
        given = jtu.tree_map(lambda x: x.shape, space.search)
        return shapes == given

    def _with_space(self, workspace: Workspace, vector: Vector) -> Workspace:
        space = self.recycled
        if space is None:
            return workspace
        search, real = workspace.search, workspace.arnoldi.real
        if search is None or not self.fits(space, vector, real=real):
            described = jtu.tree_map(lambda x: f"{x.dtype}{list(x.shape)}", tree.structure(vector))
            raise ValueError(
                "`recycled` does not fit this solve: it must be the `stats['recycled']` of a solve "
                f"by `GCRODR` that kept {workspace.recycled} vectors like {described}. Pass "
                "`recycled=None` to start without a space."
            )
        dtype = workspace.record.matrix.dtype
        overlap = space.overlap
        overlap = (overlap if jnp.issubdtype(dtype, jnp.complexfloating) else overlap.real).astype(
            dtype
        )
        image = _cast(space.image, vector)
        return Workspace(
            workspace.arnoldi.with_head(image),
            search.with_head(_cast(space.search, vector)),
            workspace.record,
            Space(overlap, space.alive),
        )

    def _kept(self, length: int) -> int:
        """`recycle`, cut to less than a cycle."""
        return min(self.recycle, length - 1)


def _cast(rows: Vector, vector: Vector) -> Vector:
    return jtu.tree_map(lambda x, like: x.astype(like.dtype), rows, vector)

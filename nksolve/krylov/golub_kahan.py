"""The right vectors of a Golub–Kahan process, kept, and its bidiagonal matrix."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .. import tree
from ..typing import Count, Flag, Scalar, Vector
from .basis import Basis
from .cycle import Workspace
from .ritz import ArnoldiRecord
from .system import LinearSystem


def allocated(vector: Vector, size: int, *, real: bool, plain: bool) -> Workspace:
    """Room for the first `size` vectors V like `vector` (as many as it has entries at most), for Z
    unless the process is `plain`, and for B, where A Z = U B with B lower bidiagonal."""
    entries = tree.size(vector)
    halves = 2 if real and tree.scalar_dtype(vector) != tree.real_dtype(vector) else 1
    size = max(min(size, halves * entries), 1)
    basis = Basis.allocate(vector, size, real=real)
    search = None if plain else Basis.allocate(vector, size, real=real)
    matrix = jnp.zeros((size + 1, size), tree.real_dtype(vector))
    return Workspace(basis, search, ArnoldiRecord(matrix, jnp.zeros((), jnp.int32)))


def begun(workspace: Workspace | None, zero: Vector, size: int, system: LinearSystem) -> Workspace:
    """Of no columns; another one where it is not of the space of x, as of a rectangular system."""
    plain = system.psolve is None
    if workspace is None or not _fits(workspace, zero, plain):
        workspace = allocated(zero, size, real=system.real, plain=plain)
    record = tree.zeros_like(workspace.record)
    return Workspace(workspace.arnoldi, workspace.search, record)


def _fits(workspace: Workspace, zero: Vector, plain: bool) -> bool:
    rows = workspace.arnoldi.blocks[0]
    row = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)
    return plain == (workspace.search is None) and row == tree.structure(zero)


def orthogonalised(workspace: Workspace | None, w: Vector, column: Count) -> Vector:
    """w made orthogonal to the first `column` vectors that are kept, if any; twice is enough."""
    if workspace is None:
        return w
    basis = workspace.arnoldi
    filled = jnp.clip(column, 0, basis.size)
    for _ in range(2):
        w = tree.sub(w, basis.combine(basis.dots(w, filled), filled))
    return w


def extended(
    workspace: Workspace | None,
    column: Count,
    v: Vector,
    z: Vector,
    alpha: Scalar,
    beta: Scalar,
    writing: Flag,
) -> Workspace | None:
    """With v_k, z_k = M⁻¹v_k, α_k and β_{k+1} of that column, where there is room and `writing`."""
    if workspace is None:
        return None
    size, matrix = workspace.arnoldi.size, workspace.record.matrix
    writing = writing & (column < size)
    at = jnp.clip(column, 0, size - 1)

    def put(basis: Basis, vector: Vector) -> Basis:
        return basis.set_row(at, tree.where(writing, vector, basis.row(at)))

    search = workspace.search
    columns = jnp.where(writing, column + 1, workspace.record.columns)
    record = ArnoldiRecord(jnp.where(writing, _with(matrix, at, alpha, beta), matrix), columns)
    return Workspace(put(workspace.arnoldi, v), None if search is None else put(search, z), record)


def _with(matrix: Array, column: Count, alpha: Scalar, beta: Scalar) -> Array:
    """B with that column, and none beyond it."""
    i = jnp.arange(matrix.shape[0], dtype=jnp.int32)[:, None]
    j = jnp.arange(matrix.shape[1], dtype=jnp.int32)[None]
    entries = jnp.where(i == j, alpha, jnp.where(i == j + 1, beta, jnp.zeros_like(beta)))
    matrix = jnp.where(j < column, matrix, jnp.zeros_like(matrix))
    return jnp.where(j == column, entries.astype(matrix.dtype), matrix)

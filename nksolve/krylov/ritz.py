"""Ritz values: what the last cycle of an Arnoldi process says of the spectrum."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Complex, Inexact

from .. import tree
from ..typing import Count, Vector


class ArnoldiRecord(eqx.Module):
    """The Hessenberg matrix of the last cycle: A Z = V H̄ on its first `columns` columns.

    `matrix` is H̄, (m + 1) × m; its other columns are zero. With M⁻¹ on the right Z is M⁻¹V,
    and H̄ belongs to A M⁻¹; on the left to M⁻¹A. In `nks.GCRODR` it belongs to (I − C Cᴴ) A M⁻¹, the
    operator without the recycled space. `columns` is 0 before the first solve.

    Storage: m (m + 1) numbers.
    """

    matrix: Inexact[Array, "rows columns"]
    columns: Count

    @staticmethod
    def of(matrix: Inexact[Array, "rows columns"], columns: Count) -> "ArnoldiRecord":
        """H̄ with what lies beyond its columns cleared."""
        inside = jnp.arange(matrix.shape[1], dtype=jnp.int32) < columns
        return ArnoldiRecord(jnp.where(inside[None], matrix, jnp.zeros_like(matrix)), columns)

    @staticmethod
    def allocate(vector: Vector, length: int, *, real: bool) -> "ArnoldiRecord":
        """Of no columns yet and at most `length`, for vectors like `vector`."""
        dtype = tree.real_dtype(vector) if real else tree.scalar_dtype(vector)
        return ArnoldiRecord(jnp.zeros((length + 1, length), dtype), jnp.zeros((), jnp.int32))


def ritz_values(record: ArnoldiRecord) -> Complex[Array, " columns"]:
    """The eigenvalues of H = VᴴA Z, by increasing modulus; NaN beyond the columns of the record.

    They approximate eigenvalues of the (preconditioned) operator, first the extreme ones: its
    largest |1 − λ| estimates the contraction of y ← y − M⁻¹F(y). They are eigenvalues once the
    space is invariant.

    **Arguments:**

    - `record`: `stats["arnoldi"]` of a solve with `nks.GMRES`, `nks.FGMRES` or `nks.GCRODR`; under
      `vmap` one record a lane: `jax.vmap(ritz_values)(record)`.

    Work: one m × m eigenproblem (LAPACK on the CPU, also for a GPU; none for a TPU).

    Source: Saad, Numerical Methods for Large Eigenvalue Problems, 2nd ed., algorithm 6.1.
    """
    square, _ = _square(record)
    return _eigenvalues(square, record.columns)


def harmonic_ritz_values(record: ArnoldiRecord) -> Complex[Array, " columns"]:
    """The harmonic Ritz values of the record, by increasing modulus; NaN beyond its columns.

    Eigenvalues of H + |h_{j+1,j}|² H⁻ᴴ e_j e_jᴴ, which are the roots of GMRES' residual polynomial.
    They lie outside the holes of the spectrum about 0 where Ritz values may fall into them.
    Arguments and work as `ritz_values`; NaN where H is singular.

    Source: Morgan, SIAM J. Sci. Comput. 24(1), 2002, equation (2.2).
    """
    square, below = _square(record)
    last = jnp.arange(square.shape[0], dtype=jnp.int32) == record.columns - 1
    unit = last.astype(square.dtype)
    # Beyond the columns H is completed by ones, which leaves H⁻ᴴ e_j there zero.
    identity = jnp.eye(square.shape[0], dtype=square.dtype)
    inside = _inside(record)
    completed = jnp.where(inside, square, identity)
    direction = jnp.linalg.solve(completed.conj().T, unit)
    update = (below * below.conj()) * direction[:, None] * unit[None, :]
    return _eigenvalues(square + update, record.columns)


def _inside(record: ArnoldiRecord) -> Array:
    inside = jnp.arange(record.matrix.shape[1], dtype=jnp.int32) < record.columns
    return inside[:, None] & inside[None, :]


def _square(record: ArnoldiRecord) -> tuple[Array, Array]:
    """(H, zero beyond the columns; h_{j+1,j} of the last one)."""
    inside = _inside(record)
    square = jnp.where(inside, record.matrix[:-1], jnp.zeros_like(record.matrix[:-1]))
    j = jnp.maximum(record.columns - 1, 0)
    below = record.matrix[j + 1, j]
    return square, below


def _eigenvalues(square: Array, columns: Count) -> Array:
    # Padded by a diagonal outside the spectrum, whose moduli come last.
    size = square.shape[0]
    bound = jnp.sqrt(jnp.sum((square * square.conj()).real))
    bound = jnp.where(bound > 0, bound, jnp.ones_like(bound))
    outside = jnp.arange(size, dtype=jnp.int32) >= columns
    padding = jnp.where(outside, 4 * bound, jnp.zeros_like(bound)).astype(square.dtype)
    values = jnp.linalg.eigvals(square + jnp.diag(padding))
    values = values[jnp.argsort(jnp.abs(values))]
    return jnp.where(outside, jnp.full_like(values, jnp.nan), values)

"""The Hessenberg least-squares problem of GMRES, by its left null vector.

H̄ is (j+2) × (j+1), upper Hessenberg. The vector u with uᴴ H̄ = 0 and u₀ = 1 spans the orthogonal
complement of the range of H̄, so that the residual of min ‖β e₁ − H̄ y‖ is (β/‖u‖²) u. Hence

    ‖r_j‖ = β / ‖u‖            one inner product a step, no rotations
    T y = −(β/‖u‖²) u₁:        at the end of a cycle, T = H̄ without its first row (triangular)

Source: Ayachour, J. Comput. Appl. Math. 159, 2003, §3.
"""

from typing import NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

from ..typing import Count, Flag, Scalar


class Column(NamedTuple):
    """What a new column of H̄ does to the least-squares problem."""

    square: Scalar  # |u_{j+1}|², the growth of ‖u‖²
    dependent: Flag  # the column lies in the range of the others, to rounding


class Hessenberg(eqx.Module):
    """Column j holds column j of H̄ and, below it, u_{j+1}. Columns not in use hold anything."""

    packed: Inexact[Array, "rows columns"]

    @staticmethod
    def empty(restart: int, dtype: np.dtype) -> "Hessenberg":
        """Of at most `restart` columns."""
        return Hessenberg(jnp.zeros((restart + 2, restart), dtype))

    def extended(
        self, j: Count, h: Inexact[Array, " rows"], norm: Scalar, scale: Scalar, null_square: Scalar
    ) -> tuple["Hessenberg", Column]:
        """With column j: entries `h` above the subdiagonal `norm` ≥ 0.

        `scale` is the norm of the vector that the column came from, `null_square` is ‖u‖² before.
        A vanishing subdiagonal is floored at ε scale: a backward-stable perturbation that keeps T
        regular and ‖u‖² finite.
        """
        eps = jnp.finfo(norm.dtype).eps
        subdiagonal = jnp.maximum(norm, eps * scale)
        subdiagonal = jnp.where(subdiagonal > 0, subdiagonal, 1).astype(h.dtype)
        # uᴴ h + conj(u_{j+1}) h_{j+1,j} = 0
        product = jnp.sum(self.null.conj() * h)
        u = -product.conj() / subdiagonal
        rows = jnp.arange(self.packed.shape[0], dtype=jnp.int32)
        column = jnp.where(rows == j + 1, subdiagonal, jnp.pad(h, (0, 1)))
        column = jnp.where(rows == rows[-1], u, column)
        packed = lax.dynamic_update_index_in_dim(self.packed, column, j, 1)
        # Without a subdiagonal and with uᴴh = 0 the column reduces nothing: A is singular on the
        # invariant space that has been reached.
        invisible = jnp.abs(product) <= 100 * eps * jnp.sqrt(null_square) * scale
        return Hessenberg(packed), Column((u * u.conj()).real, invisible)

    @property
    def null(self) -> Inexact[Array, " rows"]:
        """u."""
        return jnp.concatenate([jnp.ones((1,), self.packed.dtype), self.packed[-1]])

    @property
    def matrix(self) -> Inexact[Array, "rows columns"]:
        """H̄, of one row more than columns."""
        return self.packed[:-1]

    def solve(
        self, beta: Scalar, null_square: Scalar, columns: Count, filled: Count
    ) -> Inexact[Array, " columns"]:
        """The minimiser y of ‖β e₁ − H̄ y‖ over the first `columns`; zero beyond.

        `filled` ≥ `columns` bounds the back substitution; the same for every lane of a batch.
        """
        rhs = -(beta / null_square).astype(self.packed.dtype) * self.packed[-1]

        def substitute(k, y):
            i = filled - 1 - k
            row = lax.dynamic_index_in_dim(self.packed, i + 1, 0, keepdims=False)
            entry = (rhs[i] - jnp.sum(row * y)) / row[i]
            return y.at[i].set(jnp.where(i < columns, entry, jnp.zeros_like(entry)))

        return lax.fori_loop(0, filled, substitute, jnp.zeros_like(rhs))

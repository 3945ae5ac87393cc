"""The Hessenberg least-squares problem of GMRES, by its left null vector.

H̄ is (j+2) × (j+1), upper Hessenberg. The vector u with uᴴ H̄ = 0 and u₀ = 1 spans the orthogonal
complement of the range of H̄, so that the residual of min ‖β e₁ − H̄ y‖ is (β/‖u‖²) u. Hence

    ‖r_j‖ = β / ‖u‖            one inner product a step, no rotations
    T y = −(β/‖u‖²) u₁:        at the end of a cycle, T = H̄ without its first row (triangular)

Source: Ayachour, J. Comput. Appl. Math. 159, 2003, §3.
"""

import equinox as eqx
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
from jaxtyping import Array, Inexact

from ..typing import Count, Flag, Scalar


class Hessenberg(eqx.Module):
    """H̄, u and ‖u‖² of a cycle; `columns` of them are in use."""

    matrix: Inexact[Array, "rows columns"]
    null: Inexact[Array, " rows"]
    null_square: Scalar
    columns: Count

    @staticmethod
    def empty(restart: int, dtype: np.dtype) -> "Hessenberg":
        """No columns."""
        matrix = jnp.zeros((restart + 1, restart), dtype)
        null = jnp.zeros((restart + 1,), dtype).at[0].set(1)
        return Hessenberg(matrix, null, jnp.ones((), null.real.dtype), jnp.zeros((), jnp.int32))

    def cleared(self, when: Flag) -> "Hessenberg":
        """Without columns `when` the flag holds; the matrix is left to be overwritten."""
        first = jnp.zeros_like(self.null).at[0].set(1)
        return Hessenberg(
            self.matrix,
            jnp.where(when, first, self.null),
            jnp.where(when, jnp.ones_like(self.null_square), self.null_square),
            jnp.where(when, jnp.zeros_like(self.columns), self.columns),
        )

    def extended(
        self,
        j: Count,
        h: Inexact[Array, " rows"],
        subdiagonal: Scalar,
        scale: Scalar,
        when: Flag,
    ) -> "Hessenberg":
        """With column j: entries `h` above, `subdiagonal` = h_{j+1,j} ≥ 0 below.

        `scale` is the norm of the vector that the column came from. A vanishing subdiagonal is
        floored at ε scale: a backward-stable perturbation that keeps T regular and ‖u‖² finite.
        """
        eps = jnp.finfo(subdiagonal.dtype).eps
        floored = jnp.maximum(subdiagonal, eps * scale)
        floored = jnp.where(floored > 0, floored, jnp.ones_like(floored))
        below = jnp.arange(self.null.shape[0], dtype=jnp.int32) == j + 1
        column = jnp.where(below, floored.astype(h.dtype), h)
        column = jnp.where(when, column, self.matrix[:, j])
        # uᴴ h + conj(u_{j+1}) h_{j+1,j} = 0
        product = jnp.sum(jnp.where(below, jnp.zeros_like(h), self.null.conj() * h))
        u_new = -product.conj() / floored.astype(h.dtype)
        extended = jnp.where(below, u_new, self.null)
        return Hessenberg(
            self.matrix.at[:, j].set(column),
            jnp.where(when, extended, self.null),
            jnp.where(when, self.null_square + (u_new * u_new.conj()).real, self.null_square),
            jnp.where(when, self.columns + 1, self.columns),
        )

    def dependent(self, h: Inexact[Array, " rows"], scale: Scalar) -> Flag:
        """Whether a column `h` without subdiagonal lies in the range of H̄, to rounding.

        Then uᴴh = 0: A is singular on the invariant space that has been reached, and the column
        reduces nothing.
        """
        product = jnp.abs(jnp.sum(self.null.conj() * h))
        eps = jnp.finfo(scale.dtype).eps
        return product <= 100 * eps * jnp.sqrt(self.null_square) * scale

    def residual_norm(self, beta: Scalar) -> Scalar:
        """min_y ‖β e₁ − H̄ y‖."""
        return beta / jnp.sqrt(self.null_square)

    def solve(self, beta: Scalar) -> Inexact[Array, " columns"]:
        """The minimiser y; zero beyond the columns in use."""
        index = jnp.arange(self.matrix.shape[1], dtype=jnp.int32)
        used = index < self.columns
        identity = jnp.eye(self.matrix.shape[1], dtype=self.matrix.dtype)
        upper = jnp.where(used[:, None] & used[None, :], self.matrix[1:], identity)
        residual = (beta / self.null_square).astype(self.null.dtype) * self.null[1:]
        return jsp.linalg.solve_triangular(upper, jnp.where(used, -residual, 0))

    def image(self, y: Inexact[Array, " columns"]) -> Inexact[Array, " rows"]:
        """H̄ y."""
        used = jnp.arange(self.matrix.shape[1], dtype=jnp.int32) < self.columns
        return self.matrix @ jnp.where(used, y, jnp.zeros_like(y))

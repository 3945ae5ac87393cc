"""The least-squares problem of the newest differences: a QR factorisation that slides along."""

import abc
import functools as ft
from typing import NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from .. import tree
from ..typing import Count, Flag, Scalar, Vector


class Factor(NamedTuple):
    """R of the columns, the newest first, and Qᵀf; unused columns are those of the identity.

    The leading k × k block of R is the factor of the k newest columns, and that of R⁻¹ its inverse.
    """

    triangle: Float[Array, "m m"]
    inverse: Float[Array, "m m"]
    rhs: Float[Array, " m"]  # zero where unused
    used: Bool[Array, " m"]

    @property
    def solution(self) -> Float[Array, " m"]:
        """γ = argmin ‖f − ΔF γ‖₂, zero where unused."""
        return _product(self.inverse, self.rhs)


class AbstractColumnFilter(eqx.Module):
    """Says which columns of a least-squares problem are of use.

    Laws: none that is unused comes back; those that stay are independent in the working precision.
    """

    @abc.abstractmethod
    def __call__(
        self, triangle: Float[Array, "m m"], rhs: Float[Array, " m"], used: Array, eps: float
    ) -> Factor:
        """What is left of R and Qᵀf; `eps` is the unit round-off."""


class ConditionFilter(AbstractColumnFilter):
    """Drops the oldest columns until κ(ΔF) ≤ `limit`.

    κ is that of the columns scaled to length one, in the Frobenius norm: between the least
    condition number that a scaling attains and m times that. Steps that shrink by orders of
    magnitude are no reason to forget the long ones.

    **Arguments:**

    - `limit`: ε^(−1/2) by default, 7e7 in float64 and 3e3 in float32.

    Source: Walker & Ni, SIAM J. Numer. Anal. 49, 2011, section 4 (for the columns as they are).
    """

    limit: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.limit is not None and not self.limit >= 1:
            raise ValueError(f"`limit` bounds a condition number, but it is {self.limit}.")

    def __call__(
        self, triangle: Float[Array, "m m"], rhs: Float[Array, " m"], used: Array, eps: float
    ) -> Factor:
        return _well_conditioned(triangle, rhs, used, _limit(self.limit, eps))


class AngleFilter(AbstractColumnFilter):
    """Drops the columns at an angle of less than arcsin `sine` to the span of the newer ones.

    Unlike `ConditionFilter` it drops single columns from among the others, at the price of a second
    small QR factorisation. What is left meets the default `ConditionFilter` as well.

    Source: Pollock & Rebholz, SIAM J. Sci. Comput. 45, 2023 (filtering by angle).
    """

    sine: float = eqx.field(static=True, default=0.1)

    def __check_init__(self):
        if not 0 < self.sine < 1:
            raise ValueError(f"`sine` must be between 0 and 1, but it is {self.sine}.")

    def __call__(
        self, triangle: Float[Array, "m m"], rhs: Float[Array, " m"], used: Array, eps: float
    ) -> Factor:
        used = used & (jnp.abs(jnp.diagonal(triangle)) >= self.sine * _lengths(triangle))
        # What is dropped becomes a direction of its own, so that the others keep their order.
        own = jnp.where(used, 0, jnp.eye(used.size, dtype=triangle.dtype))
        matrix = jnp.concatenate([jnp.where(used, triangle, 0), own])
        triangle, rhs = _factorised(matrix, jnp.concatenate([rhs, jnp.zeros_like(rhs)]))
        return _well_conditioned(triangle, rhs, used, _limit(None, eps))


class Window(eqx.Module):
    """Up to m pairs (Δf, Δx), and the QR factorisation of the Δf, whose Q is never formed.

    Q = ΔF R⁻¹ is applied through R⁻¹. A new column is projected twice, with a residual that is
    recomputed as a long vector, so that R does not lose half its digits as the Cholesky factor of
    ΔFᵀΔF does. The R of the next window is that of an m × m matrix, of the new column's coordinates
    beside the old R: with the newest column first, the oldest falls off the end. Rows are a ring,
    and nothing long moves when a column goes; rotating a Q that is stored costs as much as all else
    together.

    Storage: 2 m vectors. Work: `append` reads the Δf four times, `combine` the Δx once.
    """

    residuals: Vector  # Δf, each leaf as (m, size)
    steps: Vector  # Δx
    triangle: Float[Array, "m m"]
    inverse: Float[Array, "m m"]
    used: Bool[Array, " m"]  # newest first
    count: Count  # columns so far, those of no use included; the same in every lane

    @staticmethod
    def allocate(vector: Vector, size: int) -> "Window":
        """No columns, for up to `size` like `vector`."""
        rows = jtu.tree_map(lambda x: jnp.zeros((size, x.size), x.dtype), vector)
        eye = jnp.eye(size, dtype=tree.real_dtype(vector))
        return Window(rows, rows, eye, eye, jnp.zeros((size,), bool), jnp.zeros((), jnp.int32))

    @property
    def size(self) -> int:
        """m."""
        return self.used.shape[0]

    def append(
        self, df: Vector, dx: Vector, f: Vector, usable: Flag, columns: AbstractColumnFilter
    ) -> tuple["Window", Factor]:
        """Takes in a pair, drops the m-th oldest, and factorises, with f as the right-hand side.

        Where not `usable` the place stays empty. Real arithmetic: coefficients are Re⟨·, ·⟩.
        """
        m = self.size
        df, dx, f = (jtu.tree_map(jnp.ravel, v) for v in (df, dx, f))
        df, dx = (tree.where(usable, v, tree.zeros_like(v)) for v in (df, dx))
        kept = lax.slice_in_dim(self.used, 0, m - 1)
        old, inverse = (
            lax.slice(square, (0, 0), (m - 1, m - 1)) for square in (self.triangle, self.inverse)
        )
        # A row of zeros at the place of the new column, so that it has the coefficient zero.
        places = self._places(self.count - 1)
        old_inverse = jnp.concatenate([inverse, jnp.zeros((1, m - 1), inverse.dtype)])

        def coordinates(v):
            products = jnp.take(_dots(self.residuals, v), places, axis=0)
            return _product(jnp.where(kept, products[: m - 1], 0), inverse)

        along = coordinates(df)
        weights = _product(old_inverse, along)
        w = tree.sub(df, _combined(self.residuals, weights, places))
        again, along_f = coordinates(w), coordinates(f)
        # What the second subtraction would leave of w, which is small beside w.
        square = _dot(w, w) - jnp.sum(again * again)
        length = jnp.sqrt(jnp.maximum(square, 0))
        beyond = (_dot(w, f) - jnp.sum(again * along_f)) / jnp.where(length > 0, length, 1)
        whole = jnp.sum(along * along) + square
        usable = usable & (whole > 0) & jnp.isfinite(whole)
        spike = jnp.concatenate([along + again, length[None]])
        spike = jnp.where(usable, spike, jnp.zeros_like(spike).at[m - 1].set(1))
        block = jnp.concatenate([old, jnp.zeros((1, m - 1), old.dtype)])
        triangle, rhs = _factorised(
            jnp.concatenate([spike[:, None], block], axis=1),
            jnp.concatenate([along_f, jnp.where(usable & (length > 0), beyond, 0)[None]]),
        )
        used = jnp.concatenate([usable[None], kept])
        factor = columns(triangle, rhs, used, tree.eps(f))
        # Selected by what was read from the rows, so that they are written after it, in place.
        df = tree.where(factor.used[0], df, tree.zeros_like(df))
        new = Window(
            _written(self.residuals, self.count % m, df),
            _written(self.steps, self.count % m, dx),
            factor.triangle,
            factor.inverse,
            factor.used,
            self.count + 1,
        )
        return new, factor

    def combine(self, weights: Float[Array, " m"], like: Vector) -> Vector:
        """Σ weightsⱼ Δxⱼ, from the newest on, in the shapes of `like`."""
        out = _combined(self.steps, weights, self._places(self.count - 1))
        return jtu.tree_map(lambda x, y: jnp.reshape(x, y.shape), out, like)

    def products(self, dx: Vector) -> Float[Array, " m"]:
        """⟨Δxⱼ, dx⟩, from the newest on."""
        products = _dots(self.steps, jtu.tree_map(jnp.ravel, dx))
        return jnp.take(products, self._places(self.count - 1), axis=0)

    def emptied(self, flag: Flag) -> "Window":
        """Without its columns where the flag holds."""
        eye = jnp.eye(self.size, dtype=self.triangle.dtype)
        return Window(
            self.residuals,
            self.steps,
            jnp.where(flag, eye, self.triangle),
            jnp.where(flag, eye, self.inverse),
            self.used & ~flag,
            self.count,
        )

    def _places(self, newest: Count) -> Array:
        """The row of each column; a permutation that is its own inverse."""
        return (newest - jnp.arange(self.size, dtype=jnp.int32)) % self.size


def _dot(a: Vector, b: Vector) -> Scalar:
    return tree.vdot(a, b).real


def _dots(rows: Vector, vector: Vector) -> Float[Array, " m"]:
    """Re⟨rowᵢ, vector⟩."""
    dtype = tree.real_dtype(vector)

    def dots(r, x):
        dims = (((1,), (0,)), ((), ()))
        out = lax.dot_general(r.conj(), x, dims, precision=lax.Precision.HIGHEST)
        return out.real.astype(dtype)

    return ft.reduce(jnp.add, jtu.tree_leaves(jtu.tree_map(dots, rows, vector)))


def _combined(rows: Vector, weights: Float[Array, " m"], places: Array) -> Vector:
    """Σ weightsⱼ rowⱼ, with column j in row placesⱼ."""
    weights = jnp.take(weights, places, axis=0)

    def combination(r):
        dims = (((0,), (0,)), ((), ()))
        return lax.dot_general(weights.astype(r.dtype), r, dims, precision=lax.Precision.HIGHEST)

    return jtu.tree_map(combination, rows)


def _written(rows: Vector, i: Count, vector: Vector) -> Vector:
    return jtu.tree_map(lambda b, x: lax.dynamic_update_index_in_dim(b, x, i, 0), rows, vector)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _limit(limit: float | None, eps: float) -> float:
    return eps**-0.5 if limit is None else limit


def _lengths(triangle: Float[Array, "m m"]) -> Float[Array, " m"]:
    return jnp.sqrt(jnp.sum(triangle * triangle, axis=0))


def _factorised(matrix: Array, rhs: Array) -> tuple[Array, Array]:
    """R and Qᵀ rhs, cut to the columns of the matrix, by one factorisation of both."""
    m = matrix.shape[1]
    triangle = jnp.linalg.qr(jnp.concatenate([matrix, rhs[:, None]], axis=1), mode="r")
    return triangle[:m, :m], triangle[:m, m]


def _well_conditioned(triangle: Array, rhs: Array, used: Array, limit: float) -> Factor:
    """As many of the newest columns as keep κ_F of the unit columns within the limit."""
    eye = jnp.eye(used.size, dtype=triangle.dtype)
    upto = jnp.triu(jnp.ones_like(eye))  # cumulative sums as products, which compile to less
    lengths = _lengths(triangle)
    # The sine of the angle to the newer ones bounds κ from below; without zeros, R is invertible.
    dependent = ~(jnp.abs(jnp.diagonal(triangle)) * limit >= lengths) | ~jnp.isfinite(lengths)
    newest = _product(dependent.astype(eye.dtype), upto) == 0
    inverse = jsl.solve_triangular(jnp.where(newest, triangle, eye), eye)
    scaled = inverse * jnp.where(newest, lengths, 1)[:, None]
    squares = jnp.where(used, jnp.sum(scaled * scaled, axis=0), 0)
    square = _product(squares, upto) * _product(used.astype(eye.dtype), upto)
    # One column alone is never ill-conditioned, whatever rounding says.
    newest = newest & ((square <= limit**2) | (jnp.arange(used.size) == 0))
    return Factor(
        jnp.where(newest, triangle, eye),
        jnp.where(newest, inverse, eye),
        jnp.where(newest & used, rhs, 0),
        used & newest,
    )

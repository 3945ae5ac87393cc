"""Sparse matrices of algebraic multigrid in JAX: fixed layouts, products, maps to R A P."""

import abc
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, Int

from ..linearise.operator import AbstractLinearMap
from ..linearise.sparsity import Pattern
from .cycle import AbstractBridge

# A layout in columns is unrolled: so many of them at most, and at most so many times the entries.
_MOST_COLUMNS = 24
_MOST_PADDING = 3.0


class AbstractLayout(eqx.Module):
    """Where the entries of a sparse matrix stand, in the order in which a product reads them."""

    @abc.abstractmethod
    def arrange(self, values: Inexact[Array, " nnz"]) -> Inexact[Array, "..."]:
        """The entries, given in the order of the matrix, in that of the layout."""

    @abc.abstractmethod
    def mv(self, stored: Inexact[Array, "..."], x: Inexact[Array, " n"]) -> Inexact[Array, " m"]:
        """A x for the entries `arrange` returned."""


class Columns(AbstractLayout):
    """k arrays with an entry of each row, short rows filled up with zeros.

    The sum over k is written out, so that XLA makes one loop over the rows of it: for the
    five-point stencil on 127² nodes 53 µs, against 303 µs for a sum over an axis, 143 µs for a
    segment sum, 115 µs for `jax.experimental.sparse.BCOO` and 202 µs for SciPy (float64, two busy
    cores).
    """

    cols: Int[Array, "k m"]
    places: Int[Array, "k m"] | None

    def arrange(self, values: Inexact[Array, " nnz"]) -> Inexact[Array, "k m"]:
        assert self.places is not None
        return values.at[self.places].get(mode="fill", fill_value=0)

    def mv(self, stored: Inexact[Array, "k m"], x: Inexact[Array, " n"]) -> Inexact[Array, " m"]:
        total = jnp.zeros((self.cols.shape[1],), x.dtype)
        for entries, cols in zip(stored, self.cols, strict=True):
            total = total + entries * x.at[cols].get(mode="promise_in_bounds")
        return total


class Segments(AbstractLayout):
    """Entry after entry by rows, for rows of very different lengths."""

    rows: Int[Array, " nnz"]
    cols: Int[Array, " nnz"]
    places: Int[Array, " nnz"] | None
    num_rows: int = eqx.field(static=True)

    def arrange(self, values: Inexact[Array, " nnz"]) -> Inexact[Array, " nnz"]:
        assert self.places is not None
        return values.at[self.places].get(mode="promise_in_bounds", unique_indices=True)

    def mv(self, stored: Inexact[Array, " nnz"], x: Inexact[Array, " n"]) -> Inexact[Array, " m"]:
        products = stored * x.at[self.cols].get(mode="promise_in_bounds")
        return jax.ops.segment_sum(
            products, self.rows, num_segments=self.num_rows, indices_are_sorted=True
        )


def layout(rows: np.ndarray, cols: np.ndarray, num_rows: int) -> AbstractLayout:
    """A layout of the entries (rows[k], cols[k]), in any order."""
    order = np.argsort(rows, kind="stable")
    lengths = np.bincount(rows, minlength=num_rows)
    k = int(lengths.max(initial=0))
    if k == 0 or k > _MOST_COLUMNS or k * num_rows > _MOST_PADDING * rows.size + 64:
        return segments(rows, cols, num_rows)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    i = rows[order]
    within = np.arange(rows.size) - starts[i]
    places = np.full((k, num_rows), rows.size)
    table = np.zeros((k, num_rows), np.int32)
    places[within, i], table[within, i] = order, cols[order]
    return Columns(_int32(table), _int32(places))


def segments(rows: np.ndarray, cols: np.ndarray, num_rows: int) -> Segments:
    """The entries one after the other."""
    order = np.argsort(rows, kind="stable")
    return Segments(_int32(rows[order]), _int32(cols[order]), _int32(order), num_rows)


class Fixed(eqx.Module):
    """A sparse matrix whose entries do not change."""

    layout: AbstractLayout
    stored: Float[Array, "..."]

    def mv(self, x: Inexact[Array, " n"]) -> Inexact[Array, " m"]:
        """A x, in the dtype of x."""
        return self.layout.mv(self.stored.astype(x.dtype), x)


def fixed(where: AbstractLayout, weights: np.ndarray) -> Fixed:
    """The matrix with those entries there."""
    stored = where.arrange(jnp.asarray(weights))
    return Fixed(dataclasses.replace(where, places=None), stored)  # pyright: ignore


class SparseBridge(AbstractBridge):
    """R and P as sparse matrices, with their transposes."""

    restriction: Fixed
    prolongation: Fixed
    restriction_t: Fixed
    prolongation_t: Fixed

    def restrict(self, vector: Inexact[Array, " n"]) -> Inexact[Array, " m"]:
        return self.restriction.mv(vector)

    def prolong(self, vector: Inexact[Array, " m"]) -> Inexact[Array, " n"]:
        return self.prolongation.mv(vector)

    def transpose(self) -> AbstractBridge:
        return SparseBridge(
            self.prolongation_t, self.restriction_t, self.prolongation, self.restriction
        )


class SparseMap(AbstractLinearMap):
    """x → A x for the matrix of a coarse level."""

    values: Inexact[Array, " nnz"]
    stored: Inexact[Array, "..."]
    rows: AbstractLayout
    cols: AbstractLayout

    def mv(self, vector: Inexact[Array, " n"]) -> Inexact[Array, " n"]:
        return self.rows.mv(self.stored, vector)

    def transpose_mv(self, vector: Inexact[Array, " n"]) -> Inexact[Array, " n"]:
        return self.cols.mv(self.cols.arrange(self.values), vector)


class SparseLevel(eqx.Module):
    """What is fixed of a level: the places of A (by columns too, but on the finest one, which is
    not multiplied with), the bridge down from it, and the linear maps from
    the entries of A to those of A P, and from these to those of R A P."""

    rows: AbstractLayout
    cols: AbstractLayout | None
    diagonal: Int[Array, " n"]
    bridge: SparseBridge
    times_p: Fixed
    times_r: Fixed

    @property
    def size(self) -> int:
        """The number of unknowns."""
        return self.diagonal.size

    def coarse(self, values: Inexact[Array, " nnz"]) -> Inexact[Array, " nnz_coarse"]:
        """The entries of R A P."""
        return self.times_r.mv(self.times_p.mv(values))

    def matrix(self, values: Inexact[Array, " nnz"]) -> SparseMap:
        """A with those entries; of a level that is not the finest."""
        assert self.cols is not None
        return SparseMap(values, self.rows.arrange(values), self.rows, self.cols)

    def scaling(self, values: Inexact[Array, " nnz"]) -> tuple[Array, Array]:
        """1/a_ii (1 where a_ii = 0), and the largest row sum of |D⁻¹A|: a bound of its spectral
        radius."""
        diagonal = values.at[self.diagonal].get(mode="fill", fill_value=0)
        one = jnp.ones_like(diagonal)
        inverse = one / jnp.where(diagonal == 0, one, diagonal)
        sizes = jnp.abs(values)
        sums = self.rows.mv(self.rows.arrange(sizes), jnp.ones(self.size, sizes.dtype))
        return inverse, jnp.max(sums * jnp.abs(inverse), initial=1e-30)


def sparse_level(pattern: Pattern, p: Any, r: Any, is_finest: bool) -> tuple[SparseLevel, Pattern]:
    """The level of a matrix with that pattern and the SciPy matrices P and R; the pattern of the
    next one. All in NumPy, once."""
    n, m = p.shape
    rows, cols = pattern.rows.astype(np.int64), pattern.cols.astype(np.int64)
    # A P by rows; then R B = (Bᵀ Rᵀ)ᵀ with B = A P.
    b_rows, b_cols, times_p = _times(rows, cols, p.tocsr())
    c_cols, c_rows, times_r = _times(b_cols, b_rows, r.T.tocsr())
    coarse = Pattern(c_rows, c_cols, m)
    # `Pattern` sorts by rows, `_times` did by columns here.
    order = np.lexsort((c_cols, c_rows))
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    to, places, weights = times_r
    diagonal = np.full(n, rows.size)
    on = np.flatnonzero(rows == cols)
    diagonal[rows[on]] = on
    bridge = _bridge(p.tocoo(), r.tocoo(), (r != p.T).nnz == 0)
    level = SparseLevel(
        layout(rows, cols, n),
        None if is_finest else layout(cols, rows, n),
        _int32(diagonal),
        bridge,
        # By segments, a wall for XLA's fusion: of one gather into the other, over all levels, it
        # would compute what is gathered anew for each of the products (seven times the time).
        fixed(segments(*times_p[:2], b_rows.size), times_p[2]),
        fixed(segments(rank[to], places, c_rows.size), weights),
    )
    return level, coarse


def _bridge(p: Any, r: Any, is_transpose: bool) -> SparseBridge:
    n, m = p.shape
    prolongation = fixed(layout(p.row, p.col, n), p.data)
    restriction = fixed(layout(r.row, r.col, m), r.data)
    if is_transpose:
        return SparseBridge(restriction, prolongation, prolongation, restriction)
    restriction_t = fixed(layout(r.col, r.row, n), r.data)
    return SparseBridge(
        restriction, prolongation, restriction_t, fixed(layout(p.col, p.row, m), p.data)
    )


def _times(
    rows: np.ndarray, cols: np.ndarray, p: Any
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The places of A P, sorted by rows, for A with those places, and as a matrix (rows, columns,
    weights) the map from the entries of A to those of A P: (A P)_iJ = Σ_j a_ij p_jJ."""
    lengths = np.diff(p.indptr)[cols]
    place = np.repeat(np.arange(cols.size), lengths)
    first = np.cumsum(lengths) - lengths
    at = np.repeat(p.indptr[cols] - first, lengths) + np.arange(place.size)
    width = max(p.shape[1], 1)
    key, to = np.unique(rows[place] * width + p.indices[at], return_inverse=True)
    return key // width, key % width, (to.reshape(-1), place, p.data[at])


def _int32(x: np.ndarray) -> Array:
    return jnp.asarray(x.astype(np.int32))

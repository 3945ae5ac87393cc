"""The vectors of an Arnoldi process over a PyTree, stored row by row."""

import functools as ft
import itertools as it
from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Inexact

from .. import tree
from ..typing import Count, Vector

# Where blocks of rows end, for vectors of at least so many entries. A pass reads whole blocks: the
# first, short one serves loose solves, which stop early. Each block compiles its own products, and
# costs a pass one more vector to add up, so there are few, and small vectors have one.
_BLOCKED_FROM = 8192
_BLOCK_ENDS = (8, 32, 64)


class Basis(eqx.Module):
    """`size` vectors v₀, …, of the space of a PyTree, each leaf stored as `(rows, *leaf.shape)`.

    Rows are split into a few blocks, each a buffer of its own, so that inner products and
    combinations cost no more than the blocks that hold filled rows. Rows from `filled` on may hold
    anything finite: their coefficients are masked. Storage: `size` vectors.

    `real` says that the space counts as a real one: coefficients are Re⟨v, x⟩ also where leaves
    are complex (ℂⁿ as ℝ²ⁿ, for maps that are only real-linear).
    """

    blocks: tuple[Vector, ...]
    real: bool = eqx.field(static=True)

    @staticmethod
    def allocate(vector: Vector, size: int, *, real: bool) -> "Basis":
        """A basis of zero vectors like `vector`."""
        ends = _BLOCK_ENDS if tree.size(vector) >= _BLOCKED_FROM else ()
        bounds = [0, *(end for end in ends if end < size), size]
        rows = [end - start for start, end in it.pairwise(bounds)]
        blocks = [
            jtu.tree_map(lambda x, r=r: jnp.zeros((r, *x.shape), x.dtype), vector) for r in rows
        ]
        return Basis(tuple(blocks), real)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows in each block."""
        return tuple(jtu.tree_leaves(block)[0].shape[0] for block in self.blocks)

    @property
    def size(self) -> int:
        """Rows in all."""
        return sum(self.sizes)

    def row(self, i: Count) -> Vector:
        """vᵢ."""
        out = None
        for start, rows, block in self._located():
            local = jnp.clip(i - start, 0, rows - 1)
            here = jtu.tree_map(lambda b, k=local: lax.dynamic_index_in_dim(b, k, 0, False), block)
            out = here if out is None else tree.where(i >= start, here, out)
        return out

    def set_row(self, i: Count, vector: Vector) -> "Basis":
        """The basis with vᵢ replaced, in place where the compiler may."""
        if len(self.blocks) == 1:
            return Basis((_write(self.blocks[0], i, vector),), self.real)
        blocks = []
        for start, rows, block in self._located():
            local = jnp.clip(i - start, 0, rows - 1)
            inside = (i >= start) & (i < start + rows)
            old = jtu.tree_map(lambda b, k=local: lax.dynamic_index_in_dim(b, k, 0, False), block)
            blocks.append(_write(block, local, tree.where(inside, vector, old)))
        return Basis(tuple(blocks), self.real)

    def dots(self, vector: Vector, filled: Count) -> Inexact[Array, " rows"]:
        """⟨vᵢ, vector⟩ for i < filled, zero beyond. One reduction."""
        products = self._over_filled(filled, lambda blocks: self._dots(blocks, vector))
        return jnp.where(
            jnp.arange(self.size, dtype=jnp.int32) < filled, products, jnp.zeros_like(products)
        )

    def combine(self, coefficients: Inexact[Array, " rows"], filled: Count) -> Vector:
        """Σ cᵢ vᵢ, for coefficients that are zero from `filled` on."""
        return self._over_filled(filled, lambda blocks: self._combine(blocks, coefficients))

    def head(self, count: int) -> Vector:
        """The first `count` rows, stacked."""
        out = None
        for start, rows, block in self._located():
            wanted = min(rows, count - start)
            if wanted <= 0:
                break
            part = jtu.tree_map(lambda b, r=wanted: lax.slice_in_dim(b, 0, r), block)
            out = part if out is None else jtu.tree_map(_stacked, out, part)
        return out

    def with_head(self, rows: Vector) -> "Basis":
        """The basis whose first rows are `rows`."""
        count = jtu.tree_leaves(rows)[0].shape[0]
        blocks = []
        for start, size, block in self._located():
            part = jtu.tree_map(lambda x, s=start, n=size: x[s : min(s + n, count)], rows)
            blocks.append(_write_rows(block, part) if start < count else block)
        return Basis(tuple(blocks), self.real)

    def products(self, rows: Vector) -> Inexact[Array, "rows columns"]:
        """⟨vᵢ, rowⱼ⟩ for all stacked `rows`, whatever is filled. One reduction."""
        parts = [gram(block, rows, real=self.real) for block in self.blocks]
        return jnp.concatenate(parts)

    def combinations(self, coefficients: Inexact[Array, "rows columns"]) -> Vector:
        """Σᵢ cᵢⱼ vᵢ for all j, stacked."""
        total, start = None, 0
        for rows, block in zip(self.sizes, self.blocks, strict=True):
            part = combined(block, lax.slice_in_dim(coefficients, start, start + rows))
            total = part if total is None else tree.add(total, part)
            start += rows
        return total

    def _over_filled(self, filled: Count, fn: Callable):
        if len(self.blocks) == 1:
            return fn(self.blocks)
        bounds = list(it.accumulate(self.sizes))[:-1]
        needed = sum((filled > bound).astype(jnp.int32) for bound in bounds)
        branches = [ft.partial(fn, self.blocks[: n + 1]) for n in range(len(self.blocks))]
        return lax.switch(needed, branches)

    def _dots(self, blocks: tuple[Vector, ...], vector: Vector) -> Inexact[Array, " rows"]:
        dtype = tree.real_dtype(vector) if self.real else tree.scalar_dtype(vector)

        def dot(rows, x):
            axes = tuple(range(x.ndim))
            rows_axes = tuple(axis + 1 for axis in axes)
            out = lax.dot_general(
                rows.conj(), x, ((rows_axes, axes), ((), ())), precision=lax.Precision.HIGHEST
            )
            return (out.real if self.real else out).astype(dtype)

        parts = [
            ft.reduce(jnp.add, jtu.tree_leaves(jtu.tree_map(dot, block, vector)))
            for block in blocks
        ]
        missing = self.size - sum(part.shape[0] for part in parts)
        return jnp.concatenate([*parts, jnp.zeros((missing,), dtype)])

    def _combine(self, blocks: tuple[Vector, ...], coefficients: Array) -> Vector:
        total, start = None, 0
        for block, rows in zip(blocks, self.sizes, strict=False):
            c = lax.slice_in_dim(coefficients, start, start + rows)

            def combination(b, c=c):
                return lax.dot_general(
                    c.astype(b.dtype), b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST
                )

            part = jtu.tree_map(combination, block)
            total = part if total is None else tree.add(total, part)
            start += rows
        return total

    def _located(self):
        starts = [0, *it.accumulate(self.sizes)]
        return zip(starts, self.sizes, self.blocks, strict=False)


def _write(block: Vector, i: Count, vector: Vector) -> Vector:
    return jtu.tree_map(lambda b, x: lax.dynamic_update_index_in_dim(b, x, i, 0), block, vector)


def _write_rows(block: Vector, rows: Vector) -> Vector:
    return jtu.tree_map(lambda b, x: lax.dynamic_update_slice_in_dim(b, x, 0, 0), block, rows)


def _stacked(a: Array, b: Array) -> Array:
    return jnp.concatenate([a, b])


def gram(a: Vector, b: Vector, *, real: bool) -> Inexact[Array, "rows columns"]:
    """⟨aᵢ, bⱼ⟩ of stacked vectors: over the reals, their real parts."""
    dtype = tree.real_dtype(a) if real else tree.scalar_dtype(a)

    def products(x, y):
        axes = tuple(range(1, x.ndim))
        out = lax.dot_general(
            x.conj(), y, ((axes, axes), ((), ())), precision=lax.Precision.HIGHEST
        )
        return (out.real if real else out).astype(dtype)

    return ft.reduce(jnp.add, jtu.tree_leaves(jtu.tree_map(products, a, b)))


def combined(rows: Vector, coefficients: Inexact[Array, "rows columns"]) -> Vector:
    """Σᵢ cᵢⱼ rowᵢ for all j, stacked."""

    def combination(x):
        c = coefficients.astype(x.dtype)
        return lax.dot_general(c, x, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)

    return jtu.tree_map(combination, rows)


def as_real_space(vector: Vector, holomorphic: bool) -> bool:
    """Whether inner products over `vector` are real: always for real leaves."""
    leaves = jax.tree_util.tree_leaves(vector)
    return not (holomorphic and leaves and all(jnp.iscomplexobj(leaf) for leaf in leaves))

"""Transfer between a grid and the next coarser one, axis by axis.

A class here is one axis with its boundary: how a line of nodes is coarsened, how a correction is
prolonged (P), how a residual is restricted (R), both with their exact transposes, and how the
unknown itself moves between grids. A d-dimensional grid is a tuple of d of them, and its operators
are tensor products: each axis in turn. All are slices, shifts and interleavings, which XLA fuses
with their neighbours.
"""

import abc
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Inexact

from ..typing import Vector

Line: TypeAlias = Inexact[Array, "..."]


class AbstractTransfer(eqx.Module):
    """One axis of a grid. `u` stands for values on the coarse grid, `v` for values on the fine one.

    Laws: `prolong_transpose` and `restrict_transpose` are the transposes, exactly; P, and the
    transfer of the unknown, reproduce constants away from Dirichlet boundaries.
    """

    @abc.abstractmethod
    def coarse(self, n: int) -> int | None:
        """Nodes of the next coarser grid of one with n; `None` where there is none."""

    @abc.abstractmethod
    def prolong(self, u: Line, axis: int) -> Line:
        """P u: a correction on the fine grid."""

    @abc.abstractmethod
    def prolong_transpose(self, v: Line, axis: int) -> Line:
        """Pᵀ v."""

    def restrict(self, v: Line, axis: int) -> Line:
        """R v: a residual on the coarse grid; ½ Pᵀ v unless a class says otherwise."""
        return 0.5 * self.prolong_transpose(v, axis)

    def restrict_transpose(self, u: Line, axis: int) -> Line:
        """Rᵀ u."""
        return 0.5 * self.prolong(u, axis)

    @abc.abstractmethod
    def sample(self, v: Line, axis: int) -> Line:
        """The unknown on the coarse grid: its value at a node, or its mean over a cell."""

    @abc.abstractmethod
    def interpolate(self, u: Line, axis: int) -> Line:
        """The unknown on the fine grid, by cubic polynomials that ask nothing of the boundary
        values: extrapolated there, or wrapped where the axis is periodic. Exact for cubics (for
        degree n − 1 on n < 4 nodes)."""


class VertexDirichlet(AbstractTransfer):
    """Interior nodes only, boundary values prescribed: n = 2^k − 1 → (n − 1)/2.

    P interpolates linearly, with corrections that are zero on the boundary; R = ½Pᵀ is full
    weighting (¼, ½, ¼).
    """

    def coarse(self, n: int) -> int | None:
        return (n - 1) // 2 if n % 2 == 1 and n > 1 else None

    def prolong(self, u: Line, axis: int) -> Line:
        twice = _repeated(u, axis)
        return 0.5 * (_padded(twice, 1, 0, axis) + _padded(twice, 0, 1, axis))

    def prolong_transpose(self, v: Line, axis: int) -> Line:
        n = v.shape[axis]
        before, at, after = (_every_other(v, i, n - 2 + i, axis) for i in range(3))
        return at + 0.5 * (before + after)

    def sample(self, v: Line, axis: int) -> Line:
        return lax.slice_in_dim(v, 1, v.shape[axis] - 1, 2, axis)

    def interpolate(self, u: Line, axis: int) -> Line:
        n = u.shape[axis]
        middle = _midpoints(_extrapolated(u, 2, axis), axis)
        return _part(_interleaved(middle, _padded(u, 0, 1, axis), axis), 0, 2 * n + 1, axis)


class VertexPeriodic(AbstractTransfer):
    """Nodes of a periodic axis: n = 2^k → n/2. P interpolates linearly, R = ½Pᵀ."""

    def coarse(self, n: int) -> int | None:
        return _half(n)

    def prolong(self, u: Line, axis: int) -> Line:
        twice = _repeated(u, axis)
        return 0.5 * (twice + jnp.roll(twice, -1, axis))

    def prolong_transpose(self, v: Line, axis: int) -> Line:
        even, odd = _split(v, axis)
        return even + 0.5 * (odd + jnp.roll(odd, 1, axis))

    def sample(self, v: Line, axis: int) -> Line:
        return lax.slice_in_dim(v, 0, v.shape[axis], 2, axis)

    def interpolate(self, u: Line, axis: int) -> Line:
        inner = u + jnp.roll(u, -1, axis)
        outer = jnp.roll(u, 1, axis) + jnp.roll(u, -2, axis)
        return _interleaved(u, 0.5625 * inner - 0.0625 * outer, axis)


class VertexNeumann(AbstractTransfer):
    """Nodes with both ends, where the flux is prescribed: n = 2^k + 1 → (n + 1)/2.

    For finite differences whose boundary rows are scaled as those inside (a mirrored neighbour).
    P interpolates linearly; R is full weighting of the mirrored residual, (½, ½) at an end: ½Pᵀ
    between spaces in which an end node counts one half.
    """

    def coarse(self, n: int) -> int | None:
        return _half_open(n)

    def prolong(self, u: Line, axis: int) -> Line:
        return _prolong_closed(u, axis)

    def prolong_transpose(self, v: Line, axis: int) -> Line:
        return _prolong_closed_transpose(v, axis)

    def restrict(self, v: Line, axis: int) -> Line:
        return 0.5 * _ends(_prolong_closed_transpose(_ends(v, 0.5, axis), axis), 2.0, axis)

    def restrict_transpose(self, u: Line, axis: int) -> Line:
        return 0.5 * _ends(_prolong_closed(_ends(u, 2.0, axis), axis), 0.5, axis)

    def sample(self, v: Line, axis: int) -> Line:
        return lax.slice_in_dim(v, 0, v.shape[axis], 2, axis)

    def interpolate(self, u: Line, axis: int) -> Line:
        return _interpolate_closed(u, axis)


class VertexNatural(AbstractTransfer):
    """As `VertexNeumann` for weak forms (finite elements or volumes), whose boundary rows stand for
    half a cell: R = ½Pᵀ."""

    def coarse(self, n: int) -> int | None:
        return _half_open(n)

    def prolong(self, u: Line, axis: int) -> Line:
        return _prolong_closed(u, axis)

    def prolong_transpose(self, v: Line, axis: int) -> Line:
        return _prolong_closed_transpose(v, axis)

    def sample(self, v: Line, axis: int) -> Line:
        return lax.slice_in_dim(v, 0, v.shape[axis], 2, axis)

    def interpolate(self, u: Line, axis: int) -> Line:
        return _interpolate_closed(u, axis)


class CellDirichlet(AbstractTransfer):
    """Cells, values prescribed on the outer faces: n → n/2.

    P interpolates linearly, (¾, ¼), a correction's mirror image beyond the boundary being its
    negative; R = ½Pᵀ.
    """

    def coarse(self, n: int) -> int | None:
        return _half(n)

    def prolong(self, u: Line, axis: int) -> Line:
        return _prolong_cells(u, *_mirrored(u, u, -1.0, axis), axis)

    def prolong_transpose(self, v: Line, axis: int) -> Line:
        even, odd = _split(v, axis)
        left, right = _mirrored(odd, even, -1.0, axis)
        return 0.75 * (even + odd) + 0.25 * (left + right)

    def sample(self, v: Line, axis: int) -> Line:
        return 0.5 * _sum_pairs(v, axis)

    def interpolate(self, u: Line, axis: int) -> Line:
        return _cubic_cells(_extrapolated(u, 2, axis), axis)


class CellNeumann(AbstractTransfer):
    """Cells, fluxes prescribed on the outer faces: n → n/2.

    As `CellDirichlet`, the mirror image being the correction itself.
    """

    def coarse(self, n: int) -> int | None:
        return _half(n)

    def prolong(self, u: Line, axis: int) -> Line:
        return _prolong_cells(u, *_mirrored(u, u, 1.0, axis), axis)

    def prolong_transpose(self, v: Line, axis: int) -> Line:
        even, odd = _split(v, axis)
        left, right = _mirrored(odd, even, 1.0, axis)
        return 0.75 * (even + odd) + 0.25 * (left + right)

    def sample(self, v: Line, axis: int) -> Line:
        return 0.5 * _sum_pairs(v, axis)

    def interpolate(self, u: Line, axis: int) -> Line:
        return _cubic_cells(_extrapolated(u, 2, axis), axis)


class CellPeriodic(AbstractTransfer):
    """Cells of a periodic axis: n → n/2. P interpolates linearly, (¾, ¼); R = ½Pᵀ."""

    def coarse(self, n: int) -> int | None:
        return _half(n)

    def prolong(self, u: Line, axis: int) -> Line:
        return _prolong_cells(u, jnp.roll(u, 1, axis), jnp.roll(u, -1, axis), axis)

    def prolong_transpose(self, v: Line, axis: int) -> Line:
        even, odd = _split(v, axis)
        return 0.75 * (even + odd) + 0.25 * (jnp.roll(odd, 1, axis) + jnp.roll(even, -1, axis))

    def sample(self, v: Line, axis: int) -> Line:
        return 0.5 * _sum_pairs(v, axis)

    def interpolate(self, u: Line, axis: int) -> Line:
        n = u.shape[axis]
        wide = jnp.take(u, np.arange(-2, n + 2) % n, axis)
        return _cubic_cells(wide, axis)


class CellConstant(AbstractTransfer):
    """Cells with any boundary, n → n/2: P is piecewise constant and R, the mean, is ½Pᵀ.

    Less accurate than linear interpolation: the orders of P and R add up to no more than that of a
    second-order equation. For first-order equations and for coefficients that jump.
    """

    def coarse(self, n: int) -> int | None:
        return _half(n)

    def prolong(self, u: Line, axis: int) -> Line:
        return _repeated(u, axis)

    def prolong_transpose(self, v: Line, axis: int) -> Line:
        return _sum_pairs(v, axis)

    def sample(self, v: Line, axis: int) -> Line:
        return 0.5 * _sum_pairs(v, axis)

    def interpolate(self, u: Line, axis: int) -> Line:
        return _cubic_cells(_extrapolated(u, 2, axis), axis)


#: A grid: one transfer an axis.
Grid: TypeAlias = tuple[AbstractTransfer, ...]


def over_axes(grid: Grid, method: Callable[..., Line], vector: Vector) -> Vector:
    """`method(transfer, values, axis)` along the leading axes of each leaf, one after the other."""

    def leaf(x):
        for axis, transfer in enumerate(grid):
            x = method(transfer, x, axis)
        return x

    return jtu.tree_map(leaf, vector)


def coarse_shape(grid: Grid, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of a leaf on the next coarser grid; `None` unless every axis can be coarsened."""
    coarse = [t.coarse(n) for t, n in zip(grid, shape, strict=False)]
    found = [n for n in coarse if n is not None]
    return (*found, *shape[len(grid) :]) if len(found) == len(grid) else None


def _half(n: int) -> int | None:
    return n // 2 if n % 2 == 0 and n > 0 else None


def _half_open(n: int) -> int | None:
    return (n + 1) // 2 if n % 2 == 1 and n > 1 else None


def _part(x: Line, start: int, stop: int | None, axis: int) -> Line:
    return lax.slice_in_dim(x, start, stop, 1, axis)


def _padded(x: Line, low: int, high: int, axis: int) -> Line:
    edges = [(0, 0, 0)] * x.ndim
    edges[axis] = (low, high, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), edges)


def _every_other(x: Line, start: int, stop: int, axis: int) -> Line:
    return lax.slice_in_dim(x, start, stop, 2, axis)


def _split(v: Line, axis: int) -> tuple[Line, Line]:
    """Values at even and at odd places."""
    n = v.shape[axis]
    return _every_other(v, 0, n, axis), _every_other(v, 1, n, axis)


def _repeated(u: Line, axis: int) -> Line:
    """u₀, u₀, u₁, u₁, … Linear interpolation is the mean of neighbours in it: fewer kernels and
    half the time, on the CPU, of padding with interior zeros."""
    shape = list(u.shape)
    shape.insert(axis + 1, 2)
    kept = [i if i <= axis else i + 1 for i in range(u.ndim)]
    pairs = lax.broadcast_in_dim(u, shape, kept)
    return pairs.reshape([2 * n if i == axis else n for i, n in enumerate(u.shape)])


def _interleaved(even: Line, odd: Line, axis: int) -> Line:
    """even₀, odd₀, even₁, …"""
    shape = list(even.shape)
    shape[axis] *= 2
    return jnp.stack([even, odd], axis + 1).reshape(shape)


def _sum_pairs(v: Line, axis: int) -> Line:
    even, odd = _split(v, axis)
    return even + odd


def _ends(x: Line, factor: float, axis: int) -> Line:
    """x with its first and last value multiplied by `factor`."""
    n = x.shape[axis]
    weights = np.ones(n)
    weights[[0, n - 1]] = factor
    shape = [1] * x.ndim
    shape[axis] = n
    return x * jnp.asarray(weights.reshape(shape), x.dtype)


def _prolong_closed(u: Line, axis: int) -> Line:
    twice = _repeated(u, axis)
    n = twice.shape[axis]
    return 0.5 * (_part(twice, 0, n - 1, axis) + _part(twice, 1, n, axis))


def _prolong_closed_transpose(v: Line, axis: int) -> Line:
    # Row i of Pᵀ is ½ v[2i−1] + v[2i] + ½ v[2i+1]; what lies outside counts nothing.
    wide = _padded(v, 1, 1, axis)
    n = v.shape[axis]
    before, at, after = (_every_other(wide, i, n + i, axis) for i in range(3))
    return at + 0.5 * (before + after)


def _interpolate_closed(u: Line, axis: int) -> Line:
    middle = _padded(_midpoints(_extrapolated(u, 1, axis), axis), 0, 1, axis)
    return _part(_interleaved(u, middle, axis), 0, 2 * u.shape[axis] - 1, axis)


def _prolong_cells(u: Line, left: Line, right: Line, axis: int) -> Line:
    return _interleaved(0.75 * u + 0.25 * left, 0.75 * u + 0.25 * right, axis)


def _mirrored(x: Line, y: Line, sign: float, axis: int) -> tuple[Line, Line]:
    """(x shifted to the right, y shifted to the left), mirror images of the other at the ends."""
    n = x.shape[axis]
    first, last = sign * _part(y, 0, 1, axis), sign * _part(x, n - 1, n, axis)
    left = jnp.concatenate([first, _part(x, 0, n - 1, axis)], axis)
    return left, jnp.concatenate([_part(y, 1, n, axis), last], axis)


def _extrapolated(u: Line, ghosts: int, axis: int) -> Line:
    """u with values of the cubic through its last four added at each end."""
    for _ in range(ghosts):
        n = u.shape[axis]
        m = min(n, 4)
        weights = [(-1) ** (k + 1) * math.comb(m, k) for k in range(1, m + 1)]
        first = sum(float(w) * _part(u, k, k + 1, axis) for k, w in enumerate(weights))
        last = sum(float(w) * _part(u, n - 1 - k, n - k, axis) for k, w in enumerate(weights))
        u = jnp.concatenate([first, u, last], axis)
    return u


def _midpoints(wide: Line, axis: int) -> Line:
    """Cubic interpolation half-way between the nodes, at all but the outermost two intervals."""
    n = wide.shape[axis] - 3
    a, b, c, d = (_part(wide, i, i + n, axis) for i in range(4))
    return 0.5625 * (b + c) - 0.0625 * (a + d)


def _cubic_cells(wide: Line, axis: int) -> Line:
    """Cubic interpolation a quarter of a cell to either side of all but the two outermost cells."""
    n = wide.shape[axis] - 4
    a, b, c, d, e = (_part(wide, i, i + n, axis) for i in range(5))
    # Lagrange's weights of the nodes −2, −1, 0, 1 at −¼.
    w = (-0.0390625, 0.2734375, 0.8203125, -0.0546875)
    left = w[0] * a + w[1] * b + w[2] * c + w[3] * d
    right = w[0] * e + w[1] * d + w[2] * c + w[3] * b
    return _interleaved(left, right, axis)

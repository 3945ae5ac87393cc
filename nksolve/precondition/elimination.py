"""Block elimination of block tridiagonal systems, sequential or of logarithmic depth.

J has blocks L_i, D_i, U_i in block row i, in columns i − 1, i, i + 1 (L_0 and the last U are zero).
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from .blocks import inverse, magnitude, matmul, matvec, product, transpose

Blocks = Inexact[Array, "m b b"]
BlockVector = Inexact[Array, "m b"]

# Rows of a sweep in one turn of its loop: 2 take 14 → 8 µs for 500 blocks of 2 × 2 on a CPU, 4 or
# more are slower than 1, as is the factorisation with more than 1.
_UNROLL = 2


class AbstractFactors(eqx.Module):
    """A factored block tridiagonal matrix J."""

    @abc.abstractmethod
    def solve(self, rhs: BlockVector) -> BlockVector:
        """J⁻¹ rhs."""

    @abc.abstractmethod
    def solve_transposed(self, rhs: BlockVector) -> BlockVector:
        """J⁻ᵀ rhs, from the same factors."""


class AbstractElimination(eqx.Module):
    """Factors a block tridiagonal matrix. No pivoting across blocks; a singular pivot is replaced
    by the identity, so that the factors are finite and the Krylov method sees to the rest."""

    @abc.abstractmethod
    def factor(self, lower: Blocks, diagonal: Blocks, upper: Blocks) -> AbstractFactors:
        """The factors of J."""


class ScanElimination(AbstractElimination):
    """Block elimination row by row, J = (I + E) P (I + H): what is fastest on a CPU.

    P_i = D_i − E_i U_{i−1}, E_i = L_i P_{i−1}⁻¹, H_i = P_i⁻¹ U_i; a solve is a sweep up and one
    down. 2 m sequential steps for m blocks.

    Storage: 3 b n numbers (E, P⁻¹, H). Work: factoring 3 products and one inverse of b × b a
    block; a solve 3 b n multiplications and additions.

    Source: Golub & Van Loan, Matrix Computations, 4th ed., section 4.5.1.
    """

    def factor(self, lower: Blocks, diagonal: Blocks, upper: Blocks) -> "ScanFactors":
        def row(h, blocks):
            low, d, up = blocks
            pivot = inverse(d - product(low, h))  # L_i H_{i−1} = E_i U_{i−1}
            h = product(pivot, up)
            return h, (pivot, h)

        (lower, diagonal, upper), scale = _scaled(lower, diagonal, upper)
        start = jnp.zeros_like(diagonal[0])
        _, (pivots, h) = jax.lax.scan(row, start, (lower, diagonal, upper))
        e = matmul(lower, jnp.concatenate([jnp.zeros_like(pivots[:1]), pivots[:-1]]))
        return ScanFactors(e, pivots / scale, h)


class ScanFactors(AbstractFactors):
    """What `ScanElimination` keeps."""

    e: Blocks
    pivots: Blocks  # P⁻¹
    h: Blocks

    def solve(self, rhs: BlockVector) -> BlockVector:
        def up(z, row):
            e, b = row
            z = b - matvec(e, z)
            return z, z

        def down(x, row):
            pivot, h, z = row
            x = matvec(pivot, z) - matvec(h, x)
            return x, x

        zero = jnp.zeros_like(rhs[0])
        _, z = jax.lax.scan(up, zero, (self.e, rhs), unroll=_UNROLL)
        rows = (self.pivots, self.h, z)
        return jax.lax.scan(down, zero, rows, reverse=True, unroll=_UNROLL)[1]

    def solve_transposed(self, rhs: BlockVector) -> BlockVector:
        # (I + Hᵀ) z = b, then (I + Eᵀ) y = P⁻ᵀ z. The neighbour's block stands in its own row, so
        # its product is what the sweep carries.
        def up(carry, row):
            h, b = row
            z = b - carry
            return matvec(transpose(h), z), z

        def down(carry, row):
            pivot, e, z = row
            y = matvec(transpose(pivot), z) - carry
            return matvec(transpose(e), y), y

        zero = jnp.zeros_like(rhs[0])
        _, z = jax.lax.scan(up, zero, (self.h, rhs), unroll=_UNROLL)
        rows = (self.pivots, self.e, z)
        return jax.lax.scan(down, zero, rows, reverse=True, unroll=_UNROLL)[1]


class CyclicReduction(AbstractElimination):
    """Block cyclic reduction: every second block is eliminated at once, log₂ m times.

    What is left is block tridiagonal again, of half the size. For accelerators, where the
    2 log₂ m steps of a solve count and not its arithmetic.

    Storage: 5 b n numbers. Work: factoring 6 products of b × b and one inverse a block; a solve
    5 b n multiplications and additions.

    Source: Golub & Van Loan, Matrix Computations, 4th ed., section 4.5.4; Heller, SIAM J. Numer.
    Anal. 13(4), 1976.
    """

    def factor(self, lower: Blocks, diagonal: Blocks, upper: Blocks) -> "CyclicFactors":
        (lower, diagonal, upper), scale = _scaled(lower, diagonal, upper)
        levels = []
        while diagonal.shape[0] > 1:
            pivots = inverse(diagonal[1::2])
            level = _Level(
                pivots=pivots / scale,
                left=matmul(pivots, lower[1::2]),
                right=matmul(pivots, upper[1::2]),
                from_left=matmul(upper[:-1:2], pivots),
                from_right=matmul(_rows(lower[2::2], pivots.shape[0]), pivots),
            )
            levels.append(level)
            # Row 2j loses x_{2j+1}, its own, and x_{2j−1}, of the pair before.
            kept = diagonal[0::2].shape[0]
            own, other = level.from_left, level.from_right
            diagonal = (
                diagonal[0::2]
                - _rows(matmul(own, lower[1::2]), kept)
                - _shifted(matmul(other, upper[1::2]), kept)
            )
            lower, upper = (
                -_shifted(matmul(other, lower[1::2]), kept),
                -_rows(matmul(own, upper[1::2]), kept),
            )
        return CyclicFactors(levels, inverse(diagonal) / scale)


class _Level(eqx.Module):
    """Pair j, of which x_{2j+1} = P_j⁻¹ r_{2j+1} − left_j x_{2j} − right_j x_{2j+2} is eliminated.

    `from_left` and `from_right` are what rows 2j and 2j + 2 subtract of row 2j + 1.
    """

    pivots: Blocks  # P⁻¹
    left: Blocks
    right: Blocks
    from_left: Blocks
    from_right: Blocks

    def transpose(self) -> "_Level":
        return _Level(
            *map(transpose, (self.pivots, self.from_left, self.from_right, self.left, self.right))
        )


class CyclicFactors(AbstractFactors):
    """What `CyclicReduction` keeps."""

    levels: list[_Level]
    last: Blocks

    def solve(self, rhs: BlockVector) -> BlockVector:
        eliminated = []
        for level in self.levels:
            odd, rhs = rhs[1::2], rhs[0::2]
            kept = rhs.shape[0]
            eliminated.append(odd)
            rhs = rhs - _rows(matvec(level.from_left, odd), kept)
            rhs = rhs - _shifted(matvec(level.from_right, odd), kept)
        x = matvec(self.last, rhs)
        for level, odd in zip(reversed(self.levels), reversed(eliminated), strict=True):
            pairs = odd.shape[0]
            odd = matvec(level.pivots, odd) - matvec(level.left, x[:pairs])
            odd = odd - matvec(level.right, _rows(x[1:], pairs))
            both = jnp.stack([_rows(x, pairs), odd], axis=1).reshape(-1, x.shape[-1])
            x = jnp.concatenate([both, x[pairs:]]) if x.shape[0] > pairs else both
        return x

    def solve_transposed(self, rhs: BlockVector) -> BlockVector:
        levels = [level.transpose() for level in self.levels]
        return CyclicFactors(levels, transpose(self.last)).solve(rhs)


def _rows(x: Array, count: int) -> Array:
    """The first `count` rows, with rows of zeros where x has fewer."""
    missing = count - x.shape[0]
    return x[:count] if missing <= 0 else jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))


def _shifted(x: Array, count: int) -> Array:
    """The rows one further down, a row of zeros first."""
    return _rows(jnp.concatenate([jnp.zeros_like(x[:1]), x]), count)


def _scaled(lower: Blocks, diagonal: Blocks, upper: Blocks) -> tuple[Any, Array]:
    """J with its largest diagonal entry scaled to 1 where determinants could over- or underflow,
    and that entry; without what is not finite, which would spread to all of M⁻¹."""
    scale = jnp.ones((), diagonal.dtype)
    if diagonal.shape[-1] in (2, 3):
        scale = magnitude(jnp.max(jnp.abs(diagonal))).astype(diagonal.dtype)

    def clean(x):
        return jnp.where(jnp.isfinite(x), x * (1 / scale), jnp.zeros_like(x))

    return (clean(lower), clean(diagonal), clean(upper)), scale


def for_platform(elimination: AbstractElimination | None) -> AbstractElimination:
    """The elimination that was asked for, or the faster one for JAX's default backend."""
    if elimination is not None:
        return elimination
    return ScanElimination() if jax.default_backend() == "cpu" else CyclicReduction()

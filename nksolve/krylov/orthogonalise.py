"""Orthogonalise a vector against the rows of a basis and append it."""

import abc
from typing import NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Inexact

from .. import tree
from ..loops import any_lane
from ..typing import Count, Scalar, Vector
from .basis import Basis


class Appended(NamedTuple):
    """w = Σ hᵢ vᵢ + norm · v_filled, with v_filled the new unit row (zero where norm is 0)."""

    basis: Basis
    coefficients: Inexact[Array, " rows"]
    norm: Scalar
    norm_before: Scalar


class AbstractOrthogonalisation(eqx.Module):
    """Law: the rows of the basis stay orthonormal to rounding (`CGS2`) or to ε κ (`MGS`)."""

    @abc.abstractmethod
    def append(self, basis: Basis, w: Vector, filled: Count) -> Appended:
        """Makes `w` orthogonal to the `filled` rows of `basis` and appends it, normalised."""


class CGS2(AbstractOrthogonalisation):
    """Classical Gram–Schmidt, twice: orthogonal to O(ε), two reductions a step.

    w' = w − V Vᴴw and w'' = w' − V Vᴴw'. The norm of w'' comes without a reduction of its own:
    w' is put into the next row, so that one product V w' gives both h₂ = Vᴴw' and ‖w'‖², and
    ‖w''‖² = ‖w'‖² − ‖h₂‖²; where that difference cancels, the norm is computed directly.
    Work: four passes over the filled rows.

    Source: Giraud, Langou, Rozložník & van den Eshof, Numer. Math. 101, 2005 (twice is enough).
    """

    def append(self, basis: Basis, w: Vector, filled: Count) -> Appended:
        h1 = basis.dots(w, filled)
        w1 = tree.sub(w, basis.combine(h1, filled))
        basis = basis.set_row(filled, w1)
        products = basis.dots(w1, filled + 1)
        is_new = jnp.arange(basis.size, dtype=jnp.int32) == filled
        square1 = jnp.sum(jnp.where(is_new, products, jnp.zeros_like(products)).real)
        h2 = jnp.where(is_new, jnp.zeros_like(products), products)
        w2 = tree.sub(w1, basis.combine(h2, filled))
        removed = _square(h2)
        square2 = square1 - removed
        cancelled = square2 < 0.5 * square1
        direct = lax.cond(
            any_lane(cancelled), lambda: tree.vdot(w2, w2).real, lambda: jnp.zeros_like(square2)
        )
        norm = jnp.sqrt(jnp.where(cancelled, direct, square2))
        norm_before = jnp.sqrt(square1 + _square(h1))
        return Appended(basis.set_row(filled, _unit(w2, norm)), h1 + h2, norm, norm_before)


class MGS(AbstractOrthogonalisation):
    """Modified Gram–Schmidt: orthogonal to O(ε κ), one reduction for each filled row.

    Half the arithmetic of `CGS2`, in a sequential loop over the rows.

    Source: Saad, Iterative Methods for Sparse Linear Systems, 2nd ed., algorithm 6.2.
    """

    def append(self, basis: Basis, w: Vector, filled: Count) -> Appended:
        norm_before = tree.norm2(w)
        coefficients = jnp.zeros_like(basis.dots(w, jnp.zeros_like(filled)))

        def project(i, carry):
            w, h = carry
            row = basis.row(i)
            product = tree.vdot(row, w)
            product = (product.real if basis.real else product).astype(h.dtype)
            w = jtu.tree_map(lambda v, x: x - product.astype(x.dtype) * v, row, w)
            return w, h.at[i].set(product)

        w, coefficients = lax.fori_loop(0, filled, project, (w, coefficients))
        norm = tree.norm2(w)
        return Appended(basis.set_row(filled, _unit(w, norm)), coefficients, norm, norm_before)


def _square(h: Inexact[Array, " rows"]) -> Scalar:
    return jnp.sum((h * h.conj()).real)


def _unit(w: Vector, norm: Scalar) -> Vector:
    """w / norm, or zero where that is not finite."""
    usable = (norm > 0) & jnp.isfinite(norm)
    factor = jnp.where(usable, 1 / jnp.where(usable, norm, jnp.ones_like(norm)), 0)
    return tree.where(usable, tree.scale(factor, w), tree.zeros_like(w))

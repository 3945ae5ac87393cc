"""Orthogonalise a vector against the rows of a basis and append it."""

import abc
from typing import NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Inexact

from .. import tree
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
    """Classical Gram–Schmidt, twice: orthogonal to O(ε), three reductions a step.

    w' = w − V Vᴴw and w'' = w' − V Vᴴw', normalised. Work: four passes over the filled rows.

    Source: Giraud, Langou, Rozložník & van den Eshof, Numer. Math. 101, 2005 (twice is enough).
    """

    def append(self, basis: Basis, w: Vector, filled: Count) -> Appended:
        h1 = basis.dots(w, filled)
        w = tree.sub(w, basis.combine(h1, filled))
        h2 = basis.dots(w, filled)
        w = tree.sub(w, basis.combine(h2, filled))
        h, square = h1 + h2, tree.vdot(w, w).real
        norm = jnp.sqrt(square)
        norm_before = jnp.sqrt(square + jnp.sum((h * h.conj()).real))
        return Appended(basis.set_row(filled, _unit(w, norm)), h, norm, norm_before)


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


def _unit(w: Vector, norm: Scalar) -> Vector:
    """w / norm, or zero where that is not finite."""
    usable = (norm > 0) & jnp.isfinite(norm)
    factor = jnp.where(usable, 1 / jnp.where(usable, norm, jnp.ones_like(norm)), 0)
    return tree.where(usable, tree.scale(factor, w), tree.zeros_like(w))

"""An approximate inverse Jacobian of low rank beyond a multiple of the identity."""

import abc

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from .. import tree
from ..krylov.basis import Basis, combined
from ..linearise.operator import AbstractLinearMap
from ..loops import any_lane
from ..typing import Count, Flag, Scalar, ScalarLike, Vector


class LowRankInverse(AbstractLinearMap):
    """H = −β I + Σᵢ uᵢ vᵢᵀ ≈ J⁻¹, row by row; complex vectors count as real ones.

    A term counts where it is `live`. Rows are written in turn, the first again after the last:
    `written` counts them, and is one number for all lanes of a `vmap` that start without terms.

    Storage: 2·rank vectors. Work of a product: two passes over the rows, one reduction.
    """

    damping: ScalarLike  # β
    left: Basis  # u
    right: Basis  # v
    live: Bool[Array, " rank"]
    written: Count

    @staticmethod
    def allocate(vector: Vector, rank: int, damping: ScalarLike) -> "LowRankInverse":
        """−β I, with room for `rank` terms."""
        rows = Basis.allocate(vector, rank, real=True)
        live = jnp.zeros(rank, jnp.bool_)
        return LowRankInverse(damping, rows, rows, live, jnp.zeros((), jnp.int32))

    @property
    def rank(self) -> int:
        """Terms that there is room for."""
        return self.left.size

    def mv(self, vector: Vector) -> Vector:
        """H v."""
        return self._applied(self.left, self.right, vector)

    def adjoint_mv(self, vector: Vector) -> Vector:
        """H* v, the transpose of H as a map of real vectors."""
        return self._applied(self.right, self.left, vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        """Hᵀ v: the transpose of JAX, which conjugates nothing."""
        return tree.conj(self.adjoint_mv(tree.conj(vector)))

    def fits(self, vector: Vector) -> bool:
        """Whether it is of the space of `vector`."""
        row = tree.structure(eqx.filter_eval_shape(lambda: self.left.row(self.written)))
        return row == tree.structure(vector)

    def forgetting(
        self, slot: Count, value: Vector, applied: Vector, wanted: Flag
    ) -> tuple["LowRankInverse", Vector]:
        """(H without the term in `slot`, H f), from f and H f, where that is wanted."""
        u, v = self.left.row(slot), self.right.row(slot)
        product = tree.vdot(v, value).real
        c = jnp.where(wanted & self.live[slot], product, 0 * product)
        live = self.live.at[slot].set(self.live[slot] & ~wanted)
        return eqx.tree_at(lambda h: h.live, self, live), tree.axpy(-c, u, applied)

    def learning(self, slot: Count, u: Vector, v: Vector, learnt: Flag) -> "LowRankInverse":
        """With the term u vᵀ in `slot`, where it is to be learnt."""
        left = self.left.set_row(slot, tree.where(learnt, u, self.left.row(slot)))
        right = self.right.set_row(slot, tree.where(learnt, v, self.right.row(slot)))
        live = self.live.at[slot].set(self.live[slot] | learnt)
        return LowRankInverse(self.damping, left, right, live, self.written)

    def _applied(self, out: Basis, into: Basis, vector: Vector) -> Vector:
        filled = jnp.minimum(self.written, self.rank)
        products = into.dots(vector, filled)
        products = jnp.where(self.live, products, jnp.zeros_like(products))
        damping = -jnp.asarray(self.damping).astype(products.dtype)
        return tree.axpy(damping, vector, out.combine(products, filled))


class AbstractForgetting(eqx.Module):
    """What makes room for a new term of H once the memory is full."""

    @abc.abstractmethod
    def slot(self, inverse: LowRankInverse) -> Count:
        """The next row to be written; what it holds is forgotten."""

    @abc.abstractmethod
    def room(
        self, inverse: LowRankInverse, value: Vector, applied: Vector, wanted: Flag
    ) -> tuple[LowRankInverse, Vector]:
        """(H, H f) with less in it where it was full and room is `wanted`; `applied` is H f of the
        vector f = `value`."""


class Restart(AbstractForgetting):
    """Forget all: H ← −β I.

    The cheapest, and the usual choice where the memory outlasts most solves.
    """

    def slot(self, inverse: LowRankInverse) -> Count:
        return inverse.written % inverse.rank

    def room(
        self, inverse: LowRankInverse, value: Vector, applied: Vector, wanted: Flag
    ) -> tuple[LowRankInverse, Vector]:
        full = wanted & (inverse.written > 0) & (inverse.written % inverse.rank == 0)
        live = inverse.live & ~full
        bare = tree.scale(-jnp.asarray(inverse.damping), value)
        return eqx.tree_at(lambda h: h.live, inverse, live), tree.where(full, bare, applied)


class DropOldest(AbstractForgetting):
    """Forget the oldest term.

    H is no longer what Broyden's updates of the remaining pairs give, but the newest secant
    equation holds.
    """

    def slot(self, inverse: LowRankInverse) -> Count:
        return inverse.written % inverse.rank

    def room(
        self, inverse: LowRankInverse, value: Vector, applied: Vector, wanted: Flag
    ) -> tuple[LowRankInverse, Vector]:
        return inverse, applied


class RankReduction(AbstractForgetting):
    """Replace H + β I by the nearest matrix of a lower rank, by its singular values.

    **Arguments:**

    - `keep`: that rank; half the memory by default. The rest is room for new terms, so that a
      reduction comes once in (rank − keep) steps.

    Work of a reduction: two Gram matrices of the rows, two eigenvalue problems of order `rank`, and
    two combinations of the rows. Singular values below √ε of the largest are rounding.

    Source: van de Rotten & Verduyn Lunel, A limited memory Broyden method to solve high-dimensional
    systems of nonlinear equations, 2003.
    """

    keep: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"`RankReduction(keep)` must be at least 1, but it is {self.keep}.")

    def slot(self, inverse: LowRankInverse) -> Count:
        free = inverse.rank - self._kept(inverse)
        beyond = jnp.maximum(inverse.written - inverse.rank, 0) % free
        return jnp.where(
            inverse.written < inverse.rank, inverse.written, inverse.rank - free + beyond
        )

    def room(
        self, inverse: LowRankInverse, value: Vector, applied: Vector, wanted: Flag
    ) -> tuple[LowRankInverse, Vector]:
        keep = self._kept(inverse)
        beyond = inverse.written - inverse.rank
        full = wanted & (beyond >= 0) & (beyond % (inverse.rank - keep) == 0)
        static = eqx.partition(inverse, eqx.is_array)[1]

        def reduced():
            new = reduce_rank(inverse, keep)
            new, image = tree.where(full, (new, new.mv(value)), (inverse, applied))
            return eqx.filter(new, eqx.is_array), image

        unchanged = lambda: (eqx.filter(inverse, eqx.is_array), applied)
        arrays, applied = lax.cond(any_lane(full), reduced, unchanged)
        return eqx.combine(arrays, static), applied

    def _kept(self, inverse: LowRankInverse) -> int:
        keep = inverse.rank // 2 if self.keep is None else self.keep
        if keep >= inverse.rank:
            raise ValueError(
                f"`RankReduction(keep={keep})` leaves no room in a memory of {inverse.rank} terms."
            )
        return keep


def reduce_rank(inverse: LowRankInverse, keep: int) -> LowRankInverse:
    """The H nearest in the 2-norm whose sum has `keep` terms, in the first rows."""
    n = inverse.rank
    mask = inverse.live.astype(tree.real_dtype(inverse.left.head(1)))
    v = inverse.right.products(inverse.right.head(n)) * (mask[:, None] * mask[None, :])
    size = jnp.sqrt(jnp.diagonal(v))
    size = jnp.where(size > 0, size, jnp.ones_like(size))
    # V = Q R by the Gram matrix of its rows at length 1, so that none of them is rounding; then
    # U Vᵀ = (U Rᵀ) Qᵀ, whose singular vectors are those of the Gram matrix of U Rᵀ.
    values, vectors = jnp.linalg.eigh(v / (size[:, None] * size[None, :]))
    sound = values > n * jnp.finfo(values.dtype).eps * jnp.max(values)
    root = jnp.sqrt(jnp.where(sound, values, jnp.ones_like(values)))
    sound, root, size, mask = sound[None, :], root[None, :], size[:, None], mask[:, None]
    r_t = jnp.where(sound, vectors * root, jnp.zeros_like(vectors)) * size * mask
    r_inverse = jnp.where(sound, vectors / root, jnp.zeros_like(vectors)) / size * mask
    u = inverse.left.products(inverse.left.head(n))
    _, w = jnp.linalg.eigh(_product(r_t.T, _product(u, r_t)))
    w = w[:, ::-1][:, :keep]  # eigenvalues ascend
    left = inverse.left.with_head(combined(inverse.left.head(n), _product(r_t, w)))
    right = inverse.right.with_head(combined(inverse.right.head(n), _product(r_inverse, w)))
    live = jnp.arange(n, dtype=jnp.int32) < keep
    return LowRankInverse(inverse.damping, left, right, live, inverse.written)


def _product(a: Inexact[Array, "i j"], b: Inexact[Array, "j k"]) -> Inexact[Array, "i k"]:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def relative_size(value: Scalar, scale: Scalar) -> Flag:
    """Whether a denominator is well away from rounding, next to what it was made of."""
    return jnp.abs(value) > jnp.sqrt(jnp.finfo(scale.dtype).eps) * scale

"""The recycled space of GCRO-DR: U and C with A U = C and CᴴC = I.

C are the first rows of the Arnoldi basis, U those of the search basis. A direction that is missing
is a zero row in both, so that nothing here has a shape that depends on values.
"""

import functools as ft
from typing import NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Inexact

from .. import tree
from ..loops import any_lane
from ..typing import Count, Flag, LinearFn, Vector
from .basis import Basis, combined, gram


class RecycledSpace(eqx.Module):
    """k search directions U and their images C = A U, orthonormal, stacked by rows.

    What `stats["recycled"]` of a solve holds and `nks.GCRODR(recycled=...)` takes. `alive` says
    which of the k rows are in use; the others are zero. `overlap` is CᴴM U, as far as it is known.
    """

    search: Vector
    image: Vector
    overlap: Inexact[Array, "k k"]
    alive: Bool[Array, " k"]

    @property
    def size(self) -> int:
        """k."""
        return self.alive.shape[-1]

    def transpose(self) -> "RecycledSpace":
        """The space for Aᵀ: Ū, which is right for Hermitian A, and near it otherwise.

        C̄ was as good for symmetric A and worse for convection–diffusion: both span about the same
        right eigenvectors, of which Aᵀ needs the left ones.
        """
        search, image = tree.conj(self.search), tree.conj(self.image)
        return RecycledSpace(search, image, self.overlap.conj(), self.alive)


class Space(eqx.Module):
    """What a workspace keeps of the recycled space beside its vectors."""

    overlap: Inexact[Array, "k k"]
    alive: Bool[Array, " k"]

    @property
    def size(self) -> int:
        """k."""
        return self.alive.shape[-1]

    @staticmethod
    def empty(size: int, dtype: jnp.dtype) -> "Space":
        """With none of the directions in use."""
        return Space(jnp.zeros((size, size), dtype), jnp.zeros((size,), bool))


class Directions(NamedTuple):
    """U, C by rows, and what goes with them."""

    search: Vector
    image: Vector
    space: Space


def carried_over(
    mv: LinearFn, old: Directions, wanted: Flag, real: bool
) -> tuple[Directions, Count]:
    """The space for a new operator, and the matvecs that it took: C R = A U, U ← U R⁻¹.

    One batched application of `mv`, none where no lane has a space that is `wanted`. Directions
    whose image is not finite, or depends on the others, are dropped.

    Source: Parks, de Sturler, Mackey, Johnson & Maiti, SIAM J. Sci. Comput. 28(5), 2006,
    appendix, lines 1 to 5; the QR factorisation from Gram matrices, twice.
    """
    used = wanted & old.space.alive.any()

    def apply():
        image = tree.where(used, jax.vmap(mv)(old.search), old.image)
        squares = jnp.diagonal(gram(image, image, real=real)).real
        usable = jnp.isfinite(squares) & (squares > 0)
        image = jtu.tree_map(lambda x: jnp.where(_rows(usable, x), x, jnp.zeros_like(x)), image)
        first, _ = _inverse_root(gram(image, image, real=real))
        image = combined(image, first)
        second, alive = _inverse_root(gram(image, image, real=real))
        image = combined(image, second)
        factor = first @ second
        # M U is known by its part in C, which moves with the operator.
        overlap = gram(image, old.image, real=real) @ old.space.overlap @ factor
        return Directions(combined(old.search, factor), image, Space(overlap, alive))

    new = lax.cond(any_lane(used), apply, lambda: old)
    return new, old.space.size * tree.count(used)


def _inverse_root(g: Array) -> tuple[Array, Array]:
    """T with TᴴG T = I, but for zero columns where G is singular to rounding; which are not."""
    squares = jnp.diagonal(g).real
    scale = jnp.where(squares > 0, lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0).astype(g.dtype)
    values, vectors = jnp.linalg.eigh(scale[:, None].conj() * g * scale[None, :])
    # Twice: what is lost in the first pass, ε / λ, the second one makes good.
    kept = values > 10 * g.shape[0] * jnp.finfo(values.dtype).eps
    root = jnp.where(kept, lax.rsqrt(jnp.where(kept, values, 1)), 0).astype(g.dtype)
    return scale[:, None] * vectors * root[None, :], kept


def _rows(flags: Array, like: Array) -> Array:
    return flags.reshape(flags.shape + (1,) * (like.ndim - 1))


def renewed(
    arnoldi: Basis,
    search: Basis,
    space: Space,
    hessenberg: Array,
    coupling: Array,
    columns: Count,
    wanted: Flag,
    *,
    flexible: bool,
) -> Directions:
    """The k smallest harmonic Ritz vectors of a cycle, A [U Z] = [C V] G, as the next space.

    G = [[I, B], [0, H̄]] with the `coupling` B = CᴴA Z; Z is V where the method is not `flexible`.
    Where it is not `wanted`, or the small problem has no finite answer, the space stays.

    Source: Parks, de Sturler, Mackey, Johnson & Maiti, SIAM J. Sci. Comput. 28(5), 2006, appendix,
    lines 25 to 30; the flexible form with the overlap of old directions from their Ritz values.
    """
    k, length = coupling.shape
    old = Directions(search.head(k), arnoldi.head(k), space)

    def renew():
        g, column_alive = _projected(space, hessenberg, coupling, columns)
        overlap = space.overlap
        if flexible:
            overlap = jnp.pad(overlap, ((0, length + 1), (0, 0)))
        else:
            overlap = arnoldi.products(old.search)
            known = jnp.arange(k + length + 1, dtype=jnp.int32) <= k + columns
            overlap = jnp.where(known[:, None], overlap, jnp.zeros_like(overlap))
        identity = jnp.eye(k + length + 1, length, -k, dtype=g.dtype)
        x = jnp.concatenate([overlap, identity], 1)
        x = jnp.where(column_alive[None], x, jnp.zeros_like(x))
        small = _smallest(g, x, k, hessenberg, columns)
        keep = wanted & small.finite
        image_c = jnp.where(keep, small.image, jnp.eye(k + length + 1, k, dtype=g.dtype))
        search_c = jnp.where(keep, small.search, jnp.eye(k + length, k, dtype=g.dtype))
        if flexible:
            directions = search.combinations(search_c)
        else:
            mine = jnp.pad(search_c[k:], ((k, 1), (0, 0)))
            directions = tree.add(search.combinations(search_c[:k]), arnoldi.combinations(mine))
        return Directions(
            directions,
            arnoldi.combinations(image_c),
            Space(
                jnp.where(keep, small.overlap, space.overlap),
                jnp.where(keep, small.alive, space.alive),
            ),
        )

    return lax.cond(any_lane(wanted), renew, lambda: old)


def _projected(
    space: Space, hessenberg: Array, coupling: Array, columns: Count
) -> tuple[Array, Array]:
    """(G, which of its columns are in use); the others are units outside the range of those."""
    k, length = coupling.shape
    inside = jnp.arange(length, dtype=jnp.int32) < columns
    right = jnp.concatenate([coupling, hessenberg])
    unit = jnp.eye(k + length + 1, length, -k - 1, dtype=hessenberg.dtype)
    right = jnp.where(inside[None], right, unit)
    left = jnp.eye(k + length + 1, k, dtype=hessenberg.dtype)
    return jnp.concatenate([left, right], 1), jnp.concatenate([space.alive, inside])


class _Small(NamedTuple):
    """Coefficients of the new C in [C V], of the new U in [U Z]; zero columns where not alive."""

    image: Array
    search: Array
    overlap: Array
    alive: Array
    finite: Flag


def _smallest(g: Array, x: Array, k: int, hessenberg: Array, columns: Count) -> _Small:
    # GᴴG z = θ GᴴX z with G = Q R and z = R⁻¹ y is (QᴴX R⁻¹) y = θ⁻¹ y, and G z = Q y: an
    # orthonormal basis L of the y's gives C = [C V] Q L and U = [U Z] R⁻¹ L.
    q, r = jnp.linalg.qr(g)
    t = jsl.solve_triangular(r, x.T, trans="T").T
    operator = q.conj().T @ t
    # Which functions there are depends on where this will run.
    chosen, mu = lax.platform_dependent(
        operator,
        t,
        tpu=ft.partial(_singular, k),
        default=ft.partial(_harmonic, k),
    )
    eps = jnp.finfo(mu.dtype).eps
    size = g.shape[1]
    inside = jnp.arange(hessenberg.shape[1], dtype=jnp.int32) < columns
    entries = jnp.where(inside[None], hessenberg, jnp.zeros_like(hessenberg))
    scale = jnp.sqrt(jnp.sum((entries * entries.conj()).real))
    # Not zeros of the padding; and nothing that A all but annihilates, of which A U = C would hold
    # to few digits.
    good = (mu > 10 * size * eps * mu[0]) & (mu * scale < eps ** (-2 / 3))
    chosen = jnp.where(good[None], chosen, jnp.zeros_like(chosen))
    norms = jnp.sqrt(jnp.sum((chosen * chosen.conj()).real, 0))
    chosen = chosen / jnp.where(norms > 0, norms, 1).astype(chosen.dtype)[None]
    left, sigma, _ = jnp.linalg.svd(chosen, full_matrices=False)
    alive = sigma > 10 * size * eps * jnp.maximum(sigma[0], eps)
    basis = jnp.where(alive[None], left, jnp.zeros_like(left))
    search = jsl.solve_triangular(r, basis)
    image = q @ basis
    overlap = basis.conj().T @ operator @ basis
    finite = jnp.isfinite(jnp.sum(jnp.abs(search)) + jnp.sum(jnp.abs(image)) + mu[0])
    return _Small(image, search, overlap, alive, finite & alive.any())


def _harmonic(k: int, operator: Array, t: Array) -> tuple[Array, Array]:
    """The k eigenvectors of largest modulus, 1/|θ|; of a complex pair its two real parts.

    A pair of which only one would be taken gives its real part.
    """
    del t
    values, vectors = jnp.linalg.eig(operator)
    order = jnp.argsort(-jnp.abs(values))[:k]
    values, vectors = values[order], vectors[:, order]
    if not jnp.iscomplexobj(operator):
        vectors = jnp.where(values.imag[None] < 0, vectors.imag, vectors.real)
    return vectors, jnp.abs(values)


def _singular(k: int, operator: Array, t: Array) -> tuple[Array, Array]:
    """The k largest right singular vectors of X R⁻¹: z of least ‖G z‖ / ‖X z‖."""
    del operator
    _, values, right = jnp.linalg.svd(t, full_matrices=False)
    return right[:k].conj().T, values[:k]

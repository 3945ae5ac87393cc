"""A multiple of the identity plus a matrix of low rank, sketched by random probes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax.typing import ArrayLike
from jaxtyping import Array, Inexact

from .. import tree
from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..typing import Args, LinearFn, Vector, Y
from .base import AbstractPreconditioner


class Nystrom(AbstractPreconditioner):
    """J ≈ M = σI + B Qᴴ with B = (J − σI)Q; M⁻¹ = (I − B (σI + QᴴB)⁻¹ Qᴴ)/σ (Woodbury).

    Q is an orthonormal basis of the range of (J − σI)Ω, Ω a random n × k matrix. M agrees with J on
    the span of Q, so Jacobians I − W of implicit layers whose W has few dominant directions become
    close to the identity. Matvecs suffice, Jᵀ is not asked for: where J − σI has rank k or less, M
    is J if J is symmetric, and otherwise (J M⁻¹ − I)² = 0, which GMRES solves in two iterations.

    **Arguments:**

    - `rank`: k, at most n.
    - `sigma`: σ, where the bulk of the spectrum lies.
    - `seed`: of Ω, which is the same at every linearisation.

    A singular σI + QᴴB (J singular on the span of Q) gives the identity over σ.

    Storage: 2k vectors. Work: 2k matvecs in two batches at each linearisation (`num_probes`), a QR
    factorisation of k columns; 2k dot products and combinations for each application. Keep it over
    several linearisations by `nks.Lagged`.

    Source: Halko, Martinsson & Tropp, SIAM Review 53(2), 2011, algorithm 4.1 (Q, and J Q QᴴQ);
    Frangella, Tropp & Udell, SIAM J. Matrix Anal. Appl. 44(2), 2023 (as a preconditioner).
    """

    rank: int = eqx.field(static=True)
    sigma: ArrayLike = 1.0
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        if self.rank < 1:
            raise ValueError(f"`Nystrom(rank)` must be at least 1, but it is {self.rank}.")

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        structure = operator.in_structure()
        sigma, flat = flattened(operator, self.sigma)
        shifted = lambda v: flat(v) - sigma * v
        q = random_basis(structure, self.rank, self.seed)
        q = orthonormal(jax.vmap(shifted)(q))
        b = jax.vmap(shifted)(q)
        small = q.conj() @ b.T  # QᴴB
        inverse, fine = inverted(small + sigma * jnp.eye(len(q), dtype=q.dtype))
        # M⁻¹ = (I − B C Qᴴ)/σ
        middle = jnp.where(fine, -inverse, jnp.zeros_like(inverse))
        low_rank = LowRank(1 / sigma, b.T / sigma, middle, q.conj(), tree.freeze(structure))
        return JacobianOperator(low_rank, operator.out_structure(), structure)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        return 2 * clipped(self.rank, operator.in_structure())

    @property
    def keeps_symmetry(self) -> bool:
        return False  # B Qᴴ is not, where the rank of J − σI exceeds k


class LowRank(AbstractLinearMap):
    """v → c v + L S R v, on vectors flattened leaf after leaf."""

    factor: Array
    left: Inexact[Array, "n k"]
    middle: Inexact[Array, "k k"]
    right: Inexact[Array, "k n"]
    structure: tuple = eqx.field(static=True)

    def mv(self, vector: Vector) -> Vector:
        v = self._flat(vector)
        return self._shaped(self.factor * v + self.left @ (self.middle @ (self.right @ v)))

    def transpose_mv(self, vector: Vector) -> Vector:
        w = self._flat(vector)
        return self._shaped(self.factor * w + ((w @ self.left) @ self.middle) @ self.right)

    def _flat(self, vector: Vector) -> Array:
        return flat_of(vector, self.left.dtype)

    def _shaped(self, flat: Array) -> Vector:
        return shaped_as(flat, tree.thaw(self.structure))


def flattened(operator: lx.AbstractLinearOperator, sigma: ArrayLike) -> tuple[Array, LinearFn]:
    """σ, and J on flat vectors, in one dtype."""
    structure = operator.in_structure()
    check_one_field(structure)
    dtype = tree.scalar_dtype(structure)
    sigma = jnp.asarray(sigma).astype(dtype)
    return sigma, lambda v: flat_of(operator.mv(shaped_as(v, structure)), dtype)


def check_one_field(structure: tree.Structure) -> None:
    """Raises for vectors with real and complex leaves: low-rank terms would mix them."""
    if len({jnp.issubdtype(s.dtype, jnp.complexfloating) for s in jtu.tree_leaves(structure)}) > 1:
        raise ValueError(
            "A low-rank preconditioner needs leaves that are all real or all complex; "
            "`nks.FieldSplit` gives each its own."
        )


def flat_of(vector: Vector, dtype: Any) -> Array:
    """The entries, leaf after leaf."""
    leaves = [jnp.ravel(leaf).astype(dtype) for leaf in jtu.tree_leaves(vector)]
    return leaves[0] if len(leaves) == 1 else jnp.concatenate([*leaves, jnp.zeros(0, dtype)])


def shaped_as(flat: Array, structure: tree.Structure) -> Vector:
    """The vector with those entries."""
    leaves, treedef = jtu.tree_flatten(structure)
    start, out = 0, []
    for leaf in leaves:
        out.append(flat[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return jtu.tree_unflatten(treedef, out)


def clipped(rank: int, structure: tree.Structure) -> int:
    """The rank, at most n."""
    return min(rank, tree.size(structure))


def random_basis(structure: tree.Structure, rank: int, seed: int) -> Inexact[Array, "k n"]:
    """Ωᵀ, with standard normal entries."""
    size = tree.size(structure)
    shape = (min(rank, size), size)
    return jax.random.normal(jax.random.key(seed), shape, tree.scalar_dtype(structure))


def orthonormal(rows: Inexact[Array, "k n"]) -> Inexact[Array, "k n"]:
    """Orthonormal rows that span these; the first axes where they are not finite."""
    rows = jnp.where(jnp.isfinite(rows).all(), rows, jnp.eye(*rows.shape, dtype=rows.dtype))
    return jnp.linalg.qr(rows.T)[0].T


def inverted(matrix: Inexact[Array, "k k"]) -> tuple[Inexact[Array, "k k"], Array]:
    """The inverse, and whether it is one to rounding; the identity where it is none."""
    k = len(matrix)
    eye = jnp.eye(k, dtype=matrix.dtype)
    inverse = jnp.linalg.inv(jnp.where(jnp.isfinite(matrix).all(), matrix, eye))
    product = jnp.max(jnp.sum(jnp.abs(inverse), 1), initial=0.0) * jnp.max(
        jnp.sum(jnp.abs(matrix), 1), initial=0.0
    )
    fine = jnp.isfinite(product) & (product * jnp.finfo(matrix.dtype).eps < 0.1)
    return jnp.where(fine, inverse, eye), fine

"""A few eigenvalues moved to where the others are."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .. import tree
from ..linearise.operator import JacobianOperator
from ..typing import Args, Y
from .base import AbstractPreconditioner
from .nystrom import LowRank, clipped, flat_of, flattened, inverted, orthonormal, random_basis


class Deflation(AbstractPreconditioner):
    """M⁻¹ = I + V(σH⁻¹ − I)Vᴴ, where V is orthonormal and H = VᴴJV.

    Where V spans an invariant subspace, J M⁻¹ has the eigenvalue σ there and those of J on the
    rest: k outliers, near zero or far out, are gone. Symmetric where J is.

    **Arguments:**

    - `rank`: k, the dimension of V, at most n.
    - `sigma`: σ, where the bulk of the spectrum lies. Those eigenvectors of J whose eigenvalues are
      furthest from σ are deflated.
    - `iterations`: of the subspace iteration V ← orth((J − σI)V), from random vectors. More are
      needed where outliers are less clearly outliers.
    - `seed`: of the random vectors.

    A singular H (J singular on the span of V) gives the identity.

    Storage: 2k vectors. Work: (iterations + 1)·k matvecs at each linearisation (`num_probes`), in
    batches of k, and as many QR factorisations; k dot products and combinations for each
    application. Keep it over several linearisations by `nks.Lagged`.

    Source: Erhel, Burrage & Pohl, J. Comput. Appl. Math. 69, 1996, equation 2.4 (there with Ritz
    vectors of the last GMRES cycle); Saad, Numerical Methods for Large Eigenvalue Problems, SIAM
    2011, algorithm 5.1 (subspace iteration).
    """

    rank: int = eqx.field(static=True)
    sigma: ArrayLike = 1.0
    iterations: int = eqx.field(static=True, default=2)
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        if self.rank < 1 or self.iterations < 1:
            raise ValueError(
                "`Deflation(rank, iterations)` must both be at least 1, but they are "
                f"{self.rank} and {self.iterations}."
            )

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        sigma, flat = flattened(operator, self.sigma)
        v = random_basis(operator.in_structure(), self.rank, self.seed)

        def iterate(_, v):
            return orthonormal(jax.vmap(flat)(v) - sigma * v)

        v = jax.lax.fori_loop(0, self.iterations, iterate, v)
        return _deflated(operator, v, jax.vmap(flat)(v), sigma)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        return (self.iterations + 1) * clipped(self.rank, operator.in_structure())


class DeflationOf(AbstractPreconditioner):
    """`nks.Deflation` with vectors of the user's: modes that are known, or those of another solve.

    **Arguments:**

    - `vectors`: a PyTree like y whose leaves have one more, leading axis, of k vectors; or a
      function `(y, args)` that returns one. They are made orthonormal.
    - `sigma`: σ.

    Storage: 2k vectors. Work: k matvecs in one batch at each linearisation (`num_probes`).

    Source: as for `nks.Deflation`.
    """

    vectors: Any
    sigma: ArrayLike = 1.0

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        sigma, flat = flattened(operator, self.sigma)
        v = orthonormal(jax.vmap(lambda v: flat_of(v, sigma.dtype))(self._given(operator, y, args)))
        return _deflated(operator, v, jax.vmap(flat)(v), sigma)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        vectors = self._given(operator, y, args)
        return clipped(len(jax.tree.leaves(vectors)[0]), operator.in_structure())

    def _given(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> PyTree:
        vectors = self.vectors(y, args) if callable(self.vectors) else self.vectors
        structure = operator.in_structure()
        shapes = jax.tree.map(lambda x: tuple(x.shape[1:]), vectors)
        counts = {x.shape[:1] for x in jax.tree.leaves(vectors)}
        if shapes != jax.tree.map(lambda s: tuple(s.shape), structure) or len(counts) != 1:
            raise ValueError(
                "`DeflationOf(vectors)`: leaves have the shapes of those of y behind a leading "
                f"axis that counts vectors; y has {structure}, and they have "
                f"{tree.structure(vectors)}."
            )
        return vectors


def _deflated(operator, v, jv, sigma) -> lx.AbstractLinearOperator:
    """M⁻¹ from the rows of Vᵀ and (JV)ᵀ."""
    structure = operator.in_structure()
    inverse, fine = inverted(v.conj() @ jv.T)  # H⁻¹
    middle = sigma * inverse - jnp.eye(len(v), dtype=v.dtype)
    middle = jnp.where(fine, middle, jnp.zeros_like(middle))
    low_rank = LowRank(jnp.ones_like(sigma), v.T, middle, v.conj(), tree.freeze(structure))
    return JacobianOperator(low_rank, operator.out_structure(), structure)

"""IDR(s), induced dimension reduction."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Inexact, PyTree

from .. import tree
from ..precondition.base import AbstractPreconditioner, Identity
from ..typing import Count, ScalarLike, Vector
from .basis import Basis
from .shadow import shadow_space
from .short_recurrence import AbstractShortRecurrence, Context, Progress

# Below this cosine of the angle between r and A M⁻¹r, ω is enlarged.
_KAPPA = 0.7


class _Memory(NamedTuple):
    images: Basis  # G = A U
    directions: Basis  # U
    overlaps: Inexact[Array, "s s"]  # PᴴG, lower triangular
    f: Inexact[Array, " s"]  # Pᴴr
    omega: Array
    k: Count  # 0 … s − 1: a step within the space; s: the step to the next one


class IDR(AbstractShortRecurrence):
    """Induced dimension reduction, IDR(s), for square, nonsymmetric A x = b, preconditioned on the
    right.

    Forces the residual into spaces of falling dimension,
    G_{j+1} = (I − ω_{j+1} A M⁻¹)(G_j ∩ P^⊥), with P of s fixed random orthonormal columns: s steps
    find the vectors of G_j and remove their part of r, one step more chooses ω and enters G_{j+1}.
    In exact arithmetic r = 0 after at most n + n/s matvecs. The residual need not fall
    monotonically.

    **Arguments:**

    - `rtol`, `atol`: tolerances of a solve by `lx.linear_solve` and of the adjoint. Newton passes
      its forcing term instead.
    - `max_steps`: at most this many steps, of one matvec each; 10 n by default.
    - `preconditioner`: see `nks.AbstractPreconditioner`.
    - `s`: dimension of the shadow space, cut to n. IDR(1) does what BiCGStab does; each vector
      more brings it nearer to full GMRES, and costs 3 vectors of memory.

    Breakdown (a diagonal entry of PᴴG, or ω, that is zero to rounding relative to its factors)
    begins a new round from where it is; `num_restarts` counts how often. Reports `breakdown` where
    that does not help or A v is not finite, `max_steps_reached` and `stagnation`.

    Storage: P, U and G of s vectors each, x, r, b, and x and r of the round's start: 3 s + 5, and 5
    more within a step. Work: one matvec, one preconditioner application, six passes over s vectors
    and five reductions a step.

    Source: van Gijzen & Sonneveld, ACM Trans. Math. Softw. 38(1), 2011, algorithm 2 (the variant
    with bi-orthogonality); ω: Sleijpen & van der Vorst, Numer. Algorithms 10, 1995, κ = 0.7.
    """

    rtol: ScalarLike = 1e-6
    atol: ScalarLike = 0.0
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: AbstractPreconditioner = Identity()
    s: int = eqx.field(static=True, default=4)

    def __check_init__(self):
        if self.s < 1:
            raise ValueError(f"`s` must be at least 1, but it is {self.s}.")

    def workspace(self, vector: Vector, *, real: bool) -> PyTree:
        """P."""
        if not tree.size(vector):
            return None
        dimension = tree.size(vector)
        if real and any(jnp.iscomplexobj(leaf) for leaf in jtu.tree_leaves(vector)):
            dimension *= 2
        return shadow_space(vector, max(min(self.s, dimension), 1), real=real)

    def begin(self, context: Context, progress: Progress) -> tuple[Progress, PyTree]:
        if context.workspace is None:
            return progress, None
        shadow: Basis = context.workspace
        s = shadow.size
        empty = Basis.allocate(progress.r, s, real=shadow.real)
        f = shadow.dots(progress.r, jnp.int32(s))
        one = jnp.ones((), f.dtype)
        k = jnp.zeros_like(progress.num_steps)
        return progress, _Memory(empty, empty, jnp.eye(s, dtype=f.dtype), f, one, k)

    def advance(
        self, context: Context, progress: Progress, memory: _Memory | None
    ) -> tuple[Progress, _Memory | None]:
        if memory is None:
            return progress, None
        shadow: Basis = context.workspace
        images, directions, overlaps, f, omega, k = memory
        s = jnp.int32(shadow.size)
        index = jnp.arange(shadow.size, dtype=jnp.int32)
        last = k == s
        row = jnp.minimum(k, s - 1)

        # A vector orthogonal to P (f vanishes before k, and at the last step), …
        c = _lower_solve(overlaps, f)
        v = context.solve(tree.sub(progress.r, images.combine(c, s)))
        u = tree.axpy(jnp.where(last, 1, omega), v, directions.combine(c, s))
        image = context.mv(u)
        # … its image made orthogonal to p_i, i < k, …
        h = jnp.where((index < k) & ~last, shadow.dots(image, s), 0)
        a = jnp.where((index < k) & ~last, _lower_solve(overlaps, h), 0)
        g = tree.sub(image, images.combine(a, s))
        u = tree.sub(u, directions.combine(a, s))
        # … and the step along it: to f_k = 0, or to the least residual.
        square = tree.vdot(g, g).real
        product = context.dot(g, progress.r)
        cosine = jnp.abs(product) / (jnp.sqrt(square) * progress.residual)
        safe = jnp.where(cosine < _KAPPA, _KAPPA / cosine, 1).astype(product.dtype)
        best = safe * product / square.astype(product.dtype)
        probe = tree.where(last, tree.axpy(-best, g, progress.r), g)
        m = shadow.dots(probe, s)
        pivot = jnp.sum(jnp.where(index == row, m, 0))
        length = jnp.where(last, best, jnp.sum(jnp.where(index == row, f, 0)) / pivot)
        r = tree.axpy(-length, g, progress.r)
        residual = context.norm(r)
        weak = jnp.where(last, cosine, jnp.abs(pivot) / jnp.sqrt(square))
        ok = (weak > context.eps) & jnp.isfinite(residual)

        column = jnp.where(index >= k, m, 0)
        filled = jnp.where((index == row)[None, :] & ~last, column[:, None], overlaps)
        memory = _Memory(
            images=images.set_row(row, tree.where(last, images.row(row), g)),
            directions=directions.set_row(row, tree.where(last, directions.row(row), u)),
            overlaps=filled,
            f=jnp.where(last, m, jnp.where(index > k, f - length * m, 0)),
            omega=jnp.where(last, best, omega),
            k=jnp.where(last, 0, k + 1),
        )
        progress = progress._replace(
            x=tree.where(ok, tree.axpy(length, u, progress.x), progress.x),
            r=tree.where(ok, r, progress.r),
            residual=jnp.where(ok, residual, progress.residual),
            broken=~ok,
        ).worked(steps=1, matvecs=1, applications=1)
        return progress, memory


def _lower_solve(matrix: Array, rhs: Array) -> Any:
    """L⁻¹ rhs of a lower triangular L."""
    return lax.linalg.triangular_solve(matrix, rhs[:, None], left_side=True, lower=True)[:, 0]

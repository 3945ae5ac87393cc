"""A polynomial in J that is small on an interval of its spectrum."""

from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array

from .. import tree
from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..typing import Args, LinearFn, Scalar, ScalarLike, Vector, Y
from .base import AbstractPreconditioner
from .composite import OperatorMap


class Chebyshev(AbstractPreconditioner):
    """M⁻¹ = p(J), the polynomial of degree d for which max |1 − λp(λ)| on [a, b] is least: d + 1
    steps of Chebyshev's iteration for J z = v from z = 0, the first of which costs no matvec.

    For J with real spectrum of one sign: a definite symmetric J, or one close to it. Both bounds
    may be negative. Eigenvalues between 0 and a do no harm, M⁻¹J lies in (0, 1) there; those beyond
    b are amplified, quickly with the degree. It needs nothing but matvecs and has no reductions: it
    saves iterations (orthogonalisation, synchronisation), seldom matvecs.

    **Arguments:**

    - `degree`: d.
    - `bounds`: (a, b), or a function `(y, args) -> (a, b)`. By default they are estimated at every
      linearisation from `probes` Lanczos steps: b is 1.05 times the Ritz value furthest from zero
      and its residual bound; a is the Ritz value of that sign nearest to zero, but at least
      b / `ratio`. That is right for symmetric J; for others give bounds of the real parts of the
      eigenvalues.
    - `ratio`: at most so large is b/a; with 30 this is a smoother.
    - `probes`: Lanczos steps of the estimate.

    The matvecs of an application are not among `num_matvecs`: d for each of
    `num_preconditioner_applications`. Those of the estimate are `num_probes`.

    Storage: 3 vectors while it is applied. Work: d matvecs, no reductions.

    Source: Saad, Iterative Methods for Sparse Linear Systems, 2nd ed., algorithm 12.1; the residual
    bound of a Ritz value: Parlett, The Symmetric Eigenvalue Problem, SIAM 1998, section 13.2.
    """

    degree: int = eqx.field(static=True)
    bounds: Any = None
    ratio: ScalarLike = 1e3
    probes: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        if self.degree < 0:
            raise ValueError(f"`Chebyshev(degree)` must not be negative, but it is {self.degree}.")
        if self.probes < 1:
            raise ValueError(f"`Chebyshev(probes)` must be at least 1, but it is {self.probes}.")
        known = isinstance(self.bounds, tuple) and all(
            isinstance(bound, (int, float)) for bound in self.bounds
        )
        if known and not (len(self.bounds) == 2 and self.bounds[0] * self.bounds[1] > 0):
            raise ValueError(
                "`Chebyshev(bounds)` are two numbers (a, b) of one sign, but they are "
                f"{self.bounds}. An indefinite J has no such polynomial."
            )

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        structure = operator.in_structure()
        if self.bounds is None:
            a, b = self._estimated(operator)
        else:
            bounds: Any = self.bounds(y, args) if callable(self.bounds) else self.bounds
            a, b = bounds
        dtype = tree.real_dtype(structure)
        a, b = jnp.asarray(a).astype(dtype), jnp.asarray(b).astype(dtype)
        polynomial = _Polynomial(OperatorMap(operator), (a + b) / 2, (b - a) / 2, self.degree)
        return JacobianOperator(polynomial, operator.out_structure(), structure)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        if self.bounds is not None:
            return 0
        return min(self.probes, max(tree.size(operator.in_structure()), 1))

    def matvecs_per_application(self, operator: lx.AbstractLinearOperator) -> int:
        return self.degree

    def _estimated(self, operator: lx.AbstractLinearOperator) -> tuple[Array, Array]:
        steps = self.num_probes(operator, None, None)
        alpha, beta = _lanczos(operator.mv, random_vector(operator.in_structure()), steps)
        t = jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1)
        t = jnp.where(jnp.isfinite(t).all(), t, jnp.eye(steps, dtype=t.dtype))
        ritz, vectors = jnp.linalg.eigh(t)
        far = jnp.argmax(jnp.abs(ritz))
        sign = jnp.where(ritz[far] < 0, -1, 1).astype(t.dtype)
        residual = jnp.abs(beta[-1] * vectors[-1, far])
        b = 1.05 * (jnp.abs(ritz[far]) + jnp.where(jnp.isfinite(residual), residual, 0))
        b = jnp.where(b > 0, b, jnp.ones_like(b))
        near = jnp.min(jnp.where(sign * ritz > 0, sign * ritz, b))
        a = jnp.clip(near, b / jnp.asarray(self.ratio).astype(b.dtype), 0.99 * b)
        return sign * a, sign * b


class _Polynomial(AbstractLinearMap):
    """v → p(J) v; its transpose is p(Jᵀ)."""

    linear_map: AbstractLinearMap
    centre: Scalar  # θ
    half_width: Scalar  # δ
    degree: int = eqx.field(static=True)

    def mv(self, vector: Vector) -> Vector:
        return self._apply(self.linear_map.mv, vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        return self._apply(self.linear_map.transpose_mv, vector)

    def _apply(self, mv: LinearFn, r: Vector) -> Vector:
        theta, delta = self.centre, self.half_width
        # σ = θ/δ and ρ of the paper, as ρ/δ: finite also where a = b.
        d = tree.scale(1 / theta, r)

        def step(_, carry):
            x, r, d, rho = carry
            r = tree.sub(r, mv(d))
            new = 1 / (2 * theta - delta**2 * rho)
            d = tree.axpy(new * delta**2 * rho, d, tree.scale(2 * new, r))
            return tree.add(x, d), r, d, new

        return lax.fori_loop(0, self.degree, step, (d, r, d, 1 / theta))[0]


def random_vector(structure: tree.Structure, seed: int = 0) -> Vector:
    """Standard normal entries, the same at every call; complex where a leaf is."""
    leaves, treedef = jtu.tree_flatten(structure)
    keys = jax.random.split(jax.random.key(seed), max(len(leaves), 1))
    drawn = [jax.random.normal(k, s.shape, s.dtype) for k, s in zip(keys, leaves, strict=False)]
    return jtu.tree_unflatten(treedef, drawn)


def _lanczos(mv: LinearFn, start: Vector, steps: int) -> tuple[Array, Array]:
    """The diagonal and the off-diagonal (the last residual included) of Lanczos' T."""
    norm = tree.norm2(start)
    zero, one = jnp.zeros_like(norm), jnp.ones_like(norm)

    def step(carry, _):
        previous, v, beta = carry
        w = tree.axpy(-beta, previous, mv(v))
        alpha = tree.vdot(v, w).real.astype(norm.dtype)
        w = tree.axpy(-alpha, v, w)
        # An invariant subspace: T splits, and what follows must not count.
        new = tree.norm2(w)
        new = jnp.where(new > 10 * tree.eps(v) * (jnp.abs(alpha) + beta), new, zero)
        w = tree.scale(jnp.where(new > 0, 1 / jnp.where(new > 0, new, one), zero), w)
        ended = tree.norm2(v) < 0.5
        return (v, w, new), (jnp.where(ended, jnp.nan, alpha), new)

    unit = tree.scale(jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, one), zero), start)
    _, (alpha, beta) = lax.scan(step, (tree.zeros_like(unit), unit, zero), None, length=steps)
    # Rows after the end repeat the first, so that they add no Ritz value.
    return jnp.where(jnp.isnan(alpha), alpha[0], alpha), beta

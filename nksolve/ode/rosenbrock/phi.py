"""The exponential and the φ-functions of a small dense matrix."""

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array

# The Taylor polynomial of degree 16 has a backward error below 2⁻⁵³ for norms up to this.
_NORM = 0.78
_DEGREE = 16
# A norm of 2⁶⁰ is beyond what a step can mean.
_MOST_SQUARINGS = 60


def exponentials(matrix: Array) -> tuple[Array, Array]:
    """(exp(T/2), exp(T)); not finite where T is not, or where exp(T) overflows.

    By scaling and squaring of the Taylor polynomial, products alone: `jax.scipy.linalg.expm` takes
    seconds to compile. Powers of two on the diagonal commute with all of it, so that the small
    entries that a φ-function of high index has after scaling keep their digits.

    Source: Higham, Functions of Matrices, SIAM 2008, §10.3 (scaling and squaring) and §4.2
    (Paterson–Stockmeyer); Al-Mohy & Higham, SIAM J. Sci. Comput. 33 (2011) for the degree.
    """
    dtype = matrix.dtype
    norm = jnp.max(jnp.sum(jnp.abs(matrix), axis=0))
    known = jnp.isfinite(norm)
    wanted = jnp.ceil(jnp.log2(jnp.where(known & (norm > _NORM), norm, _NORM) / _NORM))
    # At least one, since half of T is asked for too.
    squarings = jnp.clip(wanted.astype(jnp.int32), 1, _MOST_SQUARINGS)
    scaled = matrix * jnp.exp2(-squarings.astype(dtype))
    power = lambda e: jnp.matmul(e, e, precision=lax.Precision.HIGHEST)
    half = lax.fori_loop(0, squarings - 1, lambda _, e: power(e), _taylor(scaled))
    return half, power(half)


def _taylor(matrix: Array) -> Array:
    """Σ_{k≤16} Aᵏ/k! by six products."""
    dot = lambda a, b: jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    powers = [jnp.eye(matrix.shape[0], dtype=matrix.dtype), matrix]
    for _ in range(2, 5):
        powers.append(dot(powers[-1], matrix))
    inverse_factorials = [1.0]
    for k in range(1, _DEGREE + 1):
        inverse_factorials.append(inverse_factorials[-1] / k)
    found = inverse_factorials[_DEGREE] * powers[0]
    for first in range(_DEGREE - 4, -1, -4):
        found = dot(found, powers[4])
        for k in range(4):
            found = found + inverse_factorials[first + k] * powers[k]
    return found


def augmented(matrix: Array, count: int) -> Array:
    """[[H, e₁ 0], [0, N]], N the shift of `count` rows; its exponential has φ-functions of H."""
    n = matrix.shape[0]
    big = jnp.zeros((n + count, n + count), matrix.dtype).at[:n, :n].set(matrix)
    rows = jnp.array([0, *range(n, n + count - 1)], jnp.int32)
    return big.at[rows, jnp.arange(n, n + count)].set(1)


def first_columns(matrix: Array, count: int) -> Array:
    """cᵏ φ_k(cH) e₁ for c = ½, 1 and k = 0 … `count`, as an array of shape (2, count + 1, n).

    From one exponential of a matrix that is larger by `count`, which must be positive.

    Source: Saad, SIAM J. Numer. Anal. 29 (1992), Proposition 2.1 for φ₁; Sidje, ACM Trans. Math.
    Softw. 24 (1998), Theorem 1, and Al-Mohy & Higham, SIAM J. Sci. Comput. 33 (2011), for all.
    """
    n = matrix.shape[0]
    columns = jnp.array([0, *range(n, n + count)], jnp.int32)
    return jnp.stack([e[:n, columns].T for e in exponentials(augmented(matrix, count))])

"""Watson's function: a polynomial fitted to a differential equation, ever worse conditioned."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Problem, floating


def watson_residual(x: Float[Array, " n"], args: None) -> Float[Array, " n"]:
    """Half the gradient of the sum of squares of `watson_terms`, as in MINPACK's tests."""
    del args
    n = x.shape[0]
    powers, slopes = _watson_tables(n, x.dtype)
    value = powers @ x
    terms = slopes @ x - value**2 - 1.0
    f = (slopes - 2.0 * value[:, None] * powers).T @ terms
    last = x[1] - x[0] ** 2 - 1.0
    corner = jnp.stack([x[0] - 2.0 * x[0] * last, last])
    return f.at[:2].add(corner)


def watson_terms(x: Float[Array, " n"]) -> Float[Array, "31"]:
    """The 31 residuals whose sum of squares Watson's problem minimises."""
    powers, slopes = _watson_tables(x.shape[0], x.dtype)
    terms = slopes @ x - (powers @ x) ** 2 - 1.0
    return jnp.concatenate([terms, jnp.stack([x[0], x[1] - x[0] ** 2 - 1.0])])


def _watson_tables(n: int, dtype) -> tuple[Float[Array, "29 n"], Float[Array, "29 n"]]:
    """t_i^{j−1} and (j−1) t_i^{j−2} for t_i = i/29."""
    t = np.arange(1, 30)[:, None] / 29.0
    j = np.arange(n)[None, :]
    return jnp.asarray(t**j, dtype), jnp.asarray(j * t ** np.maximum(j - 1, 0), dtype)


def watson(n: int = 2, *, dtype: DTypeLike | None = None) -> Problem:
    """Half the gradient of Watson's sum of 31 squares (a polynomial fit to an ODE), 2 ≤ n ≤ 31.

    y has shape (n,), start 0. Published minima of the sum of squares ("sum_of_squares"): 2.28767e-3
    for n = 6, 1.39976e-6 for n = 9, 4.72238e-10 for n = 12; ever worse conditioned. (The library's
    own code counts j from 1 where the paper counts from 0, and accumulates into its output; this is
    the paper's.)
    Source: Moré, Garbow & Hillstrom, ACM Trans. Math. Softw. 7(1), 1981, problem 20; test_nonlin 6.
    """
    if not 2 <= n <= 31:
        raise ValueError(f"n must be between 2 and 31, not {n}")
    minimum = {6: 2.28767e-3, 9: 1.39976e-6, 12: 4.72238e-10}.get(n)
    return Problem(
        name="watson",
        title=f"Watson's function, n = {n}",
        source="More, Garbow & Hillstrom (1981), problem 20; test_nonlin, problem 6",
        fn=watson_residual,
        y0=jnp.zeros((n,), floating(dtype)),
        tags=frozenset({"nonlinear-library", "symmetric", "ill-conditioned"}),
        published={} if minimum is None else {"sum_of_squares": minimum},
    )

"""The problems of variable size among the 23 of Burkardt's test_nonlin (as in Julia's library).

"MGH" is Moré, Garbow & Hillstrom, Testing Unconstrained Optimization Software, ACM Trans. Math.
Softw. 7(1), 1981, with its numbers. `args` is None throughout, y has shape (n,), and n = 10 unless
said. Problem 23 is `chandrasekhar_right`.
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Problem, at_least, floating, identity, interior
from .stencils import neighbour_sum, shifted


def _indices(x: Float[Array, " n"]) -> Float[Array, " n"]:
    return jnp.arange(1, x.shape[0] + 1, dtype=x.dtype)


def _problem(name, number, title, fn, start, root, source, tags, dtype, **more) -> Problem:
    dtype = floating(dtype)
    continuum = more.pop("continuum", None)
    return Problem(
        name=name,
        title=f"{title}, n = {len(start)}",
        source=f"{source}; test_nonlin, problem {number}",
        fn=fn,
        y0=jnp.asarray(start, dtype),
        root=None if root is None else jnp.asarray(root, dtype),
        continuum=None if continuum is None else jnp.asarray(continuum, dtype),
        tags=frozenset({"nonlinear-library", *tags}),
        **more,
    )


def generalised_rosenbrock_residual(x: Float[Array, " n"], args: None) -> Float[Array, " n"]:
    """1 − x₁, then 10 (x_i − x_{i−1}²)."""
    del args
    return jnp.concatenate([1.0 - x[:1], 10.0 * (x[1:] - x[:-1] ** 2)])


def generalised_rosenbrock(n: int = 10, *, dtype: DTypeLike | None = None) -> Problem:
    """1 − x₁ and 10(x_i − x_{i−1}²), i = 2…n; start (−1.2, 1, …, 1), root (1, …, 1).

    n = 2 is Rosenbrock's function, MGH (1). Newton's first step meets x₁ = 1 and sets off a cascade
    of squarings, which grow doubly exponentially in n. Source: test_nonlin 1.
    """
    at_least("n", n, 2)
    start = np.ones(n)
    start[0] = -1.2
    return _problem(
        "generalised-rosenbrock",
        1,
        "generalised Rosenbrock function",
        generalised_rosenbrock_residual,
        start,
        np.ones(n),
        "Rosenbrock (1960)",
        {"nonsymmetric"},
        dtype,
    )


def chebyquad_residual(x: Float[Array, " n"], args: None) -> Float[Array, " n"]:
    """Means of T_1…T_n over the points, less their means over [−1, 1]."""
    del args
    n = x.shape[0]
    before, now = jnp.ones_like(x), x
    rows = []
    for degree in range(1, n + 1):
        mean = -1.0 / (degree**2 - 1) if degree % 2 == 0 else 0.0
        rows.append(jnp.mean(now) - mean)
        before, now = now, 2.0 * x * now - before
    return jnp.stack(rows)


def chebyquad(n: int = 2, *, dtype: DTypeLike | None = None) -> Problem:
    """Σ_j T_i(x_j)/n − ½∫T_i = 0, i ≤ n: abscissae of Chebyshev's quadrature on [−1, 1].

    Start x_i = (2i − n)/(n + 1), root ±1/√3 for n = 2. Real roots exist for n ≤ 7 and n = 9 only.
    (MGH (35) has the interval [0, 1].) Source: Fletcher, Comput. J. 8 (1965); test_nonlin 7.
    """
    at_least("n", n, 1)
    start = (2.0 * np.arange(1, n + 1) - n) / (n + 1)
    root = {1: (0.0,), 2: (-np.sqrt(1 / 3), np.sqrt(1 / 3))}.get(n)
    return _problem(
        "chebyquad",
        7,
        "Chebyquad",
        chebyquad_residual,
        start,
        root,
        "Fletcher, Comput. J. 8 (1965)",
        {"nonsymmetric"},
        dtype,
    )


def brown_almost_linear_residual(x: Float[Array, " n"], args: None) -> Float[Array, " n"]:
    """MGH (27)."""
    del args
    n = x.shape[0]
    return jnp.concatenate([x[:-1] + jnp.sum(x) - (n + 1.0), jnp.prod(x)[None] - 1.0])


def brown_almost_linear(n: int = 10, *, dtype: DTypeLike | None = None) -> Problem:
    """x_i + Σx_j − (n+1), i < n, and Πx_j − 1; start ½, root (1, …, 1) and (α, …, α, α^{1−n}).

    At the start the last row of the Jacobian is 2^{1−n}, so Newton's first step is enormous.
    Source: MGH (27); test_nonlin 8.
    """
    at_least("n", n, 2)
    return _problem(
        "brown-almost-linear",
        8,
        "Brown's almost linear function",
        brown_almost_linear_residual,
        np.full(n, 0.5),
        np.ones(n),
        "MGH (27)",
        {"several-roots"},
        dtype,
    )


def _boundary_value_parts(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The start t(t − 1) and the continuous solution 2/(2 − t) − t − 1 of MGH (28) and (29)."""
    t = interior(n)
    return t * (t - 1.0), 2.0 / (2.0 - t) - t - 1.0


def discrete_boundary_value_residual(x: Float[Array, " n"], args: None) -> Float[Array, " n"]:
    """MGH (28)."""
    del args
    h = 1.0 / (x.shape[0] + 1)
    return 2.0 * x - neighbour_sum(x) + 0.5 * h**2 * (x + h * _indices(x) + 1.0) ** 3


def discrete_boundary_value(n: int = 10, *, dtype: DTypeLike | None = None) -> Problem:
    """2x_i − x_{i−1} − x_{i+1} + ½h²(x_i + t_i + 1)³, t_i = ih, h = 1/(n+1); start t_i(t_i − 1).

    Discretises u″ = ½(u + t + 1)³, u(0) = u(1) = 0, whose solution is 2/(2 − t) − t − 1
    (`continuum`).
    Source: MGH (28); test_nonlin 9.
    """
    at_least("n", n, 1)
    start, exact = _boundary_value_parts(n)
    return _problem(
        "discrete-boundary-value",
        9,
        "discrete boundary value function",
        discrete_boundary_value_residual,
        start,
        None,
        "MGH (28)",
        {"1d", "symmetric"},
        dtype,
        continuum=exact,
        field=identity,
    )


def discrete_integral_equation_residual(x: Float[Array, " n"], args: None) -> Float[Array, " n"]:
    """MGH (29), by cumulative sums: O(n)."""
    del args
    h = 1.0 / (x.shape[0] + 1)
    t = h * _indices(x)
    cubes = (x + t + 1.0) ** 3
    left = jnp.cumsum(t * cubes)
    right_terms = (1.0 - t) * cubes
    right = jnp.sum(right_terms) - jnp.cumsum(right_terms)
    return x + 0.5 * h * ((1.0 - t) * left + t * right)


def discrete_integral_equation(n: int = 10, *, dtype: DTypeLike | None = None) -> Problem:
    """x_i + ½h[(1 − t_i) Σ_{j≤i} t_j (x_j + t_j + 1)³ + t_i Σ_{j>i} (1 − t_j)(x_j + t_j + 1)³].

    The Green's function form of `discrete_boundary_value`, the same start and the same roots.
    (Burkardt's code, unlike the paper, counts j = i in both sums; this is the paper's.)
    Source: MGH (29); test_nonlin 10.
    """
    at_least("n", n, 1)
    start, exact = _boundary_value_parts(n)
    return _problem(
        "discrete-integral-equation",
        10,
        "discrete integral equation function",
        discrete_integral_equation_residual,
        start,
        None,
        "MGH (29)",
        {"1d", "dense", "integral-equation"},
        dtype,
        continuum=exact,
        field=identity,
    )


def trigonometric_residual(x: Float[Array, " n"], args: None) -> Float[Array, " n"]:
    """MGH (26)."""
    del args
    versines = 1.0 - jnp.cos(x)
    return jnp.sum(versines) + _indices(x) * versines - jnp.sin(x)


def trigonometric(n: int = 10, *, dtype: DTypeLike | None = None) -> Problem:
    """n − Σ cos x_j + i(1 − cos x_i) − sin x_i; start 1/n, root 0 (and others).

    The trap: for n = 10 the sum of squares has a local minimum 2.79506e-5 ("local_minimum").
    Source: MGH (26); test_nonlin 11.
    """
    at_least("n", n, 1)
    return _problem(
        "trigonometric",
        11,
        "trigonometric function",
        trigonometric_residual,
        np.full(n, 1.0 / n),
        np.zeros(n),
        "MGH (26)",
        {"trap", "several-roots", "dense"},
        dtype,
        published={"local_minimum": 2.79506e-5} if n == 10 else {},
    )


def variably_dimensioned_residual(x: Float[Array, " n"], args: None) -> Float[Array, " n"]:
    """Half the gradient of MGH (25)."""
    del args
    weights = _indices(x)
    moment = jnp.sum(weights * (x - 1.0))
    return x - 1.0 + weights * (moment * (1.0 + 2.0 * moment**2))


def variably_dimensioned(n: int = 10, *, dtype: DTypeLike | None = None) -> Problem:
    """x_i − 1 + i s(1 + 2s²) with s = Σ j(x_j − 1); start 1 − i/n, root (1, …, 1).

    The Jacobian is the identity and a matrix of rank one. Source: MGH (25); test_nonlin 12.
    """
    at_least("n", n, 1)
    return _problem(
        "variably-dimensioned",
        12,
        "variably dimensioned function",
        variably_dimensioned_residual,
        1.0 - np.arange(1, n + 1) / n,
        np.ones(n),
        "MGH (25)",
        {"symmetric", "dense"},
        dtype,
    )


def broyden_tridiagonal_residual(x: Float[Array, " n"], args: None) -> Float[Array, " n"]:
    """MGH (30)."""
    del args
    return (3.0 - 2.0 * x) * x - shifted(x, -1, 0) - 2.0 * shifted(x, 1, 0) + 1.0


def broyden_tridiagonal(n: int = 10, *, dtype: DTypeLike | None = None) -> Problem:
    """(3 − 2x_i)x_i − x_{i−1} − 2x_{i+1} + 1, x_0 = x_{n+1} = 0; start −1.

    Source: MGH (30); Broyden, Math. Comp. 19 (1965); test_nonlin 13.
    """
    at_least("n", n, 1)
    return _problem(
        "broyden-tridiagonal",
        13,
        "Broyden's tridiagonal function",
        broyden_tridiagonal_residual,
        np.full(n, -1.0),
        None,
        "MGH (30)",
        {"nonsymmetric", "banded"},
        dtype,
        field=identity,
    )


def broyden_banded_residual(x: Float[Array, " n"], args: None) -> Float[Array, " n"]:
    """MGH (31)."""
    del args
    n = x.shape[0]
    terms = x * (1.0 + x)
    band = sum(shifted(terms, k, 0) for k in (-5, -4, -3, -2, -1, 1) if abs(k) <= n)
    return x * (2.0 + 5.0 * x**2) + 1.0 - band


def broyden_banded(n: int = 10, *, dtype: DTypeLike | None = None) -> Problem:
    """x_i(2 + 5x_i²) + 1 − Σ x_j(1 + x_j) over i − 5 ≤ j ≤ i + 1, j ≠ i; start −1.

    Source: MGH (31); Broyden, Math. Comp. 25 (1971); test_nonlin 14.
    """
    at_least("n", n, 1)
    return _problem(
        "broyden-banded",
        14,
        "Broyden's banded function",
        broyden_banded_residual,
        np.full(n, -1.0),
        None,
        "MGH (31)",
        {"nonsymmetric", "banded"},
        dtype,
        field=identity,
    )

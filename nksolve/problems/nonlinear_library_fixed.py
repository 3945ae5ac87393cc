"""The problems of fixed size among the 23 of Burkardt's test_nonlin (NonlinearProblemLibrary.jl).

"MGH" is Moré, Garbow & Hillstrom, Testing Unconstrained Optimization Software, ACM Trans. Math.
Softw. 7(1), 1981, with its numbers. `args` is None throughout.
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Problem, floating


def _problem(name, number, title, fn, start, root, source, tags, dtype) -> Problem:
    dtype = floating(dtype)
    return Problem(
        name=name,
        title=title,
        source=f"{source}; test_nonlin, problem {number}",
        fn=fn,
        y0=jnp.asarray(start, dtype),
        root=None if root is None else jnp.asarray(root, dtype),
        tags=frozenset({"nonlinear-library", "small", *tags}),
    )


def powell_singular_residual(x: Float[Array, "4"], args: None) -> Float[Array, "4"]:
    """MGH (13)."""
    del args
    x1, x2, x3, x4 = x
    return jnp.stack(
        [
            x1 + 10.0 * x2,
            np.sqrt(5.0).item() * (x3 - x4),
            (x2 - 2.0 * x3) ** 2,
            np.sqrt(10.0).item() * (x1 - x4) ** 2,
        ]
    )


def powell_singular(*, dtype: DTypeLike | None = None) -> Problem:
    """x₁ + 10x₂, √5 (x₃ − x₄), (x₂ − 2x₃)², √10 (x₁ − x₄)²; y of shape (4,), start (3, −1, 0, 1).

    Root 0, where the Jacobian has rank 2: Newton's method converges linearly, halving the error.
    Source: MGH (13); test_nonlin 2.
    """
    return _problem(
        "powell-singular",
        2,
        "Powell's singular function",
        powell_singular_residual,
        (3.0, -1.0, 0.0, 1.0),
        np.zeros(4),
        "MGH (13)",
        {"singular-root"},
        dtype,
    )


def powell_badly_scaled_residual(x: Float[Array, "2"], args: None) -> Float[Array, "2"]:
    """MGH (3)."""
    del args
    x1, x2 = x
    return jnp.stack([1e4 * x1 * x2 - 1.0, jnp.exp(-x1) + jnp.exp(-x2) - 1.0001])


def powell_badly_scaled(*, dtype: DTypeLike | None = None) -> Problem:
    """1e4 x₁x₂ − 1, e^{−x₁} + e^{−x₂} − 1.0001; y of shape (2,), start (0, 1).

    Root (1.098159e-5, 9.106147), and its mirror image.
    Source: MGH (3); test_nonlin 3.
    """
    root = (1.0981593296998175e-5, 9.106146739866524)
    return _problem(
        "powell-badly-scaled",
        3,
        "Powell's badly scaled function",
        powell_badly_scaled_residual,
        (0.0, 1.0),
        root,
        "MGH (3)",
        {"badly-scaled"},
        dtype,
    )


def wood_residual(x: Float[Array, "4"], args: None) -> Float[Array, "4"]:
    """The gradient of MGH (14), rows 1 and 3 halved, as in MINPACK's tests."""
    del args
    x1, x2, x3, x4 = x
    s, t = x2 - x1**2, x4 - x3**2
    return jnp.stack(
        [
            -200.0 * x1 * s - (1.0 - x1),
            200.0 * s + 20.2 * (x2 - 1.0) + 19.8 * (x4 - 1.0),
            -180.0 * x3 * t - (1.0 - x3),
            180.0 * t + 20.2 * (x4 - 1.0) + 19.8 * (x2 - 1.0),
        ]
    )


def wood(*, dtype: DTypeLike | None = None) -> Problem:
    """The gradient of Wood's function, two rows halved; y of shape (4,).

    Start (−3, −1, −3, −1), root (1, 1, 1, 1). Newton's method from that start goes to another root,
    a saddle of the function near (−1, 1, −1, 1).

    Source: MGH (14); test_nonlin 4.
    """
    return _problem(
        "wood",
        4,
        "Wood's function",
        wood_residual,
        (-3.0, -1.0, -3.0, -1.0),
        np.ones(4),
        "MGH (14)",
        {"several-roots"},
        dtype,
    )


def helical_valley_residual(x: Float[Array, "3"], args: None) -> Float[Array, "3"]:
    """MGH (7); the angle runs over (−π/2, 3π/2), with its cut on the negative x₂ axis."""
    del args
    x1, x2, x3 = x
    left = x1 < 0
    angle = jnp.arctan2(jnp.where(left, -x2, x2), jnp.abs(x1)) + jnp.where(left, np.pi, 0.0).astype(
        x.dtype
    )
    theta = angle / (2.0 * np.pi)
    return jnp.stack([10.0 * (x3 - 10.0 * theta), 10.0 * (jnp.hypot(x1, x2) - 1.0), x3])


def helical_valley(*, dtype: DTypeLike | None = None) -> Problem:
    """10(x₃ − 10θ), 10(√(x₁² + x₂²) − 1), x₃; 2πθ is the polar angle of (x₁, x₂), in (−π/2, 3π/2).

    y of shape (3,), start (−1, 0, 0), root (1, 0, 0). Discontinuous across the negative x₂ axis.
    Source: MGH (7); test_nonlin 5.
    """
    return _problem(
        "helical-valley",
        5,
        "helical valley",
        helical_valley_residual,
        (-1.0, 0.0, 0.0),
        (1.0, 0.0, 0.0),
        "MGH (7)",
        {"discontinuous"},
        dtype,
    )


def dennis_schnabel_residual(x: Float[Array, "2"], args: None) -> Float[Array, "2"]:
    """Dennis & Schnabel's circle and line."""
    del args
    x1, x2 = x
    return jnp.stack([x1 + x2 - 3.0, x1**2 + x2**2 - 9.0])


def dennis_schnabel(*, dtype: DTypeLike | None = None) -> Problem:
    """x₁ + x₂ − 3, x₁² + x₂² − 9; y of shape (2,), start (1, 5), roots (0, 3) (`root`) and (3, 0).

    Source: Dennis & Schnabel, Numerical Methods for Unconstrained Optimization and Nonlinear
    Equations (1983), example 5.1.1; test_nonlin 17.
    """
    return _problem(
        "dennis-schnabel",
        17,
        "Dennis and Schnabel's 2x2 example",
        dennis_schnabel_residual,
        (1.0, 5.0),
        (0.0, 3.0),
        "Dennis & Schnabel (1983), example 5.1.1",
        {"several-roots"},
        dtype,
    )


def _one_minus_gauss(x: Float[Array, ""]) -> Float[Array, ""]:
    """(1 − e^{−x²})/x, continued by x near 0."""
    nonzero = jnp.where(x == 0, jnp.ones_like(x), x)
    return jnp.where(x == 0, x, -jnp.expm1(-(nonzero**2)) / nonzero)


def sample_18_residual(x: Float[Array, "2"], args: None) -> Float[Array, "2"]:
    """x₂² (1 − e^{−x₁²})/x₁ and x₁ (1 − e^{−x₂²})/x₂."""
    del args
    x1, x2 = x
    return jnp.stack([x2**2 * _one_minus_gauss(x1), x1 * _one_minus_gauss(x2)])


def sample_18(*, dtype: DTypeLike | None = None) -> Problem:
    """x₂² (1 − e^{−x₁²})/x₁, x₁ (1 − e^{−x₂²})/x₂; y of shape (2,), start (2, 2), root 0.

    The Jacobian at the root is zero; whole axes are roots, and the residual vanishes at infinity
    too.
    Source: test_nonlin 18.
    """
    return _problem(
        "sample-18",
        18,
        "sample problem 18",
        sample_18_residual,
        (2.0, 2.0),
        np.zeros(2),
        "Burkardt",
        {"singular-root"},
        dtype,
    )


def sample_19_residual(x: Float[Array, "2"], args: None) -> Float[Array, "2"]:
    """x ‖x‖²."""
    del args
    return x * jnp.sum(x**2)


def sample_19(*, dtype: DTypeLike | None = None) -> Problem:
    """x₁(x₁² + x₂²), x₂(x₁² + x₂²); y of shape (2,), start (3, 3), root 0.

    The Jacobian at the root is zero: Newton's method takes ⅔ of the error at each step.
    Source: test_nonlin 19.
    """
    return _problem(
        "sample-19",
        19,
        "sample problem 19",
        sample_19_residual,
        (3.0, 3.0),
        np.zeros(2),
        "Burkardt",
        {"singular-root"},
        dtype,
    )


def double_root_residual(x: Float[Array, "1"], args: None) -> Float[Array, "1"]:
    """x (x − 5)²."""
    del args
    return x * (x - 5.0) ** 2


def double_root(*, dtype: DTypeLike | None = None) -> Problem:
    """x(x − 5)²; y of shape (1,), start 1; roots 5, a double one (`root`), and 0.

    From 1 Newton's method goes to 0. Source: test_nonlin 20.
    """
    return _problem(
        "double-root",
        20,
        "scalar x (x - 5)^2",
        double_root_residual,
        (1.0,),
        (5.0,),
        "Burkardt",
        {"singular-root", "several-roots"},
        dtype,
    )


def freudenstein_roth_residual(x: Float[Array, "2"], args: None) -> Float[Array, "2"]:
    """MGH (2)."""
    del args
    x1, x2 = x
    return jnp.stack(
        [
            x1 - 13.0 + ((5.0 - x2) * x2 - 2.0) * x2,
            x1 - 29.0 + ((x2 + 1.0) * x2 - 14.0) * x2,
        ]
    )


def freudenstein_roth(*, dtype: DTypeLike | None = None) -> Problem:
    """−13 + x₁ + ((5 − x₂)x₂ − 2)x₂, −29 + x₁ + ((x₂ + 1)x₂ − 14)x₂; y of shape (2,).

    Start (0.5, −2), root (5, 4). The trap: ‖f‖² has a local minimum 48.9842 at (11.41…, −0.8968…),
    in which descent methods stop.
    Source: MGH (2); test_nonlin 21.
    """
    return _problem(
        "freudenstein-roth",
        21,
        "Freudenstein and Roth's function",
        freudenstein_roth_residual,
        (0.5, -2.0),
        (5.0, 4.0),
        "MGH (2)",
        {"trap"},
        dtype,
    )


def boggs_residual(x: Float[Array, "2"], args: None) -> Float[Array, "2"]:
    """x₁² − x₂ + 1 and x₁ − cos(πx₂/2)."""
    del args
    x1, x2 = x
    return jnp.stack([x1**2 - x2 + 1.0, x1 - jnp.cos(0.5 * np.pi * x2)])


def boggs(*, dtype: DTypeLike | None = None) -> Problem:
    """x₁² − x₂ + 1, x₁ − cos(πx₂/2); y of shape (2,), start (1, 0).

    Roots (0, 1) (`root`), (−1, 2) and (−√½, 3/2); Newton's method from that start goes to (−1, 2).
    Source: Boggs, SIAM J. Numer. Anal. 8 (1971); test_nonlin 22.
    """
    return _problem(
        "boggs",
        22,
        "Boggs's function",
        boggs_residual,
        (1.0, 0.0),
        (0.0, 1.0),
        "Boggs, SIAM J. Numer. Anal. 8 (1971)",
        {"several-roots"},
        dtype,
    )

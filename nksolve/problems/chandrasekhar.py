"""Chandrasekhar's H-equation of radiative transfer: dense, smooth, singular in the limit c = 1."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Problem, at_least, floating, identity


class ChandrasekharArgs(NamedTuple):
    """The albedo c and the kernel μ_i/(μ_i + μ_j)."""

    c: Float[Array, ""]
    kernel: Float[Array, "n n"]


def chandrasekhar_residual(x: Float[Array, " n"], args: ChandrasekharArgs) -> Float[Array, " n"]:
    """f_i = x_i − 1/(1 − (c/2n) Σ_j μ_i x_j/(μ_i + μ_j))."""
    n = x.shape[0]
    return x - 1.0 / (1.0 - (args.c / (2.0 * n)) * (args.kernel @ x))


def _problem(mu: np.ndarray, c: float, dtype: np.dtype, **rest) -> Problem:
    kernel = mu[:, None] / (mu[:, None] + mu[None, :])
    # Summed over i, the equations give m = 1 + c m²/4 for the mean, whatever the positive nodes.
    mean = 2.0 / (1.0 + np.sqrt(1.0 - c)) if c <= 1 else None
    return Problem(
        fn=chandrasekhar_residual,
        y0=jnp.ones(mu.shape, dtype),
        args=ChandrasekharArgs(jnp.asarray(c, dtype), jnp.asarray(kernel, dtype)),
        field=identity,
        **{**rest, "published": {**rest["published"], "mean": mean}},
    )


def chandrasekhar(n: int = 512, c: float = 0.5, *, dtype: DTypeLike | None = None) -> Problem:
    """Chandrasekhar's H-equation: x_i = 1/(1 − (c/2n) Σ_j μ_i x_j/(μ_i + μ_j)), μ_i = (i−½)/n.

    y has shape (n,), the start is one; `args` holds c and the n×n kernel. The root has the mean
    2/(1 + √(1−c)) exactly ("mean"); at c = 1 its Jacobian is singular. Published, where n = 512 and
    c = ½ (2-norms of the residual): "newton_history" 3.49504, 1.79697e-2 for exact Newton,
    "fixed_eta_history" for Newton–GMRES with η = 0.1.

    Source: Kelley, Solving Nonlinear Equations with Iterative Methods (SIAM, 2022), chapters 2–3,
    and SIAMFANLEquations.jl; the equation: Chandrasekhar, Radiative Transfer (1960).
    """
    at_least("n", n, 1)
    published = {}
    if n == 512 and c == 0.5:
        published = {
            "newton_history": (3.495045, 1.796972e-2, 3.5118e-7),
            "fixed_eta_history": (
                3.49504e00, 4.98627e-02, 1.84641e-03, 1.82363e-04, 2.34294e-06, 2.42620e-11,
            ),
        }  # fmt: skip
    tags = {"integral-equation", "dense", "published"}
    return _problem(
        (np.arange(1, n + 1) - 0.5) / n,
        c,
        floating(dtype),
        name="chandrasekhar",
        title=f"Chandrasekhar H-equation, midpoint rule, n = {n}, c = {c:g}",
        source="Kelley, Solving Nonlinear Equations with Iterative Methods (SIAM, 2022), chapter 2",
        tags=frozenset(tags | {"singular-root"} if c == 1 else tags),
        published=published,
    )


def chandrasekhar_right(n: int = 10, c: float = 0.9, *, dtype: DTypeLike | None = None) -> Problem:
    """The H-equation with the nodes μ_i = i/n: problem 23 of the nonlinear library.

    Otherwise as `chandrasekhar`; the same mean holds exactly.

    Source: Moré, A collection of nonlinear model problems (1989), through Burkardt's test_nonlin.
    """
    at_least("n", n, 1)
    return _problem(
        np.arange(1, n + 1) / n,
        c,
        floating(dtype),
        name="chandrasekhar-right",
        title=f"Chandrasekhar H-equation, right end points, n = {n}, c = {c:g}",
        source="Burkardt, test_nonlin, problem 23 (after More)",
        tags=frozenset({"integral-equation", "dense", "nonlinear-library"}),
        published={},
    )

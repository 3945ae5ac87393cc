"""The steady Brusselator in the plane: two species, periodic, nonsymmetric, with a local source."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Problem, at_least, floating


class BrusselatorArgs(NamedTuple):
    """A, B, the diffusion coefficient α, and the source f at the nodes."""

    a: Float[Array, ""]
    b: Float[Array, ""]
    alpha: Float[Array, ""]
    source: Float[Array, "n n"]


def brusselator_residual(y: Float[Array, "n n 2"], args: BrusselatorArgs) -> Float[Array, "n n 2"]:
    """(α Δ_h u + B + u²v − (A + 1)u + f, α Δ_h v + A u − u²v), h = 1/(n−1), periodic in n."""
    n = y.shape[0]
    # One more row and column on each side, by wrapping round.
    wrapped = jnp.pad(y, ((1, 1), (1, 1), (0, 0)), mode="wrap")
    vertical = wrapped[2:, 1:-1] + wrapped[:-2, 1:-1]
    horizontal = wrapped[1:-1, 2:] + wrapped[1:-1, :-2]
    laplacian = (n - 1.0) ** 2 * (vertical + horizontal - 4.0 * y)
    u, v = y[:, :, 0], y[:, :, 1]
    autocatalysis = u * u * v
    first = args.b + autocatalysis - (args.a + 1.0) * u + args.source
    second = args.a * u - autocatalysis
    return args.alpha * laplacian + jnp.stack([first, second], axis=-1)


def first_species(y: Float[Array, "n n 2"]) -> Float[Array, "n n"]:
    """u, the field that is plotted."""
    return y[:, :, 0]


def brusselator(
    n: int = 32,
    a: float = 3.4,
    b: float = 1.0,
    alpha: float = 10.0,
    source: float = 5.0,
    *,
    dtype: DTypeLike | None = None,
) -> Problem:
    """0 = α Δu + B + u²v − (A + 1)u + f, 0 = α Δv + A u − u²v on the unit square, periodic.

    y has shape (n, n, 2), (u, v) at the nodes (x_i, y_j) = (i/(n−1), j/(n−1)), i the first axis;
    five-point Laplacian with h = 1/(n−1), periodic in n nodes (so that the nodes at 0 and 1 are
    neighbours, not the same). f is `source` in the disc (x − 0.3)² + (y − 0.6)² ≤ 0.1², else zero.
    Start: u = 22 (y(1 − y))^{3/2}, v = 27 (x(1 − x))^{3/2}. `source=0` has the root u = B, v = A/B.

    The sums of the two equations say of every root that Σu = Σ(B + f) and Σ(A u − u²v) = 0.
    The benchmark that the start is taken from stops at ‖f‖∞ ≤ 1e-4 ("max_norm"), which is 2e-10 of
    that of the start at n = 128.

    Source: Hairer & Wanner, Solving ODEs II, section IV.10; the steady version is SciML's
    (NonlinearSolve.jl, ill-conditioned nonlinear systems).
    """
    at_least("n", n, 3)
    dtype = floating(dtype)
    nodes = np.arange(n) / (n - 1)
    x, y = nodes[:, None], nodes[None, :]
    disc = (x - 0.3) ** 2 + (y - 0.6) ** 2 <= 0.1**2
    start = np.stack(
        [
            np.broadcast_to(22.0 * (y * (1.0 - y)) ** 1.5, (n, n)),
            np.broadcast_to(27.0 * (x * (1.0 - x)) ** 1.5, (n, n)),
        ],
        axis=-1,
    )
    args = BrusselatorArgs(
        jnp.asarray(a, dtype),
        jnp.asarray(b, dtype),
        jnp.asarray(alpha, dtype),
        jnp.asarray(source * disc, dtype),
    )
    root = np.broadcast_to(np.array([b, a / b]), (n, n, 2)) if source == 0 and b != 0 else None
    return Problem(
        name="brusselator",
        title=f"steady 2-D Brusselator, 2 species on {n} x {n} nodes",
        source="NonlinearSolve.jl's benchmark; Hairer & Wanner, Solving ODEs II, IV.10",
        fn=brusselator_residual,
        y0=jnp.asarray(start, dtype),
        args=args,
        root=None if root is None else jnp.asarray(root, dtype),
        tags=frozenset({"pde", "2d", "nonsymmetric", "system"}),
        published={"max_norm": 1e-4},
        field=first_species,
    )

"""The problems of the table: each to ‖F‖₂ ≤ rtol ‖F₀‖₂."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array

from nksolve.problems import registry


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """Solve fn(y, args) = 0 from y0; with `lanes`, every leading index of y0 is a problem.

    `args` is shared by the lanes. `tags` are promised of the Jacobian to those solvers that ask.
    """

    name: str
    title: str
    fn: Callable[[Any, Any], Any]
    y0: Array
    args: Any
    rtol: float
    tags: frozenset[object] = frozenset()
    lanes: bool = False
    dense: bool = True  # whether an n × n Jacobian is worth trying

    @property
    def size(self) -> int:
        """Unknowns of one problem."""
        return int(np.prod(self.y0.shape[1:] if self.lanes else self.y0.shape))

    def residual_ratio(self, y: Any) -> float:
        """‖F(y)‖₂/‖F(y0)‖₂, the largest of the lanes, in float64."""
        args = [np.asarray(a, np.float64) for a in _leaves(self.args)]
        args = _like(self.args, args)
        y, y0 = np.asarray(y, np.float64), np.asarray(self.y0, np.float64)
        points = zip(y, y0, strict=True) if self.lanes else [(y, y0)]
        norm = lambda x: float(np.linalg.norm(np.asarray(self.fn(jnp.asarray(x), args))))
        return max(norm(a) / norm(b) for a, b in points)


def tanh_residual(y: Array, args: tuple[Array, Array]) -> Array:
    """y − tanh(W y + b)."""
    weights, bias = args
    return y - jnp.tanh(weights @ y + bias)


def _tanh(size: int, lanes: int | None, rtol: float) -> Row:
    generator = np.random.default_rng(0)
    weights = 0.9 * generator.standard_normal((size, size)) / np.sqrt(size)
    args = (jnp.asarray(weights, jnp.float32), jnp.asarray(generator.standard_normal(size), "f4"))
    if lanes is None:
        title = f"y − tanh(W y + b), D = {size}, float32"
        return Row(f"tanh-{size}", title, tanh_residual, jnp.zeros(size, "f4"), args, rtol)
    y0 = jnp.asarray(generator.standard_normal((lanes, size)), jnp.float32)
    title = f"{lanes} problems y − tanh(W y + b), D = {size}, under vmap, float32"
    return Row(f"batch-{lanes}x{size}", title, tanh_residual, y0, args, rtol, lanes=True)


def _bratu(n: int) -> Row:
    problem = registry.get("bratu", n=n, lam=6.0, dtype=jnp.float64)
    return Row(
        f"bratu-{n}",
        f"Bratu, λ = 6, {n}², float64",
        problem.fn,
        problem.y0,
        problem.args,
        1e-8,
        tags=frozenset({lx.positive_semidefinite_tag}),
        dense=n <= 64,
    )


def _chandrasekhar(n: int) -> Row:
    problem = registry.get("chandrasekhar", n=n, c=0.9, dtype=jnp.float64)
    title = f"Chandrasekhar H-equation, c = 0.9, n = {n}, float64"
    return Row(f"chandrasekhar-{n}", title, problem.fn, problem.y0, problem.args, 1e-8)


def rows(*, small: bool) -> list[Row]:
    """All rows; `small` ones for a quick look whether everything runs."""
    if small:
        return [_tanh(32, None, 1e-5), _bratu(8), _chandrasekhar(32), _tanh(8, 4, 1e-5)]
    return [
        _tanh(1024, None, 1e-6),
        _bratu(64),
        _bratu(128),
        _chandrasekhar(2048),
        _tanh(64, 256, 1e-5),
    ]


def _leaves(args: Any) -> list[Any]:
    return list(args) if isinstance(args, tuple) else [args]


def _like(args: Any, leaves: list[Any]) -> Any:
    if not isinstance(args, tuple):
        return leaves[0]
    return type(args)(*leaves) if hasattr(args, "_fields") else tuple(leaves)

"""The partial differential equations of `python -m benchmarks --pde`, and the contenders' words."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array

from nksolve.problems import registry

LAM = 6.0


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Solve fn(y, args) = 0 from y0 until `norm(F) ≤ target`."""

    family: str
    n: int
    title: str
    fn: Callable[[Any, Any], Any]
    y0: Array
    args: Any
    norm: Callable[[Any], Any]
    target: float

    @property
    def size(self) -> int:
        """Unknowns."""
        return int(self.y0.size)

    def residual(self, y: Any) -> float:
        """norm(F(y))/target: at most 1 where it is solved."""
        return float(self.norm(jax.jit(self.fn)(jnp.asarray(y), self.args))) / self.target


class Outcome(NamedTuple):
    """One solve. `krylov` counts linear iterations, or products where nobody tells those."""

    seconds: float
    newton: int | None
    krylov: int | None
    residual: float  # norm(F)/target
    failure: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class Contender:
    """`prepare(case, limit)` returns a function that solves once, in at most `limit` seconds."""

    name: str
    prepare: Callable[[Case, float], Callable[[], Outcome]]
    growth: float = 8.0  # at least by so much the time grows where n doubles


def max_norm(f: Array) -> Array:
    """‖F‖∞."""
    return jnp.max(jnp.abs(f))


def ex5_start(n: int) -> np.ndarray:
    """PETSc's start on the n × n interior nodes: λ/(λ+1) √(distance to the boundary)."""
    nodes = np.arange(1, n + 1)
    distance = np.minimum(nodes, n + 1 - nodes) / (n + 1)
    return LAM / (LAM + 1) * np.sqrt(np.minimum(distance[:, None], distance[None, :]))


def bratu(n: int) -> Case:
    """Bratu's problem from PETSc's start, to ‖F‖₂ ≤ 1e-8 ‖F₀‖₂."""
    problem = registry.get("bratu", n=n, lam=LAM, dtype=jnp.float64)
    y0 = jnp.asarray(ex5_start(n))
    target = 1e-8 * float(jnp.linalg.norm(problem.fn(y0, problem.args)))
    title = f"Bratu, λ = 6, {n}² unknowns, float64, to ‖F‖₂ ≤ 1e-8 ‖F₀‖₂"
    return Case("bratu", n, title, problem.fn, y0, problem.args, jnp.linalg.norm, target)


def brusselator(n: int) -> Case:
    """The steady Brusselator, to ‖F‖∞ ≤ 1e-4."""
    problem = registry.get("brusselator", n=n, dtype=jnp.float64)
    title = f"Steady Brusselator, 2·{n}² unknowns, float64, to ‖F‖∞ ≤ 1e-4"
    return Case("brusselator", n, title, problem.fn, problem.y0, problem.args, max_norm, 1e-4)


#: What those solvers that ask are told of the Jacobian.
TAGS = {"bratu": frozenset({lx.positive_semidefinite_tag}), "brusselator": frozenset()}

"""What a training step of an equilibrium cell costs in evaluations and matvecs: no clock."""

import functools as ft
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import nksolve as nks
from nksolve.accelerate.anderson import Anderson
from nksolve.accelerate.picard import Picard
from nksolve.adjoint.failure import BestEffort
from nksolve.adjoint.krylov import KrylovAdjoint
from nksolve.verbs.fixed_point import fixed_point
from tests.helpers.cells import CellCase, tanh_cell
from tests.helpers.counting import Counter

PAGE = Path(__file__).resolve().parent.parent / "docs" / "validation" / "equilibrium-counts.md"
MOST = 4000  # evaluations, or backward matvecs, before a method counts as failed

CELLS = [(s, r) for s in ("near_symmetric", "outliers", "disc") for r in (0.5, 0.9, 0.99)]
CELLS += [("ginibre", 0.5), ("monotone", 1.5)]

SOLVERS: dict[str, Callable[[Any], Any]] = {
    "Newton–Krylov": lambda tol: nks.NewtonKrylov(0.0, tol),
    "Picard": lambda tol: Picard(0.0, tol),
    "Anderson(5)": lambda tol: Anderson(0.0, tol, depth=5),
}


class Cost(NamedTuple):
    """Of one gradient: what ran, and whether the residual test held."""

    evaluations: int
    forward: int  # matvecs
    backward: int  # transposed matvecs
    converged: bool
    rho: float

    @property
    def total(self) -> int:
        return self.evaluations + self.forward + self.backward


class Prepared(NamedTuple):
    """A compiled training step, and the counter inside it."""

    step: Callable
    counter: Counter


@ft.cache
def prepared(name: str) -> Prepared:
    """value_and_grad of |z(θ) − z̄|²; the tolerance is an argument, so that one program serves."""
    counter = Counter()
    adjoint = KrylovAdjoint(failure=BestEffort())

    def loss(cell, x, z0, target, tol):
        ticked = lambda z, own: own[0](counter.tick(z), own[1])
        sol = fixed_point(
            ticked, SOLVERS[name](tol), z0, (cell, x), max_steps=MOST, throw=False,
            adjoint=eqx.tree_at(lambda a: a.rtol, adjoint, tol, is_leaf=lambda v: v is None),
        )  # fmt: skip
        return jnp.sum((sol.value - target) ** 2), sol.stats["residual_norm"]

    return Prepared(eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True)), counter)


def cost(name: str, case: CellCase, tol: float) -> Cost:
    """Of one training step."""
    step, counter = prepared(name)
    tolerance = jnp.asarray(tol, case.root.dtype)
    target = jnp.ones_like(case.root)
    with counter.measure() as count:
        (_, residual), _ = step(case.cell, case.x, case.z0, target, tolerance)
    return Cost(
        count.primal, count.tangent, count.transposed, bool(residual <= tol), float(case.rho)
    )


def plain_backward(case: CellCase, tol: float) -> int | None:
    """Steps of λ ← Jᵀλ + z̄ until ‖z̄ − (I − Jᵀ)λ‖ ≤ tol ‖z̄‖; `None` where it diverges."""
    jacobian = np.asarray(jax.jacfwd(case.cell)(case.root, case.x))
    rhs = 2 * (np.asarray(case.root) - 1)
    costate = rhs
    for k in range(1, MOST):
        image = rhs + costate @ jacobian
        moved = np.linalg.norm(image - costate)
        if moved <= tol * np.linalg.norm(rhs):
            return k
        if not moved < 1e6 * np.linalg.norm(rhs):
            return None
        costate = image
    return None


def table(size: int, tol: float, cells: list[tuple[str, float]]) -> str:
    """Markdown; the least total of a row in bold."""
    head = [
        "spectrum", "ρ", "Newton–Krylov", "back", "Picard", "Anderson(5)", "plain back",
        "NK in all", "Picard in all", "Anderson in all",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for spectrum, rho in cells:
        case = tanh_cell(spectrum, size, rho)
        costs = {name: cost(name, case, tol) for name in SOLVERS}
        newton = costs["Newton–Krylov"]
        back = plain_backward(case, tol)
        # A plain iteration takes whichever backward is cheaper.
        cheaper = newton.backward if back is None else min(back, newton.backward)
        forward = {k: c.evaluations + c.forward for k, c in costs.items()}
        totals = [
            forward[k] + (newton.backward if k == "Newton–Krylov" else cheaper)
            if c.converged
            else None
            for k, c in costs.items()
        ]
        least = min(t for t in totals if t is not None)
        told = lambda c, text: text if c.converged else "–"
        row = [
            spectrum.replace("_", "-"),
            f"{rho:g}",
            told(newton, f"{newton.evaluations} + {newton.forward}"),
            str(newton.backward),
            told(costs["Picard"], str(costs["Picard"].evaluations)),
            told(costs["Anderson(5)"], str(costs["Anderson(5)"].evaluations)),
            "–" if back is None else str(back),
            *("–" if t is None else f"**{t}**" if t == least else str(t) for t in totals),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def report(*, small: bool, only: list[str], repeats: int, budget: float) -> str:
    """The tables."""
    del repeats, budget
    cells = [cell for cell in CELLS if not only or cell[0] in only]
    parts = []
    for size in (64,) if small else (64, 512):
        for tol in (1e-3, 1e-6, 1e-10):
            parts.append(f"### D = {size}, ‖g(z) − z‖ ≤ {tol:g}\n\n" + table(size, tol, cells))
            print(parts[-1], flush=True)
        jax.clear_caches()
        prepared.cache_clear()
    return "\n\n".join(parts)

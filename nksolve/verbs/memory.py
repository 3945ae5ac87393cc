"""What one solve leaves for the next: a recycled space, an approximate inverse."""

from typing import Any

import equinox as eqx
import optimistix as optx
from jaxtyping import PyTree

from ..accelerate.broyden import AbstractBroyden
from ..adjoint.base import stop_gradient
from ..krylov.gcrodr import GCRODR
from ..newton.recording import Recorded

KEYS = ("recycled", "inverse")


def recalled(stats: dict[str, Any]) -> PyTree:
    """The entries of the stats that a later solve may start from."""
    return stop_gradient({key: stats[key] for key in KEYS if stats.get(key) is not None})


def resumed(solver: optx.AbstractRootFinder, memory: PyTree) -> optx.AbstractRootFinder:
    """The solver, starting from what an earlier solve left; itself where it keeps nothing."""
    if not memory:
        return solver
    if isinstance(solver, Recorded):
        return eqx.tree_at(lambda s: s.solver, solver, resumed(solver.solver, memory))
    if isinstance(solver, AbstractBroyden):
        return solver.starting_from(memory["inverse"])
    linear_solver = getattr(solver, "linear_solver", None)
    if isinstance(linear_solver, GCRODR) and "recycled" in memory:
        started = linear_solver.starting_from(memory["recycled"])
        return eqx.tree_at(lambda s: s.linear_solver, solver, started)
    return solver

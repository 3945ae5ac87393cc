"""Which linear solver a problem is given."""

from enum import StrEnum

import equinox as eqx
import jax.tree_util as jtu

from .. import tree
from ..krylov.auto import AutoLinear
from ..krylov.base import AbstractKrylovSolver
from ..krylov.gmres import GMRES
from ..newton.forcing import AbstractForcing, ConstantForcing
from ..newton.tightened import Tightened
from ..precondition.multigrid import Multigrid
from ..precondition.transfer import (
    AbstractTransfer,
    VertexDirichlet,
    VertexNeumann,
    VertexPeriodic,
)
from ..problems import Problem

_TRANSFERS: dict[str, AbstractTransfer] = {
    "dirichlet": VertexDirichlet(),
    "neumann": VertexNeumann(),
    "periodic": VertexPeriodic(),
}


class Method(StrEnum):
    """What `--method` takes."""

    auto = "auto"
    gmres = "gmres"


def choose(
    problem: Problem, method: Method, restart: int
) -> tuple[AbstractKrylovSolver, AbstractForcing, str]:
    """The linear solver, its forcing term, and what to say of it (empty: the solver will say)."""
    structure = tree.structure(eqx.filter(problem.y0, eqx.is_inexact_array))
    n = tree.size(structure)
    # Loose solves of a few unknowns save nothing, and the line search then stalls on Rosenbrock's
    # function: exact Newton where one cycle solves the linear system anyway.
    forcing = ConstantForcing(1e-6) if n <= restart else Tightened()
    if method is Method.gmres:
        return GMRES(restart=restart), forcing, "GMRES without preconditioner: as asked"
    multigrid = _multigrid(problem)
    if multigrid is not None:
        grids = multigrid.structures(structure)
        sizes = " to ".join(
            " x ".join(map(str, jtu.tree_leaves(grid)[0].shape)) for grid in (grids[0], grids[-1])
        )
        text = f"GMRES preconditioned by Multigrid: a V-cycle on {len(grids)} grids, {sizes}"
        return GMRES(restart=restart, preconditioner=multigrid), forcing, text
    return AutoLinear(restart=restart), forcing, ""


def _multigrid(problem: Problem) -> Multigrid | None:
    """Where the grid can be coarsened often enough to pay."""
    mesh = problem.mesh
    if mesh is None:
        return None
    grid = (_TRANSFERS[mesh.boundary],) * mesh.dimensions
    made = Multigrid(problem.fn, grid, order=mesh.order)
    try:
        grids = made.structures(tree.structure(problem.y0))
    except ValueError:  # a size that does not halve often enough
        return None
    return made if len(grids) > 1 else None

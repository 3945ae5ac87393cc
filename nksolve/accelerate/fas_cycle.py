"""One cycle of the full approximation scheme."""

from collections.abc import Callable
from typing import NamedTuple

from jax import lax

from .. import tree
from ..linearise.linearisation import Linearisation
from ..linearise.probing import ravel, unravel
from ..precondition.cycle import Bridge, Level, WCycle, dense
from ..precondition.multigrid import Multigrid, sampled
from ..precondition.transfer import Grid
from ..typing import Vector


class Scheme(NamedTuple):
    """The grids of a cycle: `at[depth](u)` linearises the residual of the grid at that depth."""

    at: list[Callable[[Vector], Linearisation]]
    structures: list[tree.Structure]
    grid: Grid
    multigrid: Multigrid
    coarse_steps: int


def cycle(scheme: Scheme, depth: int, u: Vector, tau: Vector, lin: Linearisation) -> Vector:
    """A better solution of F(u) = τ on the grid at `depth` than u, where `lin` was made."""
    at, multigrid = scheme.at[depth], scheme.multigrid
    if depth == len(scheme.at) - 1:
        return _newton(scheme, u, tau)
    for sweep in range(multigrid.cycle.pre):
        u = _smoothed(scheme, u, tau, at(u) if sweep else lin)
    if multigrid.cycle.pre:
        lin = at(u)
    bridge = Bridge(scheme.grid, 2.0**multigrid.order)
    start = sampled(scheme.grid, u, scheme.structures[depth + 1])
    below = scheme.at[depth + 1](start)
    # τ_c = F_c(û) + R(τ − F(u)): at a root of F(u) = τ the coarse solution is û itself.
    tau_below = tree.add(below.value, bridge.restrict(tree.sub(tau, lin.value)))
    w = _visited(scheme, depth + 1, start, tau_below, below)
    u = tree.add(u, bridge.prolong(tree.sub(w, start)))
    for _ in range(multigrid.cycle.post):
        u = _smoothed(scheme, u, tau, at(u))
    return u


def _visited(scheme: Scheme, depth: int, start: Vector, tau: Vector, lin: Linearisation) -> Vector:
    if not isinstance(scheme.multigrid.cycle, WCycle) or depth == len(scheme.at) - 1:
        return cycle(scheme, depth, start, tau, lin)

    def visit(_, w):
        return cycle(scheme, depth, w, tau, scheme.at[depth](w))

    return lax.fori_loop(0, 2, visit, start)


def _smoothed(scheme: Scheme, u: Vector, tau: Vector, lin: Linearisation) -> Vector:
    smoother = scheme.multigrid.smoother
    inverse = smoother.init(lin.operator, len(scheme.grid))
    level = Level(lin.operator, smoother, inverse, Bridge(scheme.grid, 1.0))
    step, _ = level.reduce(tree.sub(tau, lin.value), 1)
    return tree.add(u, step)


def _newton(scheme: Scheme, u: Vector, tau: Vector) -> Vector:
    def improve(_, w):
        lin = scheme.at[-1](w)
        inverse = scheme.multigrid.coarse_solver.inverse(dense(lin.operator))
        step = inverse @ ravel(tree.sub(tau, lin.value))
        return tree.add(w, unravel(step, tree.structure(w)))

    return lax.fori_loop(0, scheme.coarse_steps, improve, u)

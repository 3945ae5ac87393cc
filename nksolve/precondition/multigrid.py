"""Geometric multigrid, matrix-free on every level but the coarsest."""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jax import lax
from jaxtyping import Array, Inexact

from .. import tree
from ..linearise.linearisation import Linearisation, linearise
from ..linearise.operator import JacobianOperator
from ..typing import Args, Fn, Vector, Y
from .base import AbstractPreconditioner
from .cycle import AbstractCycle, Bridge, CycleMap, Hierarchy, Level, VCycle, dense
from .smoothers import AbstractSmoother, ChebyshevSmoother
from .transfer import AbstractTransfer, Grid, coarse_shape, over_axes

#: No coarsest grid may have more unknowns than this.
MAX_DENSE = 3000


class AbstractCoarseSolver(eqx.Module):
    """The inverse of J on the coarsest grid."""

    @abc.abstractmethod
    def inverse(self, matrix: Inexact[Array, "m m"]) -> Inexact[Array, "m m"]:
        """An inverse of the matrix, or a generalised one."""


class DenseInverse(AbstractCoarseSolver):
    """By LU with partial pivoting: 2 m³ operations an update, one product an application."""

    def inverse(self, matrix: Inexact[Array, "m m"]) -> Inexact[Array, "m m"]:
        return jnp.linalg.inv(matrix)


class PseudoInverse(AbstractCoarseSolver):
    """By the singular value decomposition, some ten times dearer: for J with a null space, such as
    a Laplacian with fluxes prescribed all round or periodic in every direction."""

    def inverse(self, matrix: Inexact[Array, "m m"]) -> Inexact[Array, "m m"]:
        return jnp.linalg.pinv(matrix)


def same_args(args: Args) -> Args:
    """args on a coarser grid: the same."""
    return args


class Multigrid(AbstractPreconditioner):
    """A multigrid cycle as M⁻¹, from the residual on coarser grids.

    On the finest grid J is the operator that the solver holds. y is sampled on each coarser grid
    and the residual linearised there once, so that every level's matvec is matrix-free; the J of
    the coarsest grid is assembled and inverted.

    The leading axes of each leaf of y are the grid, the rest are components at a node; several
    leaves may share the grid.

    **Arguments:**

    - `fn`: the residual `(y, args)` on any grid, which it knows by the shape of y. Or
    - `levels`: residuals `(y, args)` of the coarser grids, the finest of them first.
    - `grid`: how an axis is coarsened: one transfer such as `VertexDirichlet()` for every axis of
      each leaf, or a tuple with one for each axis of the grid.
    - `coarsen`: args → args on the next coarser grid, for args that hold fields; nothing changes by
      default.
    - `order`: the power of the mesh width that the residual was multiplied by: 2 for
      4u − Σ neighbours − h²g, 0 for the same divided by h². A residual restricted to a grid twice
      as coarse is multiplied by 2^order.
    - `cycle`: `VCycle()`, `WCycle()` or `FCycle()`.
    - `smoother`: `ChebyshevSmoother()` or `JacobiSmoother()`.
    - `coarse_solver`: `DenseInverse()`, or `PseudoInverse()` where J has a null space.
    - `coarsest`: coarsen until no more unknowns than this are left, or as far as the grid goes.

    In `lx.linear_solve`, where y is not known, coarse levels are linearised at zero and with the
    args `None`.

    **Raises:** `ValueError` for leaves of different grids, for a coarse residual of the wrong
    shape, and for a grid that cannot be coarsened to at most 3,000 unknowns.

    Storage: the linearisations of the coarser grids (a third of the finest one's in two dimensions,
    a seventh in three), B⁻¹ of the smoother on every grid, m² numbers for m unknowns on the
    coarsest. Work of an update: the smoother's probes, and as much again in proportion on coarser
    grids; of an application: see the cycle.

    Source: Briggs, Henson & McCormick, A Multigrid Tutorial, 2nd ed., 2000; Trottenberg, Oosterlee
    & Schüller, Multigrid, 2001.
    """

    fn: Fn | None = None
    grid: AbstractTransfer | Sequence[AbstractTransfer] | None = None
    levels: Sequence[Fn] | None = None
    coarsen: Callable[[Args], Args] = same_args
    order: int | float = eqx.field(static=True, default=2)
    cycle: AbstractCycle = VCycle()
    smoother: AbstractSmoother = ChebyshevSmoother()
    coarse_solver: AbstractCoarseSolver = DenseInverse()
    coarsest: int = eqx.field(static=True, default=400)

    def __check_init__(self):
        if (self.fn is None) == (self.levels is None):
            raise ValueError(
                "`Multigrid` needs either `fn`, a residual that works on every grid, or `levels`, "
                "one residual for each coarser grid."
            )
        if self.grid is None:
            raise ValueError(
                "`Multigrid` needs `grid`: how an axis is coarsened, such as `VertexDirichlet()`."
            )
        if self.coarsest < 1:
            raise ValueError(f"`coarsest` must be at least 1, but it is {self.coarsest}.")

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Hierarchy:
        structure = operator.in_structure()
        grid = grid_of(self.grid, structure)
        variables, static = eqx.partition(y, eqx.is_inexact_array)
        operator = jtu.tree_map(_traced, operator)
        structures = self.structures(structure)
        bridge = Bridge(grid, 2.0**self.order)
        levels = []
        for depth, coarse in enumerate(structures[1:]):
            inverse = self.smoother.init(operator, len(grid))
            levels.append(Level(operator, self.smoother, inverse, bridge))
            args = self.coarse_args(args, coarse)
            variables = (
                sampled(grid, variables, coarse) if y is not None else tree.zeros_like(coarse)
            )
            y_coarse = eqx.combine(variables, static)
            operator = self.linearised(depth, y_coarse, args, coarse).operator
        matrix = self.coarse_solver.inverse(dense(operator))
        return Hierarchy(tuple(levels), matrix, structures[-1])

    def as_operator(self, state: Hierarchy) -> lx.AbstractLinearOperator:
        if state.levels:
            operator = state.levels[0].operator
            structures = operator.out_structure(), operator.in_structure()
        else:
            structures = (tree.thaw(state.structure),) * 2
        return JacobianOperator(CycleMap(state, self.cycle), *structures)

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        structure = operator.in_structure()
        grid = grid_of(self.grid, structure)
        if len(self.structures(structure)) == 1:
            return tree.size(structure)
        return self.smoother.nodes.num_probes(structure, len(grid))

    def matvecs_per_application(self, operator: lx.AbstractLinearOperator) -> int:
        structure = operator.in_structure()
        if len(self.structures(structure)) == 1:
            return 0
        ndim = len(grid_of(self.grid, structure))
        return (self.cycle.pre + self.cycle.post) * len(self.smoother.coefficients(ndim))

    @property
    def keeps_symmetry(self) -> bool:
        axes = (self.grid,) if isinstance(self.grid, AbstractTransfer) else tuple(self.grid or ())
        # R = c Pᵀ unless an axis says otherwise.
        adjoint = all(type(axis).restrict is AbstractTransfer.restrict for axis in axes)
        return self.cycle.is_symmetric and adjoint

    def structures(self, structure: tree.Structure) -> list[tree.Structure]:
        """Those of the unknown on all grids, finest first."""
        grid = grid_of(self.grid, structure)
        wanted = None if self.levels is None else len(self.levels)
        found = coarser(grid, structure, self.coarsest, wanted)
        if tree.size(found[-1]) > MAX_DENSE:
            shape = jtu.tree_leaves(found[-1])[0].shape[: len(grid)]
            raise ValueError(
                f"The coarsest grid that `Multigrid` finds, {shape}, has {tree.size(found[-1])} "
                f"unknowns, too many for a dense matrix (at most {MAX_DENSE}). Choose a size that "
                "halves more often: 2^k − 1 interior nodes (`VertexDirichlet`), 2^k + 1 nodes with "
                "both ends (`VertexNeumann`), 2^k cells or periodic nodes"
                + ("." if wanted is None else ", and give as many `levels`.")
            )
        return found

    def coarse_args(self, args: Args, structure: tree.Structure) -> Args:
        """args on the next coarser grid, no more precise than the unknown there."""
        return cast_args(self.coarsen(args), structure)

    def linearised(self, depth: int, y: Y, args: Args, structure: tree.Structure) -> Linearisation:
        """The residual on a coarser grid, the finest of them being the first (depth 0)."""
        fn = self.fn if self.levels is None else self.levels[depth]
        assert fn is not None
        lin = linearise(lambda y, _: fn(y, args), y)
        if tree.structure(lin.value) != structure:
            shapes = jtu.tree_map(lambda x: f"{x.dtype}{list(x.shape)}", lin.value)
            wanted = jtu.tree_map(lambda x: f"{x.dtype}{list(x.shape)}", structure)
            raise ValueError(
                f"`Multigrid`: on a coarser grid the residual is {shapes}, but y there is "
                f"{wanted}. It must work on every grid, take what depends on the mesh width from "
                "the shape of y, and fields from args through `coarsen`."
            )
        return lin


def grid_of(
    grid: AbstractTransfer | Sequence[AbstractTransfer] | None, structure: tree.Structure
) -> Grid:
    """The transfers of the axes, checked against the leaves."""
    leaves = jtu.tree_leaves(structure)
    if not leaves:
        raise ValueError("Multigrid needs an unknown with at least one array.")
    assert grid is not None
    axes = (grid,) * leaves[0].ndim if isinstance(grid, AbstractTransfer) else tuple(grid)
    shapes = {leaf.shape[: len(axes)] for leaf in leaves}
    if not axes or len(shapes) > 1 or any(len(shape) < len(axes) for shape in shapes):
        raise ValueError(
            f"The leading axes of every leaf must be one grid of {len(axes)} dimensions, but the "
            f"leaves have the shapes {[leaf.shape for leaf in leaves]}. Where leaves have axes of "
            "components, pass one transfer for each axis of the grid: "
            "`grid=(VertexDirichlet(), VertexDirichlet())`."
        )
    return axes


def coarser(
    grid: Grid, structure: tree.Structure, coarsest: int, wanted: int | None
) -> list[tree.Structure]:
    """The structures of a grid and of those below it, as far as is wanted or possible."""
    found = [structure]
    while wanted is not None or tree.size(found[-1]) > coarsest:
        if wanted is not None and len(found) == wanted + 1:
            break
        shapes = [coarse_shape(grid, leaf.shape) for leaf in jtu.tree_leaves(found[-1])]
        if any(shape is None for shape in shapes):
            if wanted is not None:
                shape = jtu.tree_leaves(found[-1])[0].shape[: len(grid)]
                raise ValueError(
                    f"{wanted} coarser grids are wanted, but after {len(found) - 1} of them the "
                    f"grid {shape} cannot be coarsened further."
                )
            break
        leaves, treedef = jtu.tree_flatten(found[-1])
        structs = [
            jax.ShapeDtypeStruct(shape, leaf.dtype)
            for shape, leaf in zip(shapes, leaves, strict=True)
        ]
        found.append(jtu.tree_unflatten(treedef, structs))
    return found


def sampled(grid: Grid, vector: Vector, structure: tree.Structure) -> Vector:
    """The unknown on the next coarser grid, in the dtypes of `structure`."""
    coarse = over_axes(grid, _sample, vector)
    return jtu.tree_map(lambda x, s: x.astype(s.dtype), coarse, structure)


def _traced(leaf: Any) -> Any:
    """Constants of a program may be literals, which are no JAX arrays: scalars, made arrays."""
    if not eqx.is_array(leaf) or leaf.ndim > 0:
        return leaf
    return lax.mul(leaf, lax.full_like(leaf, 1)) if eqx.is_inexact_array(leaf) else leaf


def _sample(transfer: AbstractTransfer, x: Any, axis: int) -> Any:
    return transfer.sample(x, axis)


def cast_args(args: Args, structure: tree.Structure) -> Args:
    """Arrays of args that are more precise than the unknown, in its precision."""
    bits = max(jnp.finfo(leaf.dtype).bits for leaf in jtu.tree_leaves(structure))
    real: Any = {16: jnp.float16, 32: np.float32}.get(bits, np.float64)

    def leaf(x):
        if not eqx.is_inexact_array(x) or jnp.finfo(x.dtype).bits <= bits:
            return x
        is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
        return x.astype(np.result_type(real, np.complex64) if is_complex else real)

    return jtu.tree_map(leaf, args)

"""Algebraic multigrid: levels found by pyamg outside of jit, numbers and cycles in JAX."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, Inexact

from .. import tree
from ..linearise.linearisation import linearise
from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..linearise.probing import ravel, unravel
from ..linearise.sparsity import Pattern, find_pattern
from ..typing import Args, Fn, Scalar, Vector, Y
from .base import AbstractPreconditioner
from .coarsening import AbstractCoarsening, SmoothedAggregation, pyamg
from .cycle import AbstractCycle, CycleMap, Hierarchy, Level, VCycle
from .multigrid import MAX_DENSE, AbstractCoarseSolver, DenseInverse
from .nodes import AbstractNodes, NodeInverse
from .smoothers import AbstractSmoother, ChebyshevSmoother
from .sparse_levels import SparseLevel, sparse_level

_COARSENING, _CYCLE, _COARSE_SOLVER = SmoothedAggregation(), VCycle(), DenseInverse()
_SMOOTHER = ChebyshevSmoother(degree=2, ratio=4.0)
# A matrix of more unknowns, of which more than this part is stored, is refused as dense.
_DENSE = 256, 0.25


class AlgebraicMultigrid(AbstractPreconditioner):
    """A multigrid cycle as M⁻¹, on levels that are found from the entries of J.

    Make it outside of `jit`, by one of

    - `AlgebraicMultigrid.from_jacobian(fn, y0, args)`: from J at a point;
    - `AlgebraicMultigrid.from_operator(operator)`: from a concrete Lineax operator;
    - `AlgebraicMultigrid.from_matrix(matrix)`: from a SciPy sparse matrix.

    That fixes, on the host, what depends on the data in its shape: coarse unknowns, interpolation P
    and restriction R, and where A_{l+1} = R A_l P has entries. The numbers follow J: at every
    linearisation its entries are read off coloured matvecs, and those of all A_l, the smoothers and
    the inverse of the coarsest matrix are computed from them in JAX, inside of `jit`, `vmap` and
    Newton's loop. Where J changes its character (couplings that were weak become strong), make it
    again at a new point.

    On the finest level A_0 is the operator itself, matrix-free; coarser ones are sparse matrices.
    Several leaves are taken one after the other. Real, or complex-linear (levels from Re J then).

    **Arguments:** of the three constructors, all by keyword:

    - `coarsening`: `SmoothedAggregation()` or `RugeStuben()`.
    - `components`: c unknowns a node, next to each other (the last axis of a leaf). Each of the c,
      and each leaf, is coarsened by itself, by its couplings with itself.
    - `near_nullspace`: vectors that A nearly maps to zero: an (n, k) array or a list of vectors
      like y. By default the constant. With `components` c and a single leaf, nodes of c unknowns
      are then coarsened as one, as elasticity with its rigid motions needs.
    - `coarsest`: coarsen until no more unknowns than this are left.
    - `cycle`: `VCycle()`, `WCycle()` or `FCycle()`.
    - `smoother`: `ChebyshevSmoother(degree, ratio)`, (2, 4) by default, or `JacobiSmoother(omega,
      sweeps)`, with numbers given; with the diagonal of A_l for B, whatever their `nodes`.
    - `coarse_solver`: `DenseInverse()`, or `PseudoInverse()` where J has a null space.
    - `pattern` (not of `from_matrix`): a `Pattern` that holds every nonzero of J; found if not
      given.

    **Raises:** (in the constructors) `ImportError` without pyamg, or without asdex where the
    pattern has to be found or coloured; `TypeError` for what is no sparse matrix; `ValueError` for
    a matrix that is not square, dense, not finite or traced, and where coarsening stops above 3,000
    unknowns.

    Storage: fixed, about 140 n numbers (720 bytes an unknown) for a five-point stencil and smoothed
    aggregation, two thirds of them integers: the maps to R A P and the bridges with their
    transposes. State: the linearisation, two n-vectors, the entries of coarse matrices (two to four
    n-vectors), m² numbers for m unknowns on the coarsest level. Work of an update: `num_colours`
    matvecs in one batch, the products R A P, an inverse; of an application: 2 · degree matvecs with
    J for a V-cycle, and as many with each coarser matrix.

    Source: as of the coarsening; Trottenberg, Oosterlee & Schüller, Multigrid, 2001, appendix A.
    """

    pattern: Pattern = eqx.field(static=True)
    levels: tuple[SparseLevel, ...]
    coarsest: Pattern = eqx.field(static=True)
    cycle: AbstractCycle
    smoother: AbstractSmoother
    coarse_solver: AbstractCoarseSolver

    @classmethod
    def from_jacobian(
        cls, fn: Fn, y0: Y, args: Args = None, *, pattern: Pattern | None = None, **options: Any
    ) -> "AlgebraicMultigrid":
        """From J = ∂fn/∂y at (y0, args)."""
        _refuse_traced((y0, args))
        return cls.from_operator(linearise(fn, y0, args).operator, pattern=pattern, **options)

    @classmethod
    def from_operator(
        cls,
        operator: lx.AbstractLinearOperator,
        *,
        pattern: Pattern | None = None,
        **options: Any,
    ) -> "AlgebraicMultigrid":
        """From a concrete linear operator, at the places of its pattern."""
        _refuse_traced(operator)
        pyamg()
        pattern = find_pattern(operator) if pattern is None else pattern
        values = pattern.values(operator)
        _refuse_traced(values)
        import scipy.sparse as sp

        shape = (pattern.n, pattern.n)
        matrix = sp.csr_matrix((np.asarray(values), (pattern.rows, pattern.cols)), shape=shape)
        leaves = jtu.tree_leaves(operator.in_structure())
        return cls._build(matrix, pattern, [leaf.size for leaf in leaves], **options)

    @classmethod
    def from_matrix(cls, matrix: Any, **options: Any) -> "AlgebraicMultigrid":
        """From a SciPy sparse matrix, which must store every place where J is ever nonzero."""
        pyamg()
        import scipy.sparse as sp

        if not sp.issparse(matrix):
            raise TypeError(
                "`AlgebraicMultigrid.from_matrix` needs a SciPy sparse matrix, but it got a "
                f"{type(matrix).__name__}. Of an array: `scipy.sparse.csr_matrix(array)`."
            )
        if matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"`AlgebraicMultigrid` is for square J; this one is {matrix.shape}.")
        return cls._build(matrix, Pattern.from_scipy(matrix), [matrix.shape[0]], **options)

    @classmethod
    def _build(
        cls,
        matrix: Any,
        pattern: Pattern,
        sizes: list[int],
        *,
        coarsening: AbstractCoarsening = _COARSENING,
        components: int = 1,
        near_nullspace: Any = None,
        coarsest: int = 200,
        cycle: AbstractCycle = _CYCLE,
        smoother: AbstractSmoother = _SMOOTHER,
        coarse_solver: AbstractCoarseSolver = _COARSE_SOLVER,
    ) -> "AlgebraicMultigrid":
        if coarsest < 1:
            raise ValueError(f"`coarsest` must be at least 1, but it is {coarsest}.")
        if components < 1 or any(size % components for size in sizes):
            raise ValueError(
                f"`components` is the number of unknowns a node, but {components} does not divide "
                f"the sizes {sizes} of the leaves."
            )
        n = pattern.n
        if n > _DENSE[0] and pattern.density > _DENSE[1]:
            raise ValueError(
                f"J has {pattern.nnz} entries for {n} unknowns: it is dense, and algebraic "
                "multigrid is for sparse ones. Use a Krylov method without it, or `nks.Nystrom`."
            )
        found: list[tuple[Any, Any]] = []
        if n > coarsest:
            known = None if near_nullspace is None else _columns(near_nullspace, n)
            prepared = _prepared(matrix, sizes, components, known is None)
            found = coarsening.interpolations(prepared, known, coarsest)
        levels, last = [], pattern
        for p, r in found:
            level, last = sparse_level(last, p, r, not levels)
            levels.append(level)
        if last.n > MAX_DENSE:
            raise ValueError(
                f"Coarsening stopped at {last.n} unknowns, too many for a dense matrix (at most "
                f"{MAX_DENSE}): couplings count as strong nowhere. Lower `theta` of the "
                "coarsening, or try the other one (`SmoothedAggregation`, `RugeStuben`)."
            )
        return cls(pattern, tuple(levels), last, cycle, smoother, coarse_solver)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of unknowns of all levels, finest first."""
        return *(level.size for level in self.levels), self.coarsest.n

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        del y, args
        self.pattern.check_size(operator)
        structure, out_structure = operator.in_structure(), operator.out_structure()
        if self.pattern.n == 0:
            return lx.IdentityLinearOperator(out_structure, structure)
        dtype = tree.scalar_dtype(structure)
        values = self.pattern.values(operator).astype(dtype)
        matrix: AbstractLinearMap = _FlatMap(operator)
        levels = []
        for level in self.levels:
            like = jax.ShapeDtypeStruct((level.size,), dtype)
            here = JacobianOperator(matrix if not levels else level.matrix(values), like, like)
            inverse, bound = level.scaling(values)
            nodes = _Known(known=NodeInverse(inverse, 1), bound=bound)
            # The smoother scales the inverse that it is handed as its nodes.
            scaled = dataclasses.replace(self.smoother, nodes=nodes).init(here, 1)
            levels.append(Level(here, self.smoother, scaled, level.bridge))
            values = level.coarse(values)
        m = self.coarsest.n
        places = jnp.asarray(self.coarsest.rows), jnp.asarray(self.coarsest.cols)
        dense = (
            jnp.zeros((m, m), dtype)
            .at[places]
            .set(values, unique_indices=True, indices_are_sorted=True)
        )
        # Coarse unknowns that nothing is interpolated from: aggregates of fewer unknowns than
        # vectors to represent. They stay zero.
        nonzero = dense != 0
        unused = ~(nonzero.any(axis=0) | nonzero.any(axis=1))
        dense = dense + jnp.diag(unused.astype(dtype))
        like = jax.ShapeDtypeStruct((m,), dtype)
        hierarchy = Hierarchy(tuple(levels), self.coarse_solver.inverse(dense), like)
        inverse_map = _TreeMap(CycleMap(hierarchy, self.cycle), structure, out_structure)
        return JacobianOperator(inverse_map, out_structure, structure)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        del operator, y, args
        return self.pattern.num_colours if self.pattern.nnz else 0

    def matvecs_per_application(self, operator: lx.AbstractLinearOperator) -> int:
        del operator
        if not self.levels:
            return 0
        return (self.cycle.pre + self.cycle.post) * len(self.smoother.coefficients(1))

    @property
    def keeps_symmetry(self) -> bool:
        return self.cycle.is_symmetric


class _Known(AbstractNodes):
    """Nodes whose inverse is known."""

    known: NodeInverse
    bound: Scalar
    reach: int = eqx.field(static=True, default=0)

    def init(self, operator: lx.AbstractLinearOperator, ndim: int) -> tuple[NodeInverse, Scalar]:
        del operator, ndim
        return self.known, self.bound


class _FlatMap(AbstractLinearMap):
    """J between arrays."""

    operator: lx.AbstractLinearOperator

    def mv(self, vector: Inexact[Array, " n"]) -> Inexact[Array, " n"]:
        return _through(self.operator, vector)

    def transpose_mv(self, vector: Inexact[Array, " n"]) -> Inexact[Array, " n"]:
        return _through(self.operator.transpose(), vector)


class _TreeMap(AbstractLinearMap):
    """M⁻¹ between vectors, from one between arrays."""

    flat: AbstractLinearMap
    structure: tuple = eqx.field(static=True, converter=tree.freeze)
    out_structure: tuple = eqx.field(static=True, converter=tree.freeze)

    def mv(self, vector: Vector) -> Vector:
        structure = tree.thaw(self.structure)
        flat = ravel(vector).astype(tree.scalar_dtype(structure))
        return unravel(self.flat.mv(flat), structure)

    def transpose_mv(self, vector: Vector) -> Vector:
        flat = self.flat.transpose_mv(ravel(vector))
        return unravel(flat, tree.thaw(self.out_structure))


def _through(
    operator: lx.AbstractLinearOperator, flat: Inexact[Array, " n"]
) -> Inexact[Array, " n"]:
    return ravel(operator.mv(unravel(flat, operator.in_structure()))).astype(flat.dtype)


def _refuse_traced(values: Any) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jtu.tree_leaves(values)):
        raise ValueError(
            "The levels of `AlgebraicMultigrid` depend on the numbers in J, which are not known "
            "inside of `jit`, `vmap` or `grad`. Make it outside and pass it in: its numbers follow "
            "J there, its levels stay."
        )


def _columns(near_nullspace: Any, n: int) -> np.ndarray:
    """The vectors as columns."""
    if isinstance(near_nullspace, list | tuple):
        flat = [
            np.concatenate([np.ravel(leaf) for leaf in jtu.tree_leaves(vector)])
            for vector in near_nullspace
        ]
        near_nullspace = np.stack(flat, axis=1)
    columns = np.asarray(near_nullspace, np.float64)
    if columns.ndim != 2 or columns.shape[0] != n or columns.shape[1] < 1:
        raise ValueError(
            f"`near_nullspace` must be an array of shape ({n}, k), or a list of vectors like y; "
            f"got an array of shape {columns.shape}."
        )
    return columns


def _prepared(matrix: Any, sizes: list[int], components: int, apart: bool) -> Any:
    """The real matrix that is coarsened: with a positive diagonal on the whole, and either without
    couplings between components or in blocks of them."""
    import scipy.sparse as sp

    coo = matrix.tocoo()
    data = np.asarray(coo.data.real, np.float64)
    if not np.isfinite(data).all():
        raise ValueError(
            "J has entries that are not finite where `AlgebraicMultigrid` is made: choose another "
            "point."
        )
    rows, cols = coo.row, coo.col
    if apart and (components > 1 or len(sizes) > 1):
        leaf = np.repeat(np.arange(len(sizes)), sizes)
        within = np.concatenate([np.arange(size) % components for size in sizes])
        label = leaf * components + within
        kept = label[rows] == label[cols]
        rows, cols, data = rows[kept], cols[kept], data[kept]
    sign = -1.0 if data[rows == cols].sum() < 0 else 1.0
    real = sp.csr_matrix((sign * data, (rows, cols)), shape=coo.shape)
    if not apart and components > 1 and len(sizes) == 1:
        return real.tobsr((components, components))
    real.eliminate_zeros()
    return real

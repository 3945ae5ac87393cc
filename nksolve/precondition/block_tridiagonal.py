"""Block tridiagonal matrices: probed, factored and solved with."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx

from .. import tree
from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..typing import Args, Vector, Y
from .base import AbstractPreconditioner
from .elimination import AbstractElimination, AbstractFactors, Blocks, for_platform
from .layout import ByRun, along_line, check_blocks, check_space
from .stencil import pick, push


class BlockTridiagonal(AbstractPreconditioner):
    """M = the block tridiagonal part of J, M⁻¹ by block elimination: J⁻¹ itself where J is block
    tridiagonal, as the method of lines in one dimension makes it.

    The unknowns are ordered node after node: along the first axis of all leaves, which must be the
    same, and at each node leaf after leaf. So a (n,) array is tridiagonal with `block` 1, a (n, b)
    array and a dict of b arrays (n,) have blocks of b, and a (m, m) array blocks of m (a grid, row
    by row).

    **Arguments:**

    - `block`: block size b; by default the entries of one node. Runs of b entries make up a block;
      with several leaves b must be a multiple of the entries of a node. The last block is filled
      up with the identity.
    - `elimination`: `nks.ScanElimination()` or `nks.CyclicReduction()`; by default the first where
      JAX's default backend is the CPU, and the second elsewhere.
    - `blocks`: instead of probing, `(y, args) -> (lower, diagonal, upper)`, arrays of shape
      (m, b, b) for m = ⌈n/b⌉: J_{i,i−1}, J_{i,i}, J_{i,i+1}. The first of the lower and the last
      of the upper blocks are ignored.

    Where J couples further than neighbouring blocks, the probes add those entries to the wrong
    blocks, and M is poor. No pivoting across blocks; a singular pivot becomes the identity: M⁻¹
    stays finite, and the Krylov method reports what comes of it.

    A complex unknown counts as complex-linear: of a residual that is not holomorphic the probes
    see one part only.

    Storage: 3 b vectors (`CyclicReduction`: 5 b). Work: 3 b multiplications and additions an entry
    (5 b); an update 3 b matvecs in one batch, and what the elimination takes.

    Source: Golub & Van Loan, Matrix Computations, 4th ed., section 4.5; probes: Curtis, Powell &
    Reid, J. Inst. Math. Appl. 13, 1974.
    """

    block: int | None = eqx.field(static=True, default=None)
    elimination: AbstractElimination | None = eqx.field(default=None, kw_only=True)
    blocks: Callable[[Y, Args], Any] | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        if self.block is not None and self.block < 1:
            raise ValueError(f"`block` must be at least 1, but it is {self.block}.")

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        structure = check_space(operator, "BlockTridiagonal")
        if tree.size(structure) == 0:
            return lx.IdentityLinearOperator(operator.out_structure(), structure)
        layout = self._layout(structure)
        if self.blocks is None:
            blocks = _probed(operator, layout)
        else:
            blocks = _given(self.blocks(y, args), layout)
        factors = for_platform(self.elimination).factor(*closed(*blocks, layout.size))
        return JacobianOperator(Solve(factors, layout), operator.out_structure(), structure)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        del y, args
        structure = operator.in_structure()
        if self.blocks is not None or tree.size(structure) == 0:
            return 0
        ((m, b),) = self._layout(structure).shapes
        return min(m, 3) * b

    def _layout(self, structure: tree.Structure) -> ByRun:
        order = along_line(structure, "BlockTridiagonal")
        node = sum(order.widths)
        block = node if self.block is None else self.block
        if len(order.widths) > 1 and block % node:
            raise ValueError(
                f"`BlockTridiagonal({block})`: the leaves have {node} entries at each node, so "
                f"`block` must be a multiple of {node}; leave it out for {node}."
            )
        return ByRun(order, block)


class Solve(AbstractLinearMap):
    """v → M⁻¹v for a factored block tridiagonal M."""

    factors: AbstractFactors
    layout: ByRun

    def mv(self, vector: Vector) -> Vector:
        return self.layout.join([self.factors.solve(self.layout.split(vector)[0])])

    def transpose_mv(self, vector: Vector) -> Vector:
        return self.layout.join([self.factors.solve_transposed(self.layout.split(vector)[0])])


def closed(
    lower: Blocks, diagonal: Blocks, upper: Blocks, size: int
) -> tuple[Blocks, Blocks, Blocks]:
    """The blocks without those beyond the two ends, and with ones on the diagonal of padding."""
    m, b, _ = diagonal.shape
    if m * b > size:
        padding = (jnp.arange(m * b) >= size).astype(diagonal.dtype).reshape(m, b, 1)
        diagonal = diagonal + padding * jnp.eye(b, dtype=diagonal.dtype)[None]
    return lower.at[0].set(0), diagonal, upper.at[-1].set(0)


def _probed(operator: lx.AbstractLinearOperator, layout: ByRun) -> tuple[Blocks, Blocks, Blocks]:
    (shape,) = layout.shapes
    m, b = shape
    count = min(m, 3)
    row = jnp.arange(m, dtype=jnp.int32)
    component = jnp.arange(b, dtype=jnp.int32)
    colours = (row % count)[:, None] * b + component[None, :]

    def mv(parts):
        return layout.split(operator.mv(layout.join(parts)))

    (columns,) = push(mv, [colours], count * b, layout.dtypes)
    # (colour, row, component of the row, component of the column)
    columns = jnp.moveaxis(columns.reshape(count, b, m, b), 1, -1)
    lower, diagonal, upper = (pick(columns, (row + k) % count) for k in (-1, 0, 1))
    return lower, diagonal, upper


def _given(blocks: Any, layout: ByRun) -> tuple[Blocks, Blocks, Blocks]:
    if not (isinstance(blocks, tuple | list) and len(blocks) == 3):
        raise TypeError(
            "`BlockTridiagonal(blocks=fn)`: fn must return (lower, diagonal, upper), but it "
            f"returned {type(blocks).__name__}."
        )
    (m, b), (dtype,) = layout.shapes[0], layout.dtypes
    name = "`BlockTridiagonal(blocks=fn)`: each array that fn returns"
    lower, diagonal, upper = (check_blocks(x, (m, b, b), dtype, name) for x in blocks)
    return lower, diagonal, upper

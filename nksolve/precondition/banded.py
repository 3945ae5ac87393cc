"""Banded matrices: probed, factored and solved with."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
import numpy as np

from .. import tree
from ..linearise.operator import JacobianOperator
from ..linearise.sparsity import Pattern
from ..typing import Args, Y
from .base import AbstractPreconditioner
from .block_tridiagonal import Solve, closed
from .elimination import AbstractElimination, Blocks, for_platform
from .layout import ByRun, along_line, check_space
from .stencil import pick, push


class Banded(AbstractPreconditioner):
    """M = the band of J, −lower ≤ j − i ≤ upper, M⁻¹ by elimination: J⁻¹ itself where J is banded.

    The unknowns are ordered node after node: along the first axis of all leaves, which must be the
    same, and at each node leaf after leaf. For one array that is its ravelled order; for two
    arrays (n,) it is u₀, v₀, u₁, v₁, ….

    The band is eliminated in blocks of b = max(lower, upper, 1), of which it has a block
    tridiagonal matrix. Against `nks.BlockTridiagonal` it needs lower + upper + 1 probes instead
    of 3 b.

    **Arguments:**

    - `lower`, `upper`: half-bandwidths, the number of diagonals below and above the main one.
    - `elimination`: as of `nks.BlockTridiagonal`.

    Entries of J outside the band are added to others of the same row by the probes, and M is poor.
    No pivoting across blocks; a singular pivot becomes the identity. A complex unknown counts as
    complex-linear.

    Storage: 3 b vectors (`CyclicReduction`: 5 b). Work: 3 b multiplications and additions an entry
    (5 b); an update lower + upper + 1 matvecs in one batch, and what the elimination takes.

    Source: Curtis, Powell & Reid, J. Inst. Math. Appl. 13, 1974 (the probes); Golub & Van Loan,
    Matrix Computations, 4th ed., section 4.5.
    """

    lower: int = eqx.field(static=True)
    upper: int = eqx.field(static=True)
    elimination: AbstractElimination | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        if self.lower < 0 or self.upper < 0:
            raise ValueError(
                f"Half-bandwidths must not be negative, but they are {self.lower}, {self.upper}."
            )

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        del y, args
        structure = check_space(operator, "Banded")
        if tree.size(structure) == 0:
            return lx.IdentityLinearOperator(operator.out_structure(), structure)
        order = along_line(structure, "Banded")
        layout = ByRun(order, max(self.lower, self.upper, 1))
        blocks = self._blocks(self._diagonals(operator, ByRun(order, 1)), layout)
        factors = for_platform(self.elimination).factor(*closed(*blocks, layout.size))
        return JacobianOperator(Solve(factors, layout), operator.out_structure(), structure)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        del y, args
        return min(self.lower + self.upper + 1, tree.size(operator.in_structure()))

    def _diagonals(self, operator: lx.AbstractLinearOperator, flat: ByRun) -> Any:
        """J_{i,i+k} for k = −lower … upper, zero beyond the ends: (lower + upper + 1, n)."""
        n = flat.size
        count = min(self.lower + self.upper + 1, n)
        row = jnp.arange(n, dtype=jnp.int32)

        def mv(parts):
            return flat.split(operator.mv(flat.join(parts)))

        (columns,) = push(mv, [(row % count)[:, None]], count, flat.dtypes)
        columns = columns[..., 0]

        def diagonal(k):
            inside = (row + k >= 0) & (row + k < n)
            found = pick(columns, (row + k) % count)
            return jnp.where(inside, found, jnp.zeros_like(found))

        return jnp.stack([diagonal(k) for k in range(-self.lower, self.upper + 1)])

    def _blocks(self, diagonals: Any, layout: ByRun) -> tuple[Blocks, Blocks, Blocks]:
        """Entry (r, c) of the block in column i + s of row i lies on diagonal s b + c − r."""
        ((m, b),) = layout.shapes
        padded = jnp.pad(diagonals, ((0, 1), (0, m * b - layout.size)))
        # The last of these diagonals is zero: it stands for all that is outside the band.
        padded = padded.reshape(-1, m, b)
        r, c = np.indices((b, b))

        def block(s):
            k = s * b + c - r
            inside = (k >= -self.lower) & (k <= self.upper)
            which = np.where(inside, k + self.lower, diagonals.shape[0])
            return jnp.moveaxis(padded[which, :, r], -1, 0)

        return block(-1), block(0), block(1)


def bandwidth_along_line(pattern: Pattern, structure: tree.Structure) -> tuple[int, int]:
    """The half-bandwidths (lower, upper) of a pattern with the unknowns node after node.

    A `Pattern` counts the unknowns leaf after leaf.
    """
    order = along_line(structure, "Banded")
    widths = order.widths
    nodes = order.nodes[0] if order.nodes else 1
    starts = np.cumsum([0, *widths])
    places = [
        (np.arange(nodes)[:, None] * starts[-1] + start + np.arange(width)).reshape(-1)
        for start, width in zip(starts, widths, strict=False)
    ]
    place = np.concatenate(places)
    below = place[pattern.rows] - place[pattern.cols]
    return int(below.max(initial=0)), int((-below).max(initial=0))

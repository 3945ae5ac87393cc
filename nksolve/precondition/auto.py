"""A preconditioner picked from what can be seen of J without evaluating it."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.tree_util as jtu
import lineax as lx
import numpy as np

from .. import tree
from ..linearise.sparsity import Pattern, find_pattern
from ..typing import Args, Y
from .banded import Banded, bandwidth_along_line
from .base import AbstractPreconditioner, Identity
from .dense import Dense
from .jacobi import Jacobi
from .sparse_lu import SparseLU

#: So few unknowns make a dense matrix.
MAX_DENSE = 16
#: A band of so many diagonals at most is eliminated.
MAX_DIAGONALS = 33
#: A sparse factorisation fills in: for so many unknowns at most, and so many entries a row.
MAX_FACTORED, MAX_ENTRIES = 20_000, 60
#: To find a pattern takes time in proportion to n; beyond this it is not looked for.
MAX_DETECTED = 300_000


class Seen(NamedTuple):
    """What can be seen of J."""

    n: int
    pattern: Pattern | None
    note: str  # of the pattern, or why there is none
    band: tuple[int, int] | None  # half-bandwidths with the unknowns node after node
    is_real: bool
    can_factor: bool  # by KLU, here
    definite: bool  # tagged so

    @property
    def is_small(self) -> bool:
        """Whether to invert J."""
        return self.is_real and 0 < self.n <= MAX_DENSE

    @property
    def is_banded(self) -> bool:
        """Whether to eliminate the band."""
        return self.band is not None and sum(self.band) + 1 <= min(MAX_DIAGONALS, self.n)

    @property
    def is_sparse(self) -> bool:
        """Whether to factor with fill-in."""
        return (
            self.pattern is not None
            and self.can_factor
            and self.n <= MAX_FACTORED
            and self.pattern.nnz <= MAX_ENTRIES * self.n
        )


class Auto(AbstractPreconditioner):
    """Picks a preconditioner by the pattern of J, its size, its dtype and the device.

    In this order, the first that applies:

    - `nks.Dense` with at most 16 unknowns, real ones: M is J then;
    - `nks.Banded` where J has at most 33 diagonals (unknowns node after node): M is J then;
    - `nks.SparseLU` where J has at most 60 entries a row and 20,000 unknowns, on a CPU with klujax;
    - `nks.Jacobi`, its diagonal by coloured matvecs, where J is sparse;
    - `nks.Identity` where J is dense or its pattern is not known (asdex missing, a size above
      300,000, a program that asdex cannot follow).

    It never sees values, so it cannot know of scaling, symmetry or grids: who knows those chooses
    better. What was picked, and why, stands in `stats["choice"]`, and is printed with
    `verbose=True`; `why` tells it of an operator.

    **Arguments:**

    - `pattern`: the pattern of J, where the user knows it; found by asdex otherwise.

    Storage and work: those of what is picked.
    """

    pattern: Pattern | None = eqx.field(static=True, default=None)

    def chosen(
        self, operator: Callable[[], lx.AbstractLinearOperator], y: Y, args: Args
    ) -> AbstractPreconditioner:
        del y, args
        return pick(look(operator, self.pattern))[0]

    def why(self, operator: Callable[[], lx.AbstractLinearOperator], y: Y, args: Args) -> str:
        del y, args
        chosen, reason = pick(look(operator, self.pattern))
        return f"{type(chosen).__name__}: {reason}"

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        chosen = self.chosen(lambda: operator, y, args)
        return chosen, chosen.init(operator, y, args)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        chosen, inner = state
        return chosen.as_operator(inner)

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        return self.chosen(lambda: operator, y, args).num_probes(operator, y, args)


def look(operator: Callable[[], lx.AbstractLinearOperator], pattern: Pattern | None) -> Seen:
    """What can be seen of an operator; runs no matvec, and adds nothing to a program."""
    seen: list[Seen] = []
    jax.eval_shape(lambda: seen.append(_look(operator(), pattern)))
    return seen[0]


def pick(seen: Seen) -> tuple[AbstractPreconditioner, str]:
    """The preconditioner, and why."""
    if seen.is_small:
        return Dense(), f"{seen.n} unknowns"
    if seen.is_banded:
        assert seen.band is not None
        return Banded(*seen.band), f"{seen.note}, {sum(seen.band) + 1} diagonals"
    if seen.is_sparse:
        return SparseLU(seen.pattern), f"{seen.note}, few enough to factor on this CPU"
    if seen.pattern is not None:
        return Jacobi(probes=seen.pattern), f"{seen.note}, too many to factor here"
    return Identity(), seen.note


def _look(operator: lx.AbstractLinearOperator, pattern: Pattern | None) -> Seen:
    structure = operator.in_structure()
    n = tree.size(structure)
    dtypes = {np.dtype(leaf.dtype).kind for leaf in jtu.tree_leaves(structure)}
    is_real = dtypes <= {"f"}
    note = ""
    if pattern is None and not (is_real and n <= MAX_DENSE):
        pattern, note = _found(operator, n)
    band = None
    if pattern is not None:
        note = f"{n} unknowns with {pattern.nnz / max(n, 1):.1f} entries a row"
        band = _band(pattern, structure)
    return Seen(
        n=n,
        pattern=pattern,
        note=note,
        band=band,
        can_factor=(
            jax.default_backend() == "cpu"
            and find_spec("klujax") is not None
            and bool(jax.config.jax_enable_x64)  # pyright: ignore
            and len(dtypes) == 1
        ),
        is_real=is_real,
        definite=lx.is_positive_semidefinite(operator) or lx.is_negative_semidefinite(operator),
    )


def _found(operator: lx.AbstractLinearOperator, n: int) -> tuple[Pattern | None, str]:
    if find_spec("asdex") is None:
        return None, "the pattern of J is not known without asdex (pip install 'nksolve[sparse]')"
    if n > MAX_DETECTED:
        return None, f"the pattern of J is not looked for with more than {MAX_DETECTED} unknowns"
    try:
        pattern = find_pattern(operator)
    except ValueError as error:
        return None, f"no sparse pattern of J was found ({str(error).split('.')[0]})"
    if n > 1 and pattern.density > 0.5:
        return None, f"J is dense ({n} unknowns, {100 * pattern.density:.0f} % of the entries)"
    return pattern, ""


def _band(pattern: Pattern, structure: tree.Structure) -> tuple[int, int] | None:
    """Half-bandwidths with the unknowns node after node, where the leaves share a first axis."""
    leaves = jtu.tree_leaves(structure)
    if not leaves or any(leaf.ndim == 0 for leaf in leaves):
        return None
    if len({leaf.shape[0] for leaf in leaves}) > 1:
        return None
    return bandwidth_along_line(pattern, structure)

"""Diagonal scaling."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx

from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..typing import Args, Vector, Y
from .base import AbstractPreconditioner
from .probes import AbstractProbes, as_probes


class Jacobi(AbstractPreconditioner):
    """M = diag(J): M⁻¹v = v / d, entry by entry.

    The diagonal is written down by the user or found by probing J.

    **Arguments:**

    - `diagonal`: `(y, args) -> d`, a PyTree of arrays with the structure and shapes of the
      inexact arrays of y; no matvec. Or
    - `probes`: how to find d. `nks.Star()` for the five-point stencil and its likes (2 matvecs),
      `nks.Box(w)` or just w, or a tuple of half-widths for the axes of a leaf
      (`nks.StencilProbes`); an object with a `colours` or `colors` attribute, one for each entry
      (`nks.ColouredProbes`); `nks.Hutchinson(probes)`, an estimate that needs to know nothing.

    Entries that are zero or not finite are left unscaled.

    Storage: one vector. Work: one division an entry; an update the matvecs of `probes`, in one
    batch.
    """

    diagonal: Callable[[Y, Args], Vector] | None = None
    probes: AbstractProbes | None = eqx.field(default=None, converter=as_probes, kw_only=True)

    def __check_init__(self):
        if (self.diagonal is None) == (self.probes is None):
            raise ValueError(
                "`Jacobi` needs to know where the diagonal comes from, one of: `Jacobi(fn)` with "
                "`fn(y, args)` that returns it; `Jacobi(probes=nks.Star())` for a five-point "
                "stencil, `probes=(w, ...)` for other half-widths; `probes=pattern` with the "
                "colours of a sparsity pattern; or `probes=nks.Hutchinson(16)`, an estimate."
            )

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        structure = operator.in_structure()
        if self.probes is not None:
            d = self.probes.diagonal(operator)
        else:
            d = eqx.filter(self.diagonal(y, args), eqx.is_inexact_array)  # pyright: ignore
        shapes = jtu.tree_map(lambda x: x.shape, d, is_leaf=eqx.is_array)
        wanted = jtu.tree_map(lambda x: x.shape, structure)
        if shapes != wanted:
            raise ValueError(
                f"`Jacobi(diagonal)`: the diagonal has shapes {shapes}, the unknown {wanted}."
            )
        reciprocal = jtu.tree_map(_reciprocal, d, structure)
        tags = frozenset({lx.diagonal_tag, lx.symmetric_tag})
        return JacobianOperator(_Scaling(reciprocal), operator.out_structure(), structure, tags)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        del y, args
        return 0 if self.probes is None else self.probes.num_probes(operator.in_structure())


def _reciprocal(d, like):
    d = d.astype(like.dtype)
    usable = (d != 0) & jnp.isfinite(1 / d)
    return jnp.where(usable, 1 / jnp.where(usable, d, jnp.ones_like(d)), jnp.ones_like(d))


class _Scaling(AbstractLinearMap):
    """v → r v."""

    factors: Vector

    def mv(self, vector: Vector) -> Vector:
        return jtu.tree_map(jnp.multiply, self.factors, vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        return self.mv(vector)

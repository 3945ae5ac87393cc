"""A linear system for a Krylov method, and what comes out of a solve."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import lineax as lx
from jaxtyping import PyTree

from .. import tree
from ..loops import any_lane
from ..typing import Count, Flag, LinearFn, Scalar, Vector


class LinearSystem(NamedTuple):
    """A x = b without b: `mv` is v → A v, `psolve` v → M⁻¹v (`None` without preconditioner).

    `transpose_mv` and `transpose_psolve` are w → Aᵀw and w → M⁻ᵀw, transposes without conjugation,
    for the methods that need them; calling `transpose_mv` raises where the operator has none.
    `real` says that inner products are real: always for real vectors, and for complex ones when A
    is only real-linear, so that ℂⁿ counts as ℝ²ⁿ. `wanted` says of the lanes of a batch whether a
    loop goes on where the flag holds in those that want more of it: by default if any does.
    """

    mv: LinearFn
    psolve: LinearFn | None
    real: bool
    transpose_mv: LinearFn | None = None
    transpose_psolve: LinearFn | None = None
    wanted: Callable[[Flag], Flag] = any_lane


class KrylovResult(NamedTuple):
    """What `AbstractKrylovSolver.solve` returns; counters as in the stats.

    `descent` is Re⟨b, A x⟩ or a lower bound of it that is positive where the residual shrank;
    `None` where the method does not know one without a further matvec.
    """

    value: Vector
    residual_norm: Scalar
    descent: Scalar | None
    result: lx.RESULTS
    num_steps: Count
    num_matvecs: Count
    num_transposed_matvecs: Count
    num_preconditioner_applications: Count
    num_restarts: Count
    workspace: PyTree


class KrylovState(eqx.Module):
    """An operator A and a preconditioner M⁻¹ ≈ A⁻¹, both Lineax operators.

    `wide` is A in the precision of the right-hand sides where `operator` and `preconditioner` are
    of a lower one (`nks.LowerPrecision`), and otherwise `None`.
    """

    operator: lx.AbstractLinearOperator
    preconditioner: lx.AbstractLinearOperator
    wide: lx.AbstractLinearOperator | None = None

    def system(self, real: bool, *, preconditioned: bool = False) -> LinearSystem:
        """The system as functions, with the identity for M⁻¹ only where it must be
        `preconditioned`."""
        identity = isinstance(self.preconditioner, lx.IdentityLinearOperator) and not preconditioned
        return LinearSystem(
            self.operator.mv,
            None if identity else self.preconditioner.mv,
            real,
            lambda w: self.operator.transpose().mv(w),
            None if identity else lambda w: self.preconditioner.transpose().mv(w),
        )

    def transpose(self) -> "KrylovState":
        """The state of Aᵀ: its preconditioner is M⁻ᵀ."""
        return self._mapped(lambda operator: operator.transpose())

    def conj(self) -> "KrylovState":
        """The state of conj(A)."""
        return self._mapped(lx.conj)

    def _mapped(self, change: Callable) -> "KrylovState":
        wide = None if self.wide is None else change(self.wide)
        return KrylovState(change(self.operator), change(self.preconditioner), wide)


def check_endomorphism(name: str, psolve: LinearFn, structure: tree.Structure) -> None:
    """Raises unless M⁻¹ maps the space of x, of that structure, to itself."""
    try:
        image = tree.structure(jax.eval_shape(psolve, structure))
    except (TypeError, ValueError) as error:
        image = error
    if image != structure:
        raise ValueError(
            f"{name} applies M⁻¹ on the right, so it must map the space of x, {structure}, to "
            f"itself; it gives {image}."
        )

"""A linear solver picked from what can be seen of J without evaluating it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import lineax as lx
from jaxtyping import PyTree

from ..linearise.sparsity import Pattern
from ..precondition.auto import Auto, Seen, look, pick
from ..precondition.base import AbstractPreconditioner
from ..typing import Args, Scalar, ScalarLike, Vector, Y
from .base import AbstractKrylovSolver
from .cg import CG
from .direct import BandedDirect, DenseDirect, SparseDirect
from .gmres import GMRES
from .system import KrylovResult, KrylovState, LinearSystem


class _Chosen(eqx.Module):
    """A method with its state."""

    solver: AbstractKrylovSolver
    state: KrylovState


class AutoLinear(AbstractKrylovSolver):
    """Picks a linear solver by the pattern of J, its size, tags, dtype and the device.

    In this order, the first that applies:

    - `nks.DenseDirect` with at most 16 unknowns, real ones;
    - `nks.BandedDirect` where J has at most 33 diagonals (unknowns node after node);
    - `nks.SparseDirect` where J has at most 60 entries a row and 20,000 unknowns, on a CPU with
      klujax;
    - `nks.CG` where J is tagged positive or negative semidefinite;
    - `nks.GMRES`; both with the preconditioner of `nks.Auto`.

    It never sees values. Who knows of a grid, of symmetry or of scales does better to choose:
    multigrid is not among the choices. What was picked, and why, stands in `stats["choice"]` of a
    root find, and is printed with `verbose=True`; `why` tells it of an operator.

    **Arguments:**

    - `rtol`, `atol`, `max_steps`: of what is picked.
    - `restart`: of GMRES.
    - `preconditioner`: `nks.Auto(pattern)` where the user knows the pattern of J; by default asdex
      finds it.

    Storage and work: those of what is picked.
    """

    rtol: ScalarLike = 1e-6
    atol: ScalarLike = 0.0
    restart: int = eqx.field(static=True, default=30)
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: AbstractPreconditioner = Auto()

    def __check_init__(self):
        if not isinstance(self.preconditioner, Auto):
            raise TypeError(
                "`AutoLinear` picks the preconditioner too, so that it takes only `nks.Auto`, "
                f"which may hold the pattern of J; got `{type(self.preconditioner).__name__}`. "
                "Take a method of your choice with it, such as `nks.GMRES(preconditioner=...)`."
            )

    def chosen(
        self, operator: Callable[[], lx.AbstractLinearOperator], y: Y, args: Args
    ) -> AbstractKrylovSolver:
        del y, args
        return self._pick(look(operator, self._pattern))[0]

    def why(self, operator: Callable[[], lx.AbstractLinearOperator], y: Y, args: Args) -> str:
        del y, args
        return self._pick(look(operator, self._pattern))[1]

    @property
    def _pattern(self) -> Pattern | None:
        assert isinstance(self.preconditioner, Auto)
        return self.preconditioner.pattern

    def _pick(self, seen: Seen) -> tuple[AbstractKrylovSolver, str]:
        preconditioner, reason = pick(seen)
        if seen.is_small:
            return DenseDirect(self.rtol, self.atol), f"DenseDirect: {reason}"
        if seen.is_banded:
            assert seen.band is not None
            lower, upper = seen.band
            return BandedDirect(
                self.rtol, self.atol, lower=lower, upper=upper
            ), f"BandedDirect: {reason}"
        if seen.is_sparse:
            return SparseDirect(
                self.rtol, self.atol, pattern=seen.pattern
            ), f"SparseDirect: {reason}"
        by = f"preconditioned by {type(preconditioner).__name__}: {reason}"
        common: dict[str, Any] = {
            "rtol": self.rtol,
            "atol": self.atol,
            "max_steps": self.max_steps,
            "preconditioner": preconditioner,
        }
        if seen.definite:
            return CG(**common), f"CG (J is tagged definite) {by}"
        restart = max(min(self.restart, seen.n), 1)
        return GMRES(**common, restart=restart), f"GMRES {by}"

    # As a Lineax solver: the choice is made where the operator is known, and kept in the state.

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> Any:
        solver = self.chosen(lambda: operator, None, None)
        return _Chosen(solver, solver.init(operator, options))

    def compute(
        self, state: Any, vector: Vector, options: dict[str, Any]
    ) -> tuple[Vector, lx.RESULTS, dict[str, Any]]:
        return state.solver.compute(state.state, vector, options)

    def transpose(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        inner, options = state.solver.transpose(state.state, options)
        return _Chosen(state.solver, inner), options

    def conj(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        inner, options = state.solver.conj(state.state, options)
        return _Chosen(state.solver, inner), options

    def workspace(self, vector: Vector, *, real: bool) -> PyTree:
        raise TypeError(_NOT_CHOSEN)

    def solve(
        self,
        system: LinearSystem,
        vector: Vector,
        *,
        tolerance: ScalarLike,
        workspace: PyTree,
        norm: Scalar | None = None,
        guess: Vector | None = None,
        verify: bool = False,
    ) -> KrylovResult:
        raise TypeError(_NOT_CHOSEN)


_NOT_CHOSEN = "`AutoLinear` solves nothing itself: `chosen(operator, y, args)` is what does."

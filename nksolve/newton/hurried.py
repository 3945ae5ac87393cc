"""A Krylov method in a batch that a few lanes do not hold up."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax.lax as lax
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import PyTree

from .. import tree
from ..krylov.base import AbstractKrylovSolver
from ..krylov.system import KrylovResult, LinearSystem
from ..loops import any_lane
from ..precondition.base import AbstractPreconditioner
from ..typing import Args, Count, Flag, Scalar, ScalarLike, Vector, Y

#: The name of the axis of the lanes.
LANES = "nksolve.lanes"

_Tree = TypeVar("_Tree")


class Hurried(AbstractKrylovSolver):
    """A Krylov method under `vmap` over `LANES`, left once at most `left` lanes want more of it.

    Those lanes get the iterate that they have reached, and a result that is no success. Only
    methods that look at the whole batch in their loop (GMRES, FGMRES, GCRODR) can be left; others
    run to their end.

    **Arguments:**

    - `method`: the Krylov method.
    - `left`: may be traced; 0 for a solve as ever.
    """

    method: AbstractKrylovSolver
    left: Count

    @property
    def rtol(self) -> ScalarLike:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the method."""
        return self.method.rtol

    @property
    def atol(self) -> ScalarLike:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the method."""
        return self.method.atol

    @property
    def preconditioner(self) -> AbstractPreconditioner:  # pyright: ignore
        """Of the method."""
        return self.method.preconditioner

    @property
    def is_flexible(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the method."""
        return self.method.is_flexible

    @property
    def underlying(self) -> AbstractKrylovSolver:
        return self.method

    @property
    def needs_symmetry(self) -> bool:
        return self.method.needs_symmetry

    @property
    def needs_transpose(self) -> bool:
        return self.method.needs_transpose

    def check_operator(self, operator: lx.AbstractLinearOperator) -> None:
        self.method.check_operator(operator)

    def workspace(self, vector: Vector, *, real: bool) -> PyTree:
        return self.method.workspace(vector, real=real)

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
        def wanted(flag: Flag) -> Flag:
            return any_lane(lax.psum(tree.count(flag), LANES) > self.left)

        return self.method.solve(
            system._replace(wanted=wanted),
            vector,
            tolerance=tolerance,
            workspace=workspace,
            norm=norm,
            guess=guess,
            verify=verify,
        )

    def chosen(
        self, operator: Callable[[], lx.AbstractLinearOperator], y: Y, args: Args
    ) -> AbstractKrylovSolver:
        return hurried(self.method.chosen(operator, y, args), self.left)

    def why(self, operator: Callable[[], lx.AbstractLinearOperator], y: Y, args: Args) -> str:
        return self.method.why(operator, y, args)

    def report(self, workspace: PyTree) -> dict[str, Any]:
        return self.method.report(workspace)


def hurried(solver: _Tree, left: Count) -> _Tree:
    """The solver, or the Krylov method, with every Krylov method in it hurried."""
    is_method = lambda x: isinstance(x, AbstractKrylovSolver)

    def one(x):
        return Hurried(method=x, left=left) if is_method(x) else x  # pyright: ignore

    return jtu.tree_map(one, solver, is_leaf=is_method)

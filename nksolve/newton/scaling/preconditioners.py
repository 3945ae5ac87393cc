"""Preconditioners of a scaled Jacobian, made of the J and y that the user knows."""

from collections.abc import Callable
from typing import Any

import jax.tree_util as jtu
import lineax as lx

from ...krylov.inner import InnerKrylov
from ...linearise.operator import JacobianOperator
from ...precondition.auto import Auto
from ...precondition.banded import Banded
from ...precondition.base import AbstractPreconditioner, Identity
from ...precondition.block_jacobi import BlockJacobi
from ...precondition.block_tridiagonal import BlockTridiagonal
from ...precondition.chebyshev import Chebyshev
from ...precondition.composite import Additive, Multiplicative
from ...precondition.dense import Dense
from ...precondition.jacobi import Jacobi
from ...precondition.lagged import Lagged
from ...precondition.quasi_newton import QuasiNewton
from ...precondition.sparse_lu import SparseLU
from ...typing import Args, Count, Flag, Y
from .units import Scaling, UnitsMap, in_units, viewed


class InUnits(AbstractPreconditioner):
    """S_u⁻¹ M⁻¹ S_F for Ĵ = S_F⁻¹ J S_u, with M made of the J and y that the user knows."""

    preconditioner: AbstractPreconditioner
    scaling: Scaling

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        return self.preconditioner.init(self._plain(operator), self.scaling.plain(y), args)

    def update(self, state: Any, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        plain, point = self._plain(operator), self.scaling.plain(y)
        return self.preconditioner.update(state, plain, point, args)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return viewed(self.preconditioner.as_operator(state), self.scaling.of_inverses)

    def is_due(self, state: Any, y: Y, args: Args) -> Flag:
        return self.preconditioner.is_due(state, self.scaling.plain(y), args)

    def observe(self, state: Any, num_steps: Count) -> Any:
        return self.preconditioner.observe(state, num_steps)

    def chosen(
        self, operator: Callable[[], lx.AbstractLinearOperator], y: Y, args: Args
    ) -> AbstractPreconditioner:
        plain = lambda: self._plain(operator())
        found = self.preconditioner.chosen(plain, self.scaling.plain(y), args)
        return self if found is self.preconditioner else in_units(found, self.scaling)

    def why(self, operator: Callable[[], lx.AbstractLinearOperator], y: Y, args: Args) -> str:
        plain = lambda: self._plain(operator())
        return self.preconditioner.why(plain, self.scaling.plain(y), args)

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        return self.preconditioner.num_probes(self._plain(operator), self.scaling.plain(y), args)

    def num_update_probes(
        self, state: Any, operator: lx.AbstractLinearOperator, y: Y, args: Args
    ) -> int | Count:
        plain, point = self._plain(operator), self.scaling.plain(y)
        return self.preconditioner.num_update_probes(state, plain, point, args)

    def matvecs_per_application(self, operator: lx.AbstractLinearOperator) -> int:
        return self.preconditioner.matvecs_per_application(self._plain(operator))

    @property
    def is_rebuilt(self) -> bool:
        return self.preconditioner.is_rebuilt

    @property
    def is_variable(self) -> bool:
        return self.preconditioner.is_variable

    @property
    def keeps_symmetry(self) -> bool:
        return self.preconditioner.keeps_symmetry

    @property
    def needs_transpose(self) -> bool:
        return self.preconditioner.needs_transpose

    def _plain(self, operator: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
        if isinstance(operator, JacobianOperator) and isinstance(operator.linear_map, UnitsMap):
            return operator.linear_map.operator
        # In lower precision, or with a shift: J = S_F Ĵ S_u⁻¹, as another view.
        return viewed(operator, self.scaling.undoing)


#: Preconditioners that know J by its products alone unless the field is given. `InUnits` would be
#: right for them too; what they estimate, pivot or iterate is better done with the scaled J.
_OF_PRODUCTS: dict[type[AbstractPreconditioner], str | None] = {
    Additive: None,
    Auto: None,
    Banded: None,
    BlockJacobi: "blocks",
    BlockTridiagonal: "blocks",
    Chebyshev: "bounds",
    Dense: None,
    Identity: None,
    InnerKrylov: None,
    Jacobi: "diagonal",
    Lagged: "shift",
    Multiplicative: None,
    QuasiNewton: None,
    SparseLU: None,
}


@in_units.register
def _(part: AbstractPreconditioner, scaling: Scaling) -> AbstractPreconditioner:
    told = _OF_PRODUCTS.get(type(part), "")
    if told == "" or (told is not None and getattr(part, told) is not None):
        return InUnits(part, scaling)
    # The parts of a composite have the same J and y as the whole.
    is_part = lambda x: x is not part and isinstance(x, AbstractPreconditioner)
    return jtu.tree_map(lambda x: in_units(x, scaling), part, is_leaf=is_part)

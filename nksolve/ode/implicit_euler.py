"""The implicit Euler method."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import numpy as np

from ..typing import Vector
from .esdirk import AbstractESDIRK
from .tableau import Tableau


class ImplicitEuler(AbstractESDIRK):
    """y1 = y0 + h f(t1, y1), of first order, L-stable.

    The error estimate is half the difference to the explicit Euler step.
    """

    tableau: ClassVar[Tableau] = Tableau(
        c=np.array([0.0, 1.0]),
        lower=np.zeros((2, 2)),
        b_error=np.array([-0.5, 0.5]),
        gamma=1.0,
        order=1,
    )
    interpolation_cls: ClassVar[Callable[..., Any]] = dfx.LocalLinearInterpolation

    def error_order(self, terms: Any) -> float:
        del terms
        return 2.0

    def dense_info(
        self, y0: Vector, y1: Vector, ks: Vector, explicit_ks: Vector
    ) -> dict[str, Vector]:
        del ks, explicit_ks
        return dict(y0=y0, y1=y1)

"""Kværnø's ESDIRK methods."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx

from .esdirk import AbstractESDIRK
from .tableau import Tableau


class Kvaerno3(AbstractESDIRK):
    """Kværnø's 3(2) method of 4 stages, A-L stable."""

    tableau: ClassVar[Tableau] = Tableau.of(dfx.Kvaerno3.tableau)
    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = dfx.ThirdOrderHermitePolynomialInterpolation

    def order(self, terms: Any) -> int:
        del terms
        return 3


class Kvaerno4(AbstractESDIRK):
    """Kværnø's 4(3) method of 5 stages, A-L stable."""

    tableau: ClassVar[Tableau] = Tableau.of(dfx.Kvaerno4.tableau)
    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = dfx.ThirdOrderHermitePolynomialInterpolation

    def order(self, terms: Any) -> int:
        del terms
        return 4


class Kvaerno5(AbstractESDIRK):
    """Kværnø's 5(4) method of 7 stages, A-L stable."""

    tableau: ClassVar[Tableau] = Tableau.of(dfx.Kvaerno5.tableau)
    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = dfx.ThirdOrderHermitePolynomialInterpolation

    def order(self, terms: Any) -> int:
        del terms
        return 5

"""Kværnø's ESDIRK methods."""

from typing import ClassVar

import diffrax as dfx

from .esdirk import AbstractESDIRK
from .tableau import Tableau


class Kvaerno3(AbstractESDIRK):
    """Kværnø's 3(2) method of 4 stages, A-L stable."""

    tableau: ClassVar[Tableau] = Tableau.of(dfx.Kvaerno3.tableau, 3)


class Kvaerno4(AbstractESDIRK):
    """Kværnø's 4(3) method of 5 stages, A-L stable."""

    tableau: ClassVar[Tableau] = Tableau.of(dfx.Kvaerno4.tableau, 4)


class Kvaerno5(AbstractESDIRK):
    """Kværnø's 5(4) method of 7 stages, A-L stable."""

    tableau: ClassVar[Tableau] = Tableau.of(dfx.Kvaerno5.tableau, 5)

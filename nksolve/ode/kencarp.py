"""Kennedy and Carpenter's IMEX methods: one part of the terms explicit, the other matrix-free
implicit."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx

from ..typing import Args, ScalarLike, Vector
from .attach import Increment
from .esdirk import AbstractESDIRK
from .tableau import ExplicitTableau, Tableau


class AbstractKenCarp(AbstractESDIRK):
    """z_i = y0 + Σ_{j<i} (â_ij k̂_j + a_ij k_j) + γ k_i, with k̂ = h f̂(t, z) and k = h f(t, z).

    For `dfx.MultiTerm(explicit, implicit)`: f̂ is evaluated at every stage, f linearised once a
    step. Both halves have the same weights, so that y1 = y0 + Σ_i b_i (k̂_i + k_i).
    """

    term_structure: ClassVar = dfx.MultiTerm[tuple[dfx.AbstractTerm, dfx.AbstractTerm]]

    def increments(
        self, terms: Any, args: Args, t0: ScalarLike, t1: ScalarLike, y0: Vector
    ) -> tuple[Increment, Increment | None]:
        explicit, implicit = (Increment.of(term, args, t0, t1, y0) for term in terms.terms)
        return implicit, explicit

    def dense_info(self, y0: Vector, y1: Vector, ks: Vector, explicit_ks: Vector) -> dict[str, Any]:
        return dict(y0=y0, y1=y1, k=(explicit_ks, ks))


class KenCarp3(AbstractKenCarp):
    """The 3(2) pair of 4 stages: `ARK3(2)4L[2]SA`.

    Source: Kennedy & Carpenter, Additive Runge–Kutta schemes for convection–diffusion–reaction
    equations, Appl. Numer. Math. 44, 2003, coefficients and interpolant as in Diffrax.
    """

    tableau: ClassVar[Tableau] = Tableau.of(dfx.KenCarp3.tableau.tableaus[1], 3)
    explicit_tableau: ClassVar[ExplicitTableau] = ExplicitTableau.of(
        dfx.KenCarp3.tableau.tableaus[0]
    )
    interpolation_cls: ClassVar[Callable[..., Any]] = dfx.KenCarp3.interpolation_cls


class KenCarp4(AbstractKenCarp):
    """The 4(3) pair of 6 stages: `ARK4(3)6L[2]SA`.

    Source: Kennedy & Carpenter, Additive Runge–Kutta schemes for convection–diffusion–reaction
    equations, Appl. Numer. Math. 44, 2003, coefficients and interpolant as in Diffrax.
    """

    tableau: ClassVar[Tableau] = Tableau.of(dfx.KenCarp4.tableau.tableaus[1], 4)
    explicit_tableau: ClassVar[ExplicitTableau] = ExplicitTableau.of(
        dfx.KenCarp4.tableau.tableaus[0]
    )
    interpolation_cls: ClassVar[Callable[..., Any]] = dfx.KenCarp4.interpolation_cls


class KenCarp5(AbstractKenCarp):
    """The 5(4) pair of 8 stages: `ARK5(4)8L[2]SA`.

    Source: Kennedy & Carpenter, Additive Runge–Kutta schemes for convection–diffusion–reaction
    equations, Appl. Numer. Math. 44, 2003, coefficients and interpolant as in Diffrax.
    """

    tableau: ClassVar[Tableau] = Tableau.of(dfx.KenCarp5.tableau.tableaus[1], 5)
    explicit_tableau: ClassVar[ExplicitTableau] = ExplicitTableau.of(
        dfx.KenCarp5.tableau.tableaus[0]
    )
    interpolation_cls: ClassVar[Callable[..., Any]] = dfx.KenCarp5.interpolation_cls

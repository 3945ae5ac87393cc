"""The coefficients of a diagonally implicit Runge–Kutta method as full matrices."""

from typing import NamedTuple

import diffrax as dfx
import numpy as np
from jaxtyping import Float


class Tableau(NamedTuple):
    """An ESDIRK method: explicit first stage, one γ, and the last stage is the step's end.

    z_i = y0 + Σ_{j<i} lower_ij k_j + γ k_i. `predictor` gives a first guess γ k_i ≈ γ Σ_j p_ij k_j,
    and b_error the error estimate Σ_i b_error_i k_i.
    """

    c: Float[np.ndarray, " s"]
    lower: Float[np.ndarray, "s s"]
    predictor: Float[np.ndarray, "s s"]
    b_error: Float[np.ndarray, " s"]
    gamma: float

    @classmethod
    def of(cls, published: dfx.ButcherTableau) -> "Tableau":
        """Diffrax's."""
        s = published.num_stages
        diagonal, predictor = published.a_diagonal, published.a_predictor
        assert diagonal is not None
        assert predictor is not None
        assert diagonal[0] == 0
        assert (diagonal[1:] == diagonal[1]).all()
        assert np.array_equal(published.b_sol, [*published.a_lower[-1], diagonal[1]])
        c = np.append(published.c1, published.c)
        return cls(
            c,
            square(published.a_lower, s),
            square(predictor, s),
            published.b_error,
            float(diagonal[1]),
        )


class ExplicitTableau(NamedTuple):
    """The explicit half of an additive method, on the same stages.

    z_i gets Σ_{j<i} lower_ij k_j of the explicit terms' k_j, and the step's end Σ_i closing_i k_i
    more than the last stage has.
    """

    lower: Float[np.ndarray, "s s"]
    closing: Float[np.ndarray, " s"]

    @classmethod
    def of(cls, published: dfx.ButcherTableau) -> "ExplicitTableau":
        """Diffrax's."""
        lower = square(published.a_lower, published.num_stages)
        return cls(lower, published.b_sol - lower[-1])


def square(rows: tuple[np.ndarray, ...], s: int) -> np.ndarray:
    """Rows of lengths 1, 2, … below a first one of zeros."""
    full = np.zeros((s, s))
    for i, row in enumerate(rows):
        full[i + 1, : i + 1] = row
    return full

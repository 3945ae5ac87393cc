"""The coefficients of a diagonally implicit Runge–Kutta method as full matrices."""

from typing import NamedTuple

import diffrax as dfx
import numpy as np
from jaxtyping import Float


class Tableau(NamedTuple):
    """An ESDIRK method: explicit first stage, one γ, and the last stage is the step's end.

    z_i = y0 + Σ_{j<i} lower_ij k_j + γ k_i, and the error estimate is Σ_i b_error_i k_i.
    """

    c: Float[np.ndarray, " s"]
    lower: Float[np.ndarray, "s s"]
    b_error: Float[np.ndarray, " s"]
    gamma: float
    order: int

    @classmethod
    def of(cls, published: dfx.ButcherTableau, order: int) -> "Tableau":
        """Diffrax's, of that order."""
        s = published.num_stages
        diagonal = published.a_diagonal
        assert diagonal is not None
        assert diagonal[0] == 0
        assert (diagonal[1:] == diagonal[1]).all()
        assert np.array_equal(published.b_sol, [*published.a_lower[-1], diagonal[1]])
        c = np.append(published.c1, published.c)
        return cls(
            c,
            square(published.a_lower, s),
            published.b_error,
            float(diagonal[1]),
            order,
        )

    def guess(self, lower: Float[np.ndarray, "s s"], diagonal: float) -> Float[np.ndarray, "s s"]:
        """Weights g with Σ_j g_ij k_j the first guess of z_i − y0 − Σ_j lower_ij k_j, for the k_j
        that enter z_i with `lower` and, in its own place, `diagonal`.

        z_i is taken from the polynomial through the last stages before it, of degree 3 at most. Not
        from the k_j, as an explicit method would: k_1 = h f(y0) magnifies by h/ε what y0 is off a
        manifold of relaxation time ε, and an iteration begun so far away diverges.
        """
        weights = np.stack([self._extrapolation(i) for i in range(len(self.c))])
        full = lower + diagonal * np.eye(len(self.c))
        full[0] = 0.0
        return weights @ full - lower

    def _extrapolation(self, i: int) -> Float[np.ndarray, " s"]:
        """Weights of z_1 … z_{i−1} in the polynomial at c_i through the nearest four of them."""
        places = {c: j for j, c in enumerate(self.c[:i])}  # the later of two with the same c
        nodes = sorted(places, key=lambda c: abs(c - self.c[i]))[:4]
        weights = np.zeros(len(self.c))
        for c in nodes:
            others = [(self.c[i] - o) / (c - o) for o in nodes if o != c]
            weights[places[c]] = np.prod(others)
        return weights


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

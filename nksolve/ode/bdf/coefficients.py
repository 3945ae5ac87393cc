"""Coefficients of the numerical differentiation formulas."""

import math

import numpy as np

MAX_ORDER = 5

# κ_k, k = 1 … 5. Shampine & Reichelt, The MATLAB ODE suite, SIAM J. Sci. Comput. 18 (1997) 1-22,
# table 1. Zeros give the plain backward differentiation formulas.
NDF_KAPPA = (-37.0 / 200.0, -1.0 / 9.0, -0.0823, -0.0415, 0.0)


def _checked(order: int) -> None:
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"BDF has the orders 1 to {MAX_ORDER} here, not {order}.")


def leading_coefficient(order: int) -> float:
    """γ_k = Σ_{j≤k} 1/j; the plain formula is Σ_{m≤k} ∇ᵐy_n/m = h f(t_n, y_n)."""
    return math.fsum(1.0 / j for j in range(1, order + 1))


def newton_coefficient(order: int, kappa: float = 0.0) -> float:
    """α_k = (1 − κ_k) γ_k; the matrix of the step is I − (h/α_k) J.

    With y_n = y⁽⁰⁾ + d and y⁽⁰⁾ = Σ_{m≤k} ∇ᵐy_{n−1} the step solves
    d = (h/α_k) f(t_n, y⁽⁰⁾ + d) − ψ, ψ = Σ_{1≤m≤k} γ_m ∇ᵐy_{n−1} / α_k, and d = ∇ᵏ⁺¹y_n.

    Source: Shampine & Reichelt 1997, section 2.2.
    """
    _checked(order)
    return (1.0 - kappa) * leading_coefficient(order)


def error_coefficient(order: int, kappa: float = 0.0) -> float:
    """κ_k γ_k + 1/(k + 1): what is left of the formula, over ∇ᵏ⁺¹y_n ≈ hᵏ⁺¹y⁽ᵏ⁺¹⁾ = d.

    The error test compares this multiple of d with the tolerance.

    Source: Shampine & Reichelt 1997, section 2.1.
    """
    _checked(order)
    return kappa * leading_coefficient(order) + 1.0 / (order + 1)


_ORDERS = range(1, MAX_ORDER + 1)

#: γ_k, α_k and the error coefficients by order; the entry of order 0 is not used, but for γ_0 = 0.
LEADING = np.array([0.0, *(leading_coefficient(k) for k in _ORDERS)])
NEWTON = np.array([1.0, *(newton_coefficient(k, NDF_KAPPA[k - 1]) for k in _ORDERS)])
ERROR = np.array([1.0, *(error_coefficient(k, NDF_KAPPA[k - 1]) for k in _ORDERS)])

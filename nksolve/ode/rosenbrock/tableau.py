"""The tableau of a Rosenbrock method, and the conversions between its two forms."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

Row = tuple[float, ...]
Rows = tuple[Row, ...]


class RowForm(NamedTuple):
    """The form in which order conditions are stated: α, Γ (diagonal included), b and b̂."""

    alpha: np.ndarray
    gamma: np.ndarray
    b: np.ndarray
    b_hat: np.ndarray


@dataclasses.dataclass(frozen=True)
class RosenbrockTableau:
    """A Rosenbrock method for M y' = f(t, y), in the form that needs no product with J:

        (M/(hγ) − f_y) uᵢ = f(t₀ + αᵢh, y₀ + Σ_{j<i} aᵢⱼ uⱼ) + M Σ_{j<i} (cᵢⱼ/h) uⱼ + γᵢ h f_t,
        y₁ = y₀ + Σ mᵢ uᵢ,        y₁ − ŷ₁ = Σ eᵢ uᵢ,
        y(t₀ + θh) ≈ (1 − θ) y₀ + θ (y₁ + (1 − θ)(d₁ + θ (d₂ + θ (d₃ …)))),   d_p = Σ d_pi uᵢ.

    f_y and f_t are taken at (t₀, y₀); f_t is zero for an autonomous f. M may be singular where
    the method meets the conditions for index 1 (`dae_order`). The form of the theory,

        kᵢ = h f(y₀ + Σ_{j<i} αᵢⱼ kⱼ) + h f_y Σ_{j≤i} γᵢⱼ kⱼ,      y₁ = y₀ + Σ bᵢ kᵢ,

    is `row_form()`: uᵢ = Σ γᵢⱼ kⱼ, a = αΓ⁻¹, c = γ⁻¹I − Γ⁻¹, m = bΓ⁻¹.

    **Arguments:**

    - `name`, `order`, `embedded_order`: of y₁ and of ŷ₁ with the exact Jacobian.
    - `gamma`: γ, one for all stages, so that every stage has the same matrix.
    - `a`, `c`: strictly lower triangular, as full rows.
    - `alpha_i`, `gamma_i`: αᵢ = Σ αᵢⱼ and γᵢ = Σ γᵢⱼ (γ itself included).
    - `m`, `e`: the weights of the step and of the error estimate.
    - `dense`: the rows d_p; empty where the authors publish none.
    - `dense_order`: the order to which y(t₀ + θh) is right for every θ.
    - `w_order`: the order that is left with any matrix in place of f_y, such as an old one.
    - `krylov_order`: the order with V H Vᵀ of as many Arnoldi steps in place of f_y.
    - `dae_order`: the order on semi-explicit problems of index 1; 0 where none is claimed.

    Storage: Python floats in tuples; instances are hashable, so that they can be static fields.

    Source: Hairer & Wanner, Solving ordinary differential equations II (2nd ed. 1996), eq.
    (IV.7.4) for the form of the theory, (IV.7.25) and (VI.4) for the form without products.
    """

    name: str
    order: int
    embedded_order: int
    gamma: float
    a: Rows
    c: Rows
    alpha_i: Row
    gamma_i: Row
    m: Row
    e: Row
    dense: Rows = ()
    dense_order: int = 0
    w_order: int = 1
    krylov_order: int = 1
    dae_order: int = 0

    def __post_init__(self):
        s = self.stages
        square = all(len(rows) == s and all(len(r) == s for r in rows) for rows in (self.a, self.c))
        flat = (self.alpha_i, self.gamma_i, self.e, *self.dense)
        if not square or any(len(row) != s for row in flat):
            raise ValueError(f"`{self.name}`: every row of the tableau needs {s} entries.")
        if any(
            rows[i][j] != 0.0 for rows in (self.a, self.c) for i in range(s) for j in range(i, s)
        ):
            raise ValueError(f"`{self.name}`: a and c are strictly lower triangular.")

    @property
    def stages(self) -> int:
        """How many linear systems a step solves."""
        return len(self.m)

    @property
    def stiffly_accurate(self) -> bool:
        """Whether y₁ is the argument of f in the last stage plus that stage: a_s + e_s = m.

        Then R(∞) = 0, and u_s is the error estimate.
        """
        last = np.array(self.a[-1])
        last[-1] = 1.0
        return bool(np.allclose(last, self.m, rtol=1e-13, atol=0.0))

    def row_form(self) -> RowForm:
        """α, Γ, b and b̂ of the theory."""
        gamma = np.linalg.inv(np.eye(self.stages) / self.gamma - np.array(self.c))
        m, e = np.array(self.m), np.array(self.e)
        return RowForm(np.array(self.a) @ gamma, gamma, m @ gamma, (m - e) @ gamma)

    def dense_coefficients(self) -> np.ndarray:
        """m_pi, with which y(t₀ + θh) ≈ y₀ + Σ_p θᵖ Σ_i m_pi uᵢ; row 0 belongs to p = 1."""
        if not self.dense:
            raise ValueError(
                f"`{self.name}` has no interpolant of its own: use Hermite's, of y₀, f₀, y₁, f₁."
            )
        table = np.zeros((len(self.dense) + 1, self.stages))
        table[0] = self.m
        for p, row in enumerate(self.dense):  # θ(1 − θ) θᵖ d
            table[p] += row
            table[p + 1] -= row
        return table


def from_row_form(
    name: str,
    *,
    alpha: Rows,
    gamma: Rows,
    b: Row,
    b_hat: Row,
    dense: Rows = (),
    order: int,
    embedded_order: int,
    dense_order: int = 0,
    w_order: int = 1,
    krylov_order: int = 1,
    dae_order: int = 0,
) -> RosenbrockTableau:
    """The tableau of a method whose authors print α, Γ, b and b̂ (and `dense` in terms of kᵢ)."""
    alpha_, gamma_ = np.array(alpha), np.array(gamma)
    diagonal = np.diag(gamma_)
    if np.ptp(diagonal) != 0.0 or diagonal[0] == 0.0:
        raise ValueError(f"`{name}`: the diagonal of Γ is one number γ ≠ 0.")
    s = len(b)
    inverse = np.linalg.inv(gamma_)
    transformed = lambda row: tuple((np.array(row) @ inverse).tolist())
    lower = lambda matrix: tuple(tuple(row) for row in np.tril(matrix, -1).tolist())
    return RosenbrockTableau(
        name=name,
        order=order,
        embedded_order=embedded_order,
        gamma=float(diagonal[0]),
        a=lower(alpha_ @ inverse),
        c=lower(np.eye(s) / diagonal[0] - inverse),
        alpha_i=tuple(math.fsum(row) for row in alpha),
        gamma_i=tuple(math.fsum(row) for row in gamma),
        m=transformed(b),
        e=transformed([x - y for x, y in zip(b, b_hat, strict=True)]),
        dense=tuple(transformed(row) for row in dense),
        dense_order=dense_order,
        w_order=w_order,
        krylov_order=krylov_order,
        dae_order=dae_order,
    )

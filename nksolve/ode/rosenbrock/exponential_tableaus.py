"""Coefficients of exponential Rosenbrock methods."""

import dataclasses

Row = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class ExponentialTableau:
    """An exponential Rosenbrock method for y' = f(t, y), with J = f_y, v = f_t at (t₀, y₀):

        Uᵢ = y₀ + cᵢh φ₁(cᵢhJ) f₀ + (cᵢh)² φ₂(cᵢhJ) v + h Σ_{2≤j<i} aᵢⱼ(cᵢhJ) Dⱼ,
        y₁ = y₀ + h φ₁(hJ) f₀ + h² φ₂(hJ) v + h Σ_{i≥2} bᵢ(hJ) Dᵢ,
        Dᵢ = f(t₀ + cᵢh, Uᵢ) − f₀ − J (Uᵢ − y₀) − cᵢh v,

    φ_k(z) = ∫₀¹ e^{(1−s)z} s^{k−1}/(k−1)! ds. The weights are sums of φ-functions,
    aᵢⱼ(z) = Σ_k aᵢⱼₖ φ_k(z) and bᵢ(z) = Σ_k bᵢₖ φ_k(z). Dᵢ = O(h²): what stands before it is the
    exponential Rosenbrock–Euler method, and the conditions Σ bᵢ = φ₁ and Σ aᵢⱼ = cᵢφ₁(cᵢ·) hold by
    this way of writing. ŷ₁ has b̂ in place of b; y₁ − ŷ₁ = h Σ (bᵢ − b̂ᵢ)(hJ) Dᵢ.

    **Arguments:**

    - `name`, `order`, `embedded_order`: the orders of y₁ and ŷ₁, on stiff problems too.
    - `nodes`: cᵢ, the first of them 0.
    - `a`: `a[i][j][k - 1]` = aᵢⱼₖ, stages counted from 0; `a[i]` has i entries, `a[i][0]` empty.
    - `b`, `b_hat`: `b[i][k - 1]` = bᵢₖ; `b[0]` empty.

    Storage: Python floats in tuples; instances are hashable, so that they can be static fields.

    Source: Hochbruck, Ostermann & Schweitzer, Exponential Rosenbrock-type methods, SIAM J. Numer.
    Anal. 47 (2009) 786-803: the reformulated scheme and its non-autonomous form (section 2), the
    stiff order conditions Σ bᵢcᵢ² = 2φ₃ and Σ bᵢcᵢ³ = 6φ₄ (the table of section 3).
    """

    name: str
    order: int
    embedded_order: int
    nodes: Row
    a: tuple[tuple[Row, ...], ...]
    b: tuple[Row, ...]
    b_hat: tuple[Row, ...]

    def __post_init__(self):
        s = self.stages
        if any(len(rows) != s for rows in (self.a, self.b, self.b_hat)):
            raise ValueError(f"`{self.name}`: a, b and b̂ need {s} rows, one for each node.")
        if any(len(row) != i for i, row in enumerate(self.a)):
            raise ValueError(f"`{self.name}`: row i of a has i entries, stages counted from 0.")
        if self.b[0] or self.b_hat[0] or any(row and row[0] for row in self.a):
            raise ValueError(f"`{self.name}`: the first stage has no D and so no weight.")

    @property
    def stages(self) -> int:
        """How many evaluations of f a step takes, f₀ included."""
        return len(self.nodes)

    @property
    def error_weights(self) -> tuple[Row, ...]:
        """(b − b̂)ᵢₖ, with rows as long as the longer of the two."""
        found = []
        for row, hat in zip(self.b, self.b_hat, strict=True):
            n = max(len(row), len(hat))
            longer = lambda r, n=n: r + (0.0,) * (n - len(r))
            found.append(tuple(x - y for x, y in zip(longer(row), longer(hat), strict=True)))
        return tuple(found)


# Hochbruck, Ostermann & Schweitzer 2009, section 4 (also Hochbruck & Ostermann, Exponential
# integrators, Acta Numerica 19 (2010) 209-286, section 2.5): two stages; the embedded method is
# exponential Rosenbrock–Euler.
EXPRB32 = ExponentialTableau(
    name="Exprb32",
    order=3,
    embedded_order=2,
    nodes=(0.0, 1.0),
    a=((), ((),)),
    b=((), (0.0, 0.0, 2.0)),
    b_hat=((), ()),
)

# The same sources: three stages; the embedded method leaves out φ₄.
EXPRB43 = ExponentialTableau(
    name="Exprb43",
    order=4,
    embedded_order=3,
    nodes=(0.0, 0.5, 1.0),
    a=((), ((),), ((), (1.0,))),
    b=((), (0.0, 0.0, 16.0, -48.0), (0.0, 0.0, -2.0, 12.0)),
    b_hat=((), (0.0, 0.0, 16.0), (0.0, 0.0, -2.0)),
)

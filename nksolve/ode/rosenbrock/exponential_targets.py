"""What the stages of an exponential Rosenbrock method add up to, as tables."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .exponential_rule import Wanted
from .exponential_tableaus import ExponentialTableau


class Targets(NamedTuple):
    """What each stage adds to: U₂ … U_s, y1, its error, the middle of the step, h y' at its end."""

    to: Any  # (stages, targets, R)
    wanted: Wanted  # with a leading axis for the stages

    @classmethod
    def of(cls, tableau: ExponentialTableau, dtype: Any) -> "Targets":
        """Of a method; what a stage adds to two targets is found once.

        y(t0 + θh) = y0 + θφ₁(θA)F₀ + θ²φ₂(θA)g + Σ_i Σ_k b_ik θᵏφ_k(θA)D_i meets the order
        conditions for every θ where they hold for θ = 1.
        """
        rows = [_contributions(tableau, i) for i in range(tableau.stages)]
        distinct = [sorted({w for w in row if any(w[1])}) for row in rows]
        most, count = max(map(len, distinct)), len(rows[0])
        longest = len(rows[0][0][1])
        to = np.zeros((tableau.stages, count, most))
        ends, weights = np.ones((tableau.stages, most)), np.zeros((tableau.stages, most, longest))
        for i, (row, found) in enumerate(zip(rows, distinct, strict=True)):
            for r, (end, weight) in enumerate(found):
                ends[i, r], weights[i, r] = end, weight
            for target, one in enumerate(row):
                if any(one[1]):
                    to[i, target, found.index(one)] = 1.0
        wanted = Wanted(jnp.asarray(ends, dtype), jnp.asarray(weights, dtype))
        return cls(jnp.asarray(to, dtype), wanted)


def _contributions(tableau: ExponentialTableau, i: int) -> list[tuple[float, tuple[float, ...]]]:
    """For every target the end c and the weights of c^kφ_k(cA) of stage i's vector."""
    longest = 1 + max(1, *(len(row) for row in (*tableau.b, *tableau.b_hat)))
    padded = lambda row: tuple(row) + (0.0,) * (longest - len(row))
    nothing = (1.0, padded(()))
    stages = []
    for j in range(1, tableau.stages):
        c = tableau.nodes[j]
        if c not in (0.5, 1.0):
            raise NotImplementedError("Nodes other than ½ and 1 need exponentials of their own.")
        row = () if not 0 < i < j else (0.0, *(a / c**k for k, a in enumerate(tableau.a[j][i], 1)))
        stages.append((c, padded((0.0, 1.0) if i == 0 else row)))
    if i == 0:
        last = padded((0.0, 1.0))
        return [*stages, (1.0, last), nothing, (0.5, last), (1.0, padded((1.0,)))]
    b, error = padded((0.0, *tableau.b[i])), padded((0.0, *tableau.error_weights[i]))
    return [*stages, (1.0, b), (1.0, error), (0.5, b), (1.0, padded(b[1:]))]

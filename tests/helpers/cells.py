"""Equilibrium cells whose root, spectrum and contraction are known in closed form.

z = tanh(W z + U x + b) with U orthogonal. The root is chosen first, z* = a s with signs sᵢ = ±1,
and x is the input that has it as its equilibrium. All slopes at the root are then 1 − a², so that

    J(z*) = ∂g/∂z = (1 − a²) W

is W scaled: its spectrum is W's, its spectral radius ρ = (1 − a²) ω for ω = ρ(W), and any ρ below ω
is had by a = √(1 − ρ/ω). Inputs of one cell may thus have different ρ: a batch with one hard sample
is `inputs(case, [0.5, 0.5, 0.99])`.

The root is unique: ‖W‖₂ < 1 for the spectra "symmetric", "near_symmetric", "outliers" and "disc"
(tanh has slopes up to 1, so g is a contraction); λ_max((W + Wᵀ)/2) < 1 for "ginibre" and
"monotone" (I − W is strongly monotone: Winston & Kolter, 2020).

    spectrum         eigenvalues of W / ω                            normal   ω by default
    symmetric        evenly spread over [−1, 1]                      yes      (1 + ρ)/2
    near_symmetric   pairs r e^{±iθ}, r over [−1, 1], |sin θ| ≤ 0.1   yes      (1 + ρ)/2
    outliers         [−0.2, 0.2] and 1, 0.95, 0.9, −0.9, 0.8         yes      (1 + ρ)/2
    disc             uniform in the unit disc, in pairs              yes      (1 + ρ)/2
    ginibre          the same, of a matrix of Gaussian entries       no       min((1 + ρ)/2, 0.65)
    monotone         pairs, real parts over [−1, 0.25], |Im| ≤ 0.1    yes      4ρ/3

"monotone" with ρ = 1.5 has eigenvalues of J with real parts from −1.5 to 0.375: the plain iteration
diverges. "ginibre" needs ρ < 0.65. Input scale: the entries of x have a root mean square of about
0.7 at ρ = 0.5, 0.28 at 0.9 and 0.13 at 0.99 (ω = (1 + ρ)/2), 1.0 for "monotone" at 1.5. The slopes
at the root, 1 − a² = ρ/ω, are 0.67, 0.95, 0.995 and 0.75.
"""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array

from .gallery import from_eigenvalues, orthogonal

SPECTRA = ("symmetric", "near_symmetric", "outliers", "disc", "ginibre", "monotone")
CONTRACTIVE = ("symmetric", "near_symmetric", "outliers", "disc")  # at any ρ < 1


class TanhCell(eqx.Module):
    """g(z, x) = tanh(W z + U x + b), for one sample."""

    weight: Array
    injection: Array
    bias: Array

    def __call__(self, z: Array, x: Array) -> Array:
        return jnp.tanh(self.weight @ z + self.injection @ x + self.bias)


class CellCase(NamedTuple):
    """A cell with an input, its root and what is known there.

    `rho` is ρ(∂g/∂z) at the root, `omega` that of W; `z0` is zero, a start far from the root.
    """

    cell: TanhCell
    x: Array
    root: Array
    rho: float
    omega: float

    @property
    def z0(self) -> Array:
        return jnp.zeros_like(self.root)


def tanh_cell(
    spectrum: str,
    size: int,
    rho: float,
    key: int = 0,
    *,
    omega: float | None = None,
    dtype: type = np.float64,
) -> CellCase:
    """The case of this spectrum with ρ(J(z*)) = rho; `omega` > rho sets ρ(W)."""
    rng = np.random.default_rng([key, size, SPECTRA.index(spectrum)])
    unit = _unit_weight(spectrum, size, rng)
    if omega is None:
        omega = {"ginibre": min((1 + rho) / 2, 0.65), "monotone": 4 * rho / 3}.get(
            spectrum, (1 + rho) / 2
        )
    weight = omega * unit
    if not rho < omega:
        raise ValueError(f"ρ(J) = {rho} needs ρ(W) above it, but it is {omega}")
    # The contractive ones are normal: ‖W‖₂ = ω.
    bound = omega
    if spectrum not in CONTRACTIVE:
        bound = np.linalg.eigvalsh((weight + weight.T) / 2)[-1]
    if not bound < 1:
        raise ValueError(f"no unique root: the bound on W is {bound}, not below 1")
    injection = orthogonal(rng, size)
    bias = 0.1 * rng.standard_normal(size)
    x, root = _inputs(weight, injection, bias, np.array([rho / omega]), rng)
    cell = TanhCell(*(jnp.asarray(p, dtype) for p in (weight, injection, bias)))
    return CellCase(cell, jnp.asarray(x[0], dtype), jnp.asarray(root[0], dtype), rho, omega)


def inputs(case: CellCase, rhos: Sequence[float], key: int = 0) -> tuple[Array, Array]:
    """A batch of inputs (B, D) to the case's cell with these ρ(J(z*)), all below ρ(W), and roots.

    They are computed in float64 and rounded to the cell's dtype.
    """
    ratios = np.asarray(rhos, np.float64) / case.omega
    if not np.all(ratios < 1):
        raise ValueError(f"ρ(J) must be below ρ(W) = {case.omega}, but the rhos are {rhos}")
    cell, dtype = case.cell, case.root.dtype
    parameters = [np.asarray(p, np.float64) for p in (cell.weight, cell.injection, cell.bias)]
    rng = np.random.default_rng([key, len(ratios), case.root.size])
    x, roots = _inputs(*parameters, ratios, rng)
    return jnp.asarray(x, dtype), jnp.asarray(roots, dtype)


def _inputs(weight, injection, bias, ratios, rng):
    amplitude = np.sqrt(1 - ratios)[:, None]
    roots = amplitude * rng.choice([-1.0, 1.0], (len(ratios), len(bias)))
    return (np.arctanh(roots) - roots @ weight.T - bias) @ injection, roots


def _unit_weight(spectrum: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A matrix with this spectrum and spectral radius 1."""
    if spectrum == "symmetric":
        return from_eigenvalues(rng, np.linspace(-1, 1, size) if size > 1 else np.ones(1))
    if spectrum == "outliers":
        outliers = np.array([1, 0.95, 0.9, -0.9, 0.8])[:size]
        bulk = np.linspace(-0.2, 0.2, max(size - 5, 0))
        return from_eigenvalues(rng, np.concatenate([outliers, bulk]))
    if spectrum == "ginibre":
        matrix = rng.standard_normal((size, size))
        return matrix / np.max(np.abs(np.linalg.eigvals(matrix)))
    pairs, single = size // 2, rng.uniform(-0.2, 0.2) if size > 1 else 1.0
    if spectrum == "near_symmetric":
        values = np.linspace(1, -1, pairs) * np.exp(1j * rng.uniform(0, np.arcsin(0.1), pairs))
    elif spectrum == "disc":
        values = np.sqrt(rng.uniform(size=pairs)) * np.exp(1j * rng.uniform(0, np.pi, pairs))
        values[:1] = np.exp(0.8j)
    else:
        values = np.linspace(-1, 0.25, pairs) + 1j * rng.uniform(0, 0.1, pairs)
        values[:1] = -1
        single = -abs(single)
    return _normal(values, single, size, rng)


def _normal(values: np.ndarray, single: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """A normal matrix with eigenvalues `values` and their conjugates, and `single` if it is odd."""
    blocks = np.zeros((size, size))
    for i, value in enumerate(values):
        blocks[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [
            [value.real, -value.imag],
            [value.imag, value.real],
        ]
    if size % 2:
        blocks[-1, -1] = single
    q = orthogonal(rng, size)
    return q @ blocks @ q.T

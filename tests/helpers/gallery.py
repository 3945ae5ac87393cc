"""Matrices with right-hand sides, from the kind to the hopeless. Seeded numpy, float64.

A case says what a solver may be held to: `consistent` (b is in the range of A) and `singular`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

N = 29  # prime, so that an n×n value cannot be mistaken for anything else


class Case(NamedTuple):
    name: str
    matrix: np.ndarray
    rhs: np.ndarray
    symmetric: bool = False
    singular: bool = False
    consistent: bool = True
    condition: float = 1e3  # an upper estimate of the 2-norm condition number, inf if singular


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


def orthogonal(rng: np.random.Generator, n: int) -> np.ndarray:
    """A random orthogonal matrix, n × n."""
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return q * np.sign(np.diag(r))


def from_singular_values(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """U diag(values) Wᵀ with random orthogonal U and W."""
    n = len(values)
    return orthogonal(rng, n) @ np.diag(values) @ orthogonal(rng, n).T


def from_eigenvalues(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """Q diag(values) Qᵀ, symmetrised exactly."""
    q = orthogonal(rng, len(values))
    matrix = q @ np.diag(values) @ q.T
    return (matrix + matrix.T) / 2


def symmetric_positive_definite(n: int = N) -> Case:
    rng = _rng("spd")
    matrix = from_eigenvalues(rng, np.linspace(1.0, 50.0, n))
    return Case("symmetric_positive_definite", matrix, rng.standard_normal(n), symmetric=True)


def symmetric_indefinite(n: int = N) -> Case:
    rng = _rng("indefinite")
    half = n // 2
    values = np.concatenate([-np.linspace(1.0, 10.0, half), np.linspace(1.0, 10.0, n - half)])
    matrix = from_eigenvalues(rng, values)
    return Case("symmetric_indefinite", matrix, rng.standard_normal(n), symmetric=True)


def nonsymmetric(n: int = N) -> Case:
    rng = _rng("nonsymmetric")
    matrix = 4.0 * np.eye(n) + rng.standard_normal((n, n)) / np.sqrt(n)
    return Case("nonsymmetric", matrix, rng.standard_normal(n))


def convection_diffusion(n: int = N) -> Case:
    """Upwinded convection–diffusion in one dimension: far from normal, well conditioned."""
    matrix = 2.5 * np.eye(n) - 1.9 * np.eye(n, k=-1) - 0.5 * np.eye(n, k=1)
    return Case("convection_diffusion", matrix, _rng("convection").standard_normal(n))


def ill_conditioned(n: int = N) -> Case:
    """U diag(logspace(0, −8)) Wᵀ: the residual falls long before the error does."""
    rng = _rng("ill")
    matrix = from_singular_values(rng, np.logspace(0, -8, n))
    return Case("ill_conditioned", matrix, matrix @ rng.standard_normal(n), condition=1e9)


def hilbert(n: int = N) -> Case:
    """Hilbert's matrix plus 1e-6 on the diagonal, so that it is solvable in float64."""
    i = np.arange(n)
    matrix = 1.0 / (i[:, None] + i[None, :] + 1.0) + 1e-6 * np.eye(n)
    return Case("hilbert", matrix, matrix @ np.ones(n), symmetric=True, condition=1e7)


def cyclic_shift(n: int = N) -> Case:
    """A e_k = e_{k+1}: full GMRES makes no progress at all before step n."""
    return Case("cyclic_shift", np.roll(np.eye(n), 1, axis=0), np.eye(n)[0])


def singular_consistent(n: int = N) -> Case:
    """Symmetric with a null vector, and a right-hand side in the range."""
    rng = _rng("consistent")
    matrix = from_eigenvalues(rng, np.concatenate([[0.0], np.linspace(1.0, 10.0, n - 1)]))
    rhs = matrix @ rng.standard_normal(n)
    return Case("singular_consistent", matrix, rhs, symmetric=True, singular=True, condition=np.inf)


def singular_inconsistent(n: int = N) -> Case:
    """The same matrix, and a right-hand side with a part along the null vector."""
    case = singular_consistent(n)
    null = np.linalg.eigh(case.matrix)[1][:, np.argmin(np.abs(np.linalg.eigvalsh(case.matrix)))]
    return case._replace(name="singular_inconsistent", rhs=case.rhs + null, consistent=False)


def zero_rhs(n: int = N) -> Case:
    return nonsymmetric(n)._replace(name="zero_rhs", rhs=np.zeros(n))


_makers: tuple[Callable[[], Case], ...] = (
    symmetric_positive_definite,
    symmetric_indefinite,
    nonsymmetric,
    convection_diffusion,
    ill_conditioned,
    hilbert,
    cyclic_shift,
    singular_consistent,
    singular_inconsistent,
    zero_rhs,
)
GALLERY: dict[str, Case] = {case.name: case for case in (make() for make in _makers)}

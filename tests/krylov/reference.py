"""Textbook GMRES in NumPy: what the solver's iteration counts are measured against."""

from typing import NamedTuple

import numpy as np


class Run(NamedTuple):
    value: np.ndarray
    residuals: np.ndarray  # ‖b − A x_j‖ as the rotations give it, j = 0, 1, …


def gmres(matrix: np.ndarray, rhs: np.ndarray, target: float) -> Run:
    """Full GMRES (Saad & Schultz, 1986) until ‖r_j‖ ≤ target: Gram–Schmidt twice, Givens."""
    n = len(rhs)
    dtype = np.result_type(matrix, rhs)
    basis = np.zeros((n, n + 1), dtype)
    upper = np.zeros((n + 1, n), dtype)
    rotations: list[np.ndarray] = []
    g = np.zeros(n + 1, dtype)
    g[0] = np.linalg.norm(rhs)
    residuals = [abs(g[0])]
    basis[:, 0] = rhs / (g[0] if g[0] else 1)
    steps = 0
    while residuals[-1] > target and steps < n:
        j = steps
        w = matrix @ basis[:, j]
        scale = np.linalg.norm(w)
        for _ in range(2):
            h = basis[:, : j + 1].conj().T @ w
            w = w - basis[:, : j + 1] @ h
            upper[: j + 1, j] += h
        below = np.linalg.norm(w)
        if below > 10 * np.finfo(dtype).eps * scale:
            basis[:, j + 1] = w / below
        else:
            below = 0.0
        upper[j + 1, j] = below
        for i, rotation in enumerate(rotations):
            upper[i : i + 2, j] = rotation @ upper[i : i + 2, j]
        a, b = upper[j, j], upper[j + 1, j]
        length = np.hypot(abs(a), abs(b))
        if length == 0:
            raise ZeroDivisionError("the matrix is singular on an invariant space")
        rotations.append(np.array([[a.conj(), b.conj()], [-b, a]]) / length)
        upper[j : j + 2, j] = rotations[-1] @ upper[j : j + 2, j]
        g[j : j + 2] = rotations[-1] @ g[j : j + 2]
        residuals.append(abs(g[j + 1]))
        steps += 1
        if below == 0:
            break
    y = np.linalg.solve(upper[:steps, :steps], g[:steps]) if steps else np.zeros(0, dtype)
    return Run(basis[:, :steps] @ y, np.array(residuals))


def contraction(rng: np.random.Generator, n: int, rho: float) -> np.ndarray:
    """I − ρ M, M Gaussian and scaled to spectral radius one."""
    m = rng.standard_normal((n, n))
    return np.eye(n) - rho * m / np.max(np.abs(np.linalg.eigvals(m)))

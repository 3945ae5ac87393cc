"""Contractions with a stated spectrum, for the adjoints: W with spectral radius ρ, J = W − I."""

import jax.numpy as jnp
import lineax as lx
import numpy as np


def near_symmetric(n: int, rho: float, seed: int = 0) -> np.ndarray:
    """Eigenvalues close to the uniform distribution on (−ρ, ρ), the largest +ρ; 1% skew."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    skew = rng.standard_normal((n, n)) / np.sqrt(n)
    w = basis @ np.diag(np.linspace(-0.95, 1.0, n)) @ basis.T + 0.01 * (skew - skew.T)
    return rho * w / np.max(np.abs(np.linalg.eigvals(w)))


def disc(n: int, rho: float, seed: int = 0) -> np.ndarray:
    """Gaussian entries: eigenvalues uniform in the disc of radius ρ, far from normal."""
    w = np.random.default_rng(seed).standard_normal((n, n))
    return rho * w / np.max(np.abs(np.linalg.eigvals(w)))


CELLS = {"near-symmetric": near_symmetric, "disc": disc}


def operator(matrix, tags=frozenset()):
    """J = W − I as a Lineax operator."""
    return lx.MatrixLinearOperator(matrix - jnp.eye(matrix.shape[0], dtype=matrix.dtype), tags)


def vector(n: int, seed: int = 1) -> np.ndarray:
    """A right-hand side without structure."""
    return np.random.default_rng(seed).standard_normal(n)

"""Cells of `python -m benchmarks --layers`: z = tanh(z V + x U + b), rows are samples.

V = Wᵀ with ‖W‖₂ = (1 + ρ)/2 < 1, so that the fixed point is unique; the input's scale is then
bisected until the largest measured spectral radius of ∂g/∂z at the fixed points of the batch is ρ.
NumPy alone, in float64, so that it serves every contender; parameters are float32 numbers, so that
both precisions solve one problem.
"""

import dataclasses
from pathlib import Path

import numpy as np

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a training step needs: L = Σ z c, and dL/dV with respect to which errors are told."""

    V: np.ndarray
    U: np.ndarray
    b: np.ndarray
    x: np.ndarray
    c: np.ndarray
    z: np.ndarray  # the fixed points
    moved: np.ndarray  # dL/d(x U + b) there, by dense solves
    grad_V: np.ndarray
    radii: np.ndarray  # of each sample
    scale: float  # of the input

    @property
    def injection(self) -> np.ndarray:
        """x U + b."""
        return self.x @ self.U + self.b


def name(size: int, rho: float, spectrum: str) -> str:
    """Of the file that keeps it."""
    return f"{spectrum}-{size}-{rho:g}"


def cell(size: int, rho: float, spectrum: str, folder: Path) -> Cell:
    """From the folder, where it is made at the first call (a minute at 2,048)."""
    path = folder / f"{name(size, rho, spectrum)}.npz"
    if path.exists():
        return load(path)
    made = _make(size, rho, spectrum)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name("unfinished-" + path.name)
    np.savez(unfinished, **{f.name: getattr(made, f.name) for f in dataclasses.fields(made)})
    unfinished.rename(path)
    return made


def load(path: Path) -> Cell:
    """One that was made before."""
    with np.load(path) as arrays:
        return Cell(**{k: arrays[k] if arrays[k].ndim else float(arrays[k]) for k in arrays})


def residuals(known: Cell, z: np.ndarray, moved: np.ndarray) -> tuple[float, float]:
    """The two that every contender is held to, the largest over the samples, in float64.

    Forward ‖g(z) − z‖/‖z‖. Backward, for the gradient μ with respect to the injection,
    ‖s (c + μ Wᵀ) − μ‖/‖μ‖ with s = tanh': that of λ = c + (∂g/∂z)ᵀ λ, as μ = s λ.
    """
    z, moved = z.astype(np.float64), moved.astype(np.float64)
    value = np.tanh(z @ known.V + known.injection)
    wanted = (1 - value**2) * (known.c + moved @ known.V.T)
    return _largest(value - z, z), _largest(wanted - moved, moved)


def gradient_error(known: Cell, grad_V: np.ndarray) -> float:
    """Relative, in the Frobenius norm."""
    error = np.linalg.norm(grad_V.astype(np.float64) - known.grad_V)
    return float(error / np.linalg.norm(known.grad_V))


def _largest(rest: np.ndarray, whole: np.ndarray) -> float:
    ratios = np.linalg.norm(rest, axis=1) / np.linalg.norm(whole, axis=1)
    return float(np.max(ratios))  # NaN if one is


def _make(size: int, rho: float, spectrum: str) -> Cell:
    random = np.random.default_rng([size, round(1000 * rho)])
    rounded = lambda a: np.asarray(a, np.float32).astype(np.float64)
    norm = 0.5 * (1 + rho)
    matrix = _matrix(random, size, spectrum)
    V = rounded(matrix * (norm / np.linalg.norm(matrix, 2))).T
    V = np.ascontiguousarray(V)
    U = rounded(random.standard_normal((size, size)) / np.sqrt(size))
    b = rounded(0.1 * random.standard_normal(size))
    x = random.standard_normal((BATCH, size))
    c = rounded(random.standard_normal((BATCH, size)))
    low, high = 1e-3, 8.0
    z = np.zeros((BATCH, size))
    for _ in range(14):
        scale = np.sqrt(low * high)
        z = _solve(V, scale * x @ U + b * scale, z, tol=1e-4)
        radius = np.max(_radii(V, z))
        low, high = (scale, high) if radius > rho else (low, scale)
        if abs(radius - rho) < min(0.01 * rho, 0.05 * (1 - rho)):
            break
    b, x = rounded(scale * b), rounded(scale * x)
    injection = x @ U + b
    z = _solve(V, injection, z, tol=1e-14)
    slope = 1 - np.tanh(z @ V + injection) ** 2
    moved = np.empty_like(z)
    for i in range(BATCH):  # λ = c + V (s λ): the dense adjoint, a sample at a time
        multiplier = np.linalg.solve(np.eye(size) - V * slope[i][None, :], c[i])
        moved[i] = slope[i] * multiplier
    return Cell(V, U, b, x, c, z, moved, z.T @ moved, _radii(V, z), float(scale))


def _matrix(random: np.random.Generator, size: int, spectrum: str) -> np.ndarray:
    gaussian = random.standard_normal((size, size)) / np.sqrt(size)
    symmetric, skew = (gaussian + gaussian.T) / 2, (gaussian - gaussian.T) / 2
    if spectrum == "disc":  # normal, or else its norm would be twice its radius
        basis = np.linalg.qr(gaussian)[0]
        radius, angle = np.sqrt(random.random(size // 2)), 2 * np.pi * random.random(size // 2)
        radius[0] = 1.0
        out = np.zeros((size, size))
        even, odd = np.arange(0, size - 1, 2), np.arange(1, size, 2)
        out[even, even] = out[odd, odd] = radius * np.cos(angle)
        out[even, odd] = radius * np.sin(angle)
        out[odd, even] = -out[even, odd]
        return basis @ out @ basis.T
    if spectrum == "symmetric":  # a semicircle of eigenvalues, and a little that is not symmetric
        return symmetric + 0.02 * skew
    if spectrum == "outliers":  # a bulk of radius 0.3 and eight directions that stand out
        basis = np.linalg.qr(random.standard_normal((size, min(8, size))))[0]
        bulk = 0.3 * (symmetric + 0.02 * skew) / np.linalg.norm(symmetric, 2)
        heights = np.linspace(1.0, -0.9, basis.shape[1])
        return bulk + (basis * heights) @ basis.T
    raise ValueError(f"no spectrum is called {spectrum!r}")


def _solve(V: np.ndarray, injection: np.ndarray, z: np.ndarray, tol: float) -> np.ndarray:
    """Newton's method, all samples at once, each with its own Krylov space."""
    before = np.inf
    for _ in range(60):
        value = np.tanh(z @ V + injection)
        rest = value - z
        error = _largest(rest, np.maximum(np.abs(z), 1e-3))
        if error <= tol or (error < 1e-12 and error > 0.5 * before):
            return z
        before = error
        slope = 1 - value**2
        step = _gmres(lambda v, s=slope: v - s * (v @ V), rest, 60)
        z = z + step
    raise RuntimeError(f"the fixed points of a cell were not found: {error:.1e}")


def _arnoldi(apply, start: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batch, size = start.shape
    steps = min(steps, size)
    norm = np.linalg.norm(start, axis=1)
    basis = np.zeros((steps + 1, batch, size))
    hessenberg = np.zeros((batch, steps + 1, steps))
    basis[0] = start / norm[:, None]
    for j in range(steps):
        w = apply(basis[j])
        for _ in range(2):
            h = np.einsum("jbd,bd->bj", basis[: j + 1], w)
            w = w - np.einsum("bj,jbd->bd", h, basis[: j + 1])
            hessenberg[:, : j + 1, j] += h
        length = np.linalg.norm(w, axis=1)
        hessenberg[:, j + 1, j] = length
        basis[j + 1] = w / np.maximum(length, 1e-300)[:, None]
    return basis, hessenberg, norm


def _gmres(apply, rhs: np.ndarray, steps: int) -> np.ndarray:
    basis, hessenberg, norm = _arnoldi(apply, rhs, steps)
    out = np.empty_like(rhs)
    for i, h in enumerate(hessenberg):
        unit = np.zeros(h.shape[0])
        unit[0] = norm[i]
        y = np.linalg.lstsq(h, unit, rcond=1e-14)[0]
        out[i] = y @ basis[:-1, i]
    return out


def _radii(V: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Spectral radii of ∂g/∂z, by 60 steps of Arnoldi: exact up to that size."""
    slope = 1 - z**2
    random = np.random.default_rng(0)
    start = random.standard_normal(z.shape)
    _, hessenberg, _ = _arnoldi(lambda v: slope * (v @ V), start, 60)
    return np.max(np.abs(np.linalg.eigvals(hessenberg[:, :-1])), axis=1)

"""Steps of Rosenbrock, Krylov and exponential methods in dense NumPy, and problems for them."""

import functools as ft
from typing import NamedTuple

import numpy as np
import scipy.integrate as spi
import scipy.linalg as sla

N = 6


class Problem(NamedTuple):
    """f(t, y), its Jacobian, its time derivative, start, end time, solution there, mass."""

    f: object
    jacobian: object
    time_derivative: object
    y0: np.ndarray
    end: float
    solution: np.ndarray
    mass: np.ndarray


@ft.cache
def ring() -> Problem:
    """Six unknowns in a ring: diffusion, a quadratic term with an explicit time, a forcing."""
    i = np.arange(N)
    shift = np.roll(np.eye(N), 1, axis=1)  # (shift y)_i = y_{i+1}
    diffusion = shift + shift.T - 2.0 * np.eye(N)

    def f(t, y):
        return diffusion @ y + np.cos(t + i) * y * (shift @ y) + np.sin(2.0 * t + i) - y**3

    def jacobian(t, y):
        c = np.cos(t + i)
        return diffusion + np.diag(c * (shift @ y) - 3.0 * y**2) + (c * y)[:, None] * shift

    def time_derivative(t, y):
        return -np.sin(t + i) * y * (shift @ y) + 2.0 * np.cos(2.0 * t + i)

    y0 = 0.5 + 0.4 * np.sin(1.0 + i**2)
    done = spi.solve_ivp(f, (0.0, 1.0), y0, method="DOP853", rtol=1e-13, atol=1e-14)
    return Problem(f, jacobian, time_derivative, y0, 1.0, done.y[:, -1], np.eye(N))


@ft.cache
def index_one() -> Problem:
    """Two differential and one algebraic unknown, with explicit time in both equations."""

    def algebraic(t, a, b):
        """The root of z + z³/3 = ab + cos t."""
        z, rhs = 0.0, a * b + np.cos(t)
        for _ in range(60):
            z = z - (z + z**3 / 3.0 - rhs) / (1.0 + z**2)
        return z

    def slope(t, a, b, z):
        return np.array([-a + z * b + np.sin(t), a * z - b**2 * np.cos(t)])

    def f(t, y):
        a, b, z = y
        return np.append(slope(t, a, b, z), a * b + np.cos(t) - z - z**3 / 3.0)

    def jacobian(t, y):
        a, b, z = y
        return np.array(
            [[-1.0, z, b], [z, -2.0 * b * np.cos(t), a], [b, a, -1.0 - z**2]],
        )

    def time_derivative(t, y):
        return np.array([np.cos(t), y[1] ** 2 * np.sin(t), -np.sin(t)])

    reduced = lambda t, y: slope(t, *y, algebraic(t, *y))
    start = np.array([0.7, 1.1])
    done = spi.solve_ivp(reduced, (0.0, 1.0), start, method="DOP853", rtol=1e-13, atol=1e-14)
    last = done.y[:, -1]
    return Problem(
        f,
        jacobian,
        time_derivative,
        np.append(start, algebraic(0.0, *start)),
        1.0,
        np.append(last, algebraic(1.0, *last)),
        np.diag([1.0, 1.0, 0.0]),
    )


def heat(n: int = 40) -> Problem:
    """u_t = u_xx + 1/(1 + u²) + Φ with u = x(1 − x)eᵗ: Hochbruck, Ostermann & Schweitzer, section
    6. Differences are exact for this u, so the error is the integrator's alone."""
    x = np.arange(1, n + 1) / (n + 1)
    off = np.ones(n - 1)
    second = (np.diag(off, 1) + np.diag(off, -1) - 2.0 * np.eye(n)) * (n + 1) ** 2
    exact = lambda t: x * (1.0 - x) * np.exp(t)
    phi = lambda t: exact(t) + 2.0 * np.exp(t) - 1.0 / (1.0 + exact(t) ** 2)
    f = lambda t, u: second @ u + 1.0 / (1.0 + u**2) + phi(t)
    jacobian = lambda t, u: second - np.diag(2.0 * u / (1.0 + u**2) ** 2)

    def time_derivative(t, u):
        e = exact(t)
        return e + 2.0 * np.exp(t) + 2.0 * e**2 / (1.0 + e**2) ** 2

    return Problem(f, jacobian, time_derivative, exact(0.0), 1.0, exact(1.0), np.eye(n))


def rosenbrock_step(tableau, weights, problem, t, y, h):
    """One step in the form without products; `weights` are those of u (m, m − e, or dense)."""
    jac, ft = problem.jacobian(t, y), problem.time_derivative(t, y)
    matrix = problem.mass / (h * tableau.gamma) - jac
    u = np.zeros((tableau.stages, y.size))
    for i in range(tableau.stages):
        value = problem.f(t + tableau.alpha_i[i] * h, y + np.array(tableau.a[i]) @ u)
        history = problem.mass @ (np.array(tableau.c[i]) @ u) / h
        u[i] = np.linalg.solve(matrix, value + history + tableau.gamma_i[i] * h * ft)
    return y + np.asarray(weights) @ u


def krylov_step(tableau, size, b, problem, t, y, h):
    """One step with A = V H Vᵀ of `size` Arnoldi steps from (f, 1) on (J, f_t; 0, 0).

    Tranquilli & Sandu 2014: the unknown is (y, t), time in the stages is t + αᵢh."""
    row = tableau.row_form()
    n = y.size
    big = np.zeros((n + 1, n + 1))
    big[:n, :n], big[:n, n] = problem.jacobian(t, y), problem.time_derivative(t, y)
    basis, hessenberg = _arnoldi(big, np.append(problem.f(t, y), 1.0), size)
    matrix = np.eye(size) - h * tableau.gamma * hessenberg
    k, inside = np.zeros((tableau.stages, n)), np.zeros((tableau.stages, size))
    for i in range(tableau.stages):
        value = np.append(problem.f(t + tableau.alpha_i[i] * h, y + row.alpha[i] @ k), 1.0)
        part = basis.T @ value
        rhs = h * part + h * hessenberg @ (np.tril(row.gamma, -1)[i] @ inside)
        inside[i] = np.linalg.solve(matrix, rhs)
        k[i] = (basis @ (inside[i] - h * part) + h * value)[:n]
    return y + np.asarray(b) @ k


def _arnoldi(matrix, start, size):
    basis = np.zeros((start.size, size))
    hessenberg = np.zeros((size, size))
    basis[:, 0] = start / np.linalg.norm(start)
    for j in range(size):
        w = matrix @ basis[:, j]
        for _ in range(2):
            part = basis[:, : j + 1].T @ w
            hessenberg[: j + 1, j] += part
            w = w - basis[:, : j + 1] @ part
        if j + 1 < size:
            hessenberg[j + 1, j] = np.linalg.norm(w)
            basis[:, j + 1] = w / hessenberg[j + 1, j]
    return basis, hessenberg


def phi_sum(matrix, vectors):
    """Σ_k φ_k(matrix) vectors[k − 1] from one exponential of a slightly larger matrix."""
    n, p = matrix.shape[0], len(vectors)
    big = np.zeros((n + p, n + p))
    big[:n, :n] = matrix
    big[:n, n:] = np.stack(vectors[::-1], axis=1)
    big[n : n + p - 1, n + 1 :] = np.eye(p - 1)
    return sla.expm(big)[:n, -1]


def exponential_step(tableau, weights, problem, t, y, h):
    """One step of an exponential Rosenbrock method with `weights` b or b̂."""
    jac, v, f0 = problem.jacobian(t, y), problem.time_derivative(t, y), problem.f(t, y)
    nodes, remainders = tableau.nodes, [None]

    def combined(c, rows):
        """y + cφ₁hf₀ + c²φ₂h²v + h Σ_j rows_j(chJ) D_j."""
        vectors = [np.zeros_like(y) for _ in range(max(2, *(len(row) for row in rows)))]
        vectors[0] = vectors[0] + c * h * f0
        vectors[1] = vectors[1] + (c * h) ** 2 * v
        for row, remainder in zip(rows[1:], remainders[1:], strict=True):
            for k, weight in enumerate(row):
                vectors[k] = vectors[k] + h * weight * remainder
        return y + phi_sum(c * h * jac, vectors)

    for i in range(1, tableau.stages):
        stage = combined(nodes[i], tableau.a[i])
        value = problem.f(t + nodes[i] * h, stage)
        remainders.append(value - f0 - jac @ (stage - y) - nodes[i] * h * v)
    return combined(1.0, weights)


def order_of(step, problem, counts):
    """Slope of log error against log step between the last two of `counts`; per component."""
    errors = []
    for count in counts[-2:]:
        h, y = problem.end / count, problem.y0
        for n in range(count):
            y = step(problem, n * h, y, h)
        errors.append(np.abs(y - problem.solution))
    ratio = np.log(counts[-1] / counts[-2])
    norm = np.log(np.linalg.norm(errors[0]) / np.linalg.norm(errors[1])) / ratio
    return norm, np.log(errors[0] / errors[1]) / ratio

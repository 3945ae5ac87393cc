"""Problems of `python -m benchmarks --ode`: what JAX, SciPy and CVODE are given of each."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from nksolve.problems import stiff

# One right-hand side is f(t, y, out, on) on flat arrays, `on` telling the side of a jump.
Kernel = Callable[[float, np.ndarray, np.ndarray, bool], None]

_KINETICS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
_LINE = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
_GRID = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


@dataclasses.dataclass(frozen=True)
class Problem:
    """An initial value problem with what its contenders need.

    The error at the end is max |y − ref|/(a + |ref|) with a = atol/rtol, the same for all.
    """

    name: str
    title: str
    given: stiff.InitialValueProblem
    kernel: Callable[[], Kernel] | None
    ladder: tuple[float, ...]
    shape: str  # "kinetics", "line" or "grid"
    lanes: int = 0

    @property
    def size(self) -> int:
        """Unknowns, of one lane."""
        return int(self.given.y0.size)

    def tolerances(self, rtol: Any) -> tuple[Any, Any]:
        """(rtol, atol)."""
        return rtol, rtol * self.given.atol_factor

    def error(self, y: Any, reference: np.ndarray) -> float:
        """At the end time."""
        reference = reference.reshape(-1)
        distance = np.abs(np.asarray(y).reshape(-1) - reference)
        return float(np.max(distance / (self.given.atol_factor + np.abs(reference))))

    @property
    def pieces(self) -> list[tuple[float, float, bool]]:
        """The span, cut at its jump: (begin, end, whether after the jump)."""
        begin, end = self.given.span
        if not self.given.jumps:
            return [(begin, end, True)]
        (jump,) = self.given.jumps
        return [(begin, jump, False), (jump, end, True)]

    def sparsity(self) -> Any:
        """The pattern of the Jacobian, as a SciPy matrix; `None` where it is as good as dense."""
        import scipy.sparse as sp

        if self.shape == "kinetics":
            return None
        if self.shape == "line":
            return _diagonals(self.size, range(-2, 3)).tocsc()
        n = self.given.y0.shape[-1]
        line = _diagonals(n, (-1, 1)).tolil()
        line[0, -1] = line[-1, 0] = 1.0
        cross = sp.kron(line, sp.eye_array(n)) + sp.kron(sp.eye_array(n), line + sp.eye_array(n))
        same = sp.eye_array(n * n)
        return sp.block_array([[cross, same], [same, cross]]).tocsc()


def _diagonals(n: int, offsets: Any) -> Any:
    """Ones on those diagonals."""
    import scipy.sparse as sp

    return sum(sp.eye_array(n, k=k) for k in offsets)


def problem(name: str) -> Problem:
    """By name: `bruss-1000` has 1,000 unknowns, `grid-32` 2 × 32², `rober-1000` 1,000 lanes."""
    kind, _, number = name.partition("-")
    if kind == "rober" and number:
        return _ensemble(int(number))
    if kind == "bruss":
        n = int(number) // 2
        title = f"BRUSS-1D, {2 * n:,} unknowns"
        given = stiff.brusselator_1d(n)
        return Problem(name, title, given, lambda: _bruss(n), _LINE, "line")
    if kind == "grid":
        n = int(number)
        title = f"2-D Brusselator, N = {n}"
        given = stiff.brusselator_2d(n)
        return Problem(name, title, given, lambda: _grid(n), _GRID, "grid")
    if kind == "gray":
        n = int(number)
        given = stiff.gray_scott(n)
        return Problem(name, f"Gray–Scott, N = {n}", given, lambda: _gray(n), _LINE, "grid")
    kernels = {"rober": _rober, "hires": _hires, "orego": _orego}
    return Problem(name, name.upper(), stiff.STIFF[name](), kernels[name], _KINETICS, "kinetics")


def _ensemble(lanes: int) -> Problem:
    """Robertson's reactions with rates between half and twice theirs, spread evenly in log."""
    given = stiff.rober()
    spread = np.random.default_rng(0).uniform(-1.0, 1.0, (lanes, 3))
    given = dataclasses.replace(given, args=jnp.asarray(np.asarray(given.args) * 2.0**spread))
    title = f"ROBER under `vmap`, {lanes:,} lanes"
    return Problem(f"rober-{lanes}", title, given, None, _KINETICS[1:7], "kinetics", lanes)


@ft.cache
def _compiler() -> Callable:
    import numba

    return numba.njit


def _rober() -> Kernel:
    @_compiler()
    def kernel(t, y, out, on):
        first, second, third = 0.04 * y[0], 3e7 * y[1] * y[1], 1e4 * y[1] * y[2]
        out[0] = third - first
        out[1] = first - third - second
        out[2] = second

    return kernel


def _hires() -> Kernel:
    @_compiler()
    def kernel(t, y, out, on):
        bound = 280.0 * y[5] * y[7] - 1.81 * y[6]
        out[0] = -1.71 * y[0] + 0.43 * y[1] + 8.32 * y[2] + 0.0007
        out[1] = 1.71 * y[0] - 8.75 * y[1]
        out[2] = -10.03 * y[2] + 0.43 * y[3] + 0.035 * y[4]
        out[3] = 8.32 * y[1] + 1.71 * y[2] - 1.12 * y[3]
        out[4] = -1.745 * y[4] + 0.43 * y[5] + 0.43 * y[6]
        out[5] = -280.0 * y[5] * y[7] + 0.69 * y[3] + 1.71 * y[4] - 0.43 * y[5] + 0.69 * y[6]
        out[6] = bound
        out[7] = -bound

    return kernel


def _orego() -> Kernel:
    s, q, w = 77.27, 8.375e-6, 0.161

    @_compiler()
    def kernel(t, y, out, on):
        out[0] = s * (y[1] - y[0] * y[1] + y[0] - q * y[0] * y[0])
        out[1] = (y[2] - y[1] - y[0] * y[1]) / s
        out[2] = w * (y[0] - y[2])

    return kernel


def _bruss(n: int) -> Kernel:
    rate = 0.02 * (n + 1) ** 2

    @_compiler()
    def kernel(t, y, out, on):
        for i in range(n):
            u, v = y[2 * i], y[2 * i + 1]
            u_left, v_left = (y[2 * i - 2], y[2 * i - 1]) if i > 0 else (1.0, 3.0)
            u_right, v_right = (y[2 * i + 2], y[2 * i + 3]) if i < n - 1 else (1.0, 3.0)
            q = u * u * v
            out[2 * i] = rate * (u_right - 2.0 * u + u_left) + 1.0 + q - 4.0 * u
            out[2 * i + 1] = rate * (v_right - 2.0 * v + v_left) + 3.0 * u - q

    return kernel


def _grid(n: int) -> Kernel:
    a, b, alpha = 3.4, 1.0, 10.0
    rate, m = alpha * (n - 1) ** 2, n * n
    x = np.linspace(0.0, 1.0, n)
    disc = (5.0 * ((x[:, None] - 0.3) ** 2 + (x - 0.6) ** 2 <= 0.01)).reshape(-1)

    @_compiler()
    def kernel(t, y, out, on):
        for i in range(n):
            up, down = ((i - 1) % n) * n, ((i + 1) % n) * n
            for j in range(n):
                k = i * n + j
                left = k - 1 if j > 0 else k + n - 1
                right = k + 1 if j < n - 1 else k - n + 1
                u, v = y[k], y[m + k]
                around_u = y[up + j] + y[down + j] + y[left] + y[right]
                around_v = y[m + up + j] + y[m + down + j] + y[m + left] + y[m + right]
                q = u * u * v
                out[k] = b + q - (a + 1.0) * u + rate * (around_u - 4.0 * u)
                if on:
                    out[k] += disc[k]
                out[m + k] = a * u - q + rate * (around_v - 4.0 * v)

    return kernel


def _gray(n: int) -> Kernel:
    d_u, d_v, gamma, kappa = 8e-5, 4e-5, 0.024, 0.06
    width, m = (n / 2.5) ** 2, n * n

    @_compiler()
    def kernel(t, y, out, on):
        for i in range(n):
            up, down = ((i - 1) % n) * n, ((i + 1) % n) * n
            for j in range(n):
                k = i * n + j
                left = k - 1 if j > 0 else k + n - 1
                right = k + 1 if j < n - 1 else k - n + 1
                u, v = y[k], y[m + k]
                around_u = y[up + j] + y[down + j] + y[left] + y[right]
                around_v = y[m + up + j] + y[m + down + j] + y[m + left] + y[m + right]
                q = u * v * v
                out[k] = d_u * width * (around_u - 4.0 * u) - q + gamma * (1.0 - u)
                out[m + k] = d_v * width * (around_v - 4.0 * v) + q - (gamma + kappa) * v

    return kernel

"""SciPy and CVODE in `python -m benchmarks --ode`, right-hand sides compiled by numba."""

import time
from typing import Any

import numpy as np

from .ode_problems import Kernel, Problem
from .ode_timing import Runner, Solved


def rows(known: Problem) -> list[str]:
    """Contenders; left out are those which would take many minutes."""
    if known.lanes:
        return []
    if known.name == "grid-128":
        return ["SciPy BDF", "CVODE GMRES"]
    scipy = ["SciPy BDF", "SciPy Radau"]
    direct = {"kinetics": ["CVODE dense"], "line": ["CVODE band"], "grid": []}[known.shape]
    if known.size == 100:
        direct = ["CVODE dense", *direct]
    return [*scipy, *direct, "CVODE GMRES"]


def runner(known: Problem, row: str) -> Runner:
    """Compiles the right-hand side."""
    assert known.kernel is not None
    library, _, method = row.partition(" ")
    y0 = np.asarray(known.given.y0).reshape(-1)
    start = time.perf_counter()
    kernel = known.kernel()
    kernel(0.0, y0, np.empty_like(y0), True)
    seconds = time.perf_counter() - start
    prepared = (
        _scipy(known, kernel, method) if library == "SciPy" else _cvode(known, kernel, method)
    )

    def solve(rtol: float) -> Solved:
        return _over_pieces(known, prepared, y0, rtol, None)

    def count(rtol: float) -> int:
        calls = [0]
        _over_pieces(known, prepared, y0, rtol, calls)
        return calls[0]

    return Runner(solve, seconds, count)


def _over_pieces(
    known: Problem, prepared: Any, y: np.ndarray, rtol: float, calls: list[int] | None
) -> Solved:
    success, steps = True, 0
    for piece in known.pieces:
        y, ok, taken = prepared(piece, y, *known.tolerances(rtol), calls)
        success, steps = success and ok, steps + taken
    return Solved(y, success, {"steps": steps} if steps else {})


def _scipy(known: Problem, kernel: Kernel, method: str) -> Any:
    from scipy.integrate import solve_ivp

    pattern = known.sparsity()

    def solve(piece, y, rtol, atol, calls):
        begin, end, on = piece

        def fn(t, y):
            out = np.empty_like(y)
            kernel(t, y, out, on)
            return out

        def counted(t, y):
            calls[0] += 1
            return fn(t, y)

        out = solve_ivp(
            fn if calls is None else counted, (begin, end), y, method, rtol=rtol, atol=atol,
            jac_sparsity=pattern,
        )  # fmt: skip
        return out.y[:, -1], out.success, out.t.size - 1

    return solve


def _cvode(known: Problem, kernel: Kernel, method: str) -> Any:
    from sksundae.cvode import CVODE

    options: dict[str, Any] = {"linsolver": method.lower(), "max_num_steps": 100_000_000}
    if method == "band":
        options |= {"lband": 2, "uband": 2}

    def solve(piece, y, rtol, atol, calls):
        begin, end, on = piece

        def fn(t, y, out):
            kernel(t, y, out, on)

        def counted(t, y, out):
            calls[0] += 1
            kernel(t, y, out, on)

        cvode = CVODE(fn if calls is None else counted, rtol=rtol, atol=atol, **options)
        # Three times, of which the middle one is interpolated: with two, every step is copied.
        out = cvode.solve(np.array([begin, 0.5 * (begin + end), end]), y)
        return out.y[-1], bool(out.success), 0

    return solve

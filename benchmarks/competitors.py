"""The solvers of the table, as functions from a row to a compiled solve."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
from jaxtyping import Array
from scipy.optimize import NoConvergence, newton_krylov

import nksolve as nks

from .rows import Row


class Outcome(NamedTuple):
    """A solution; `steps` are Newton steps, the largest of the lanes, `None` where not told."""

    value: Any
    steps: int | None
    failure: str | None


#: `knobs` are two numbers that may change without compiling again; `None` for the usual ones.
Solve = Callable[..., Outcome]
Fn = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Competitor:
    """`prepare(row, fn)` returns a solve without arguments."""

    name: str
    prepare: Callable[[Row, Fn], Solve]
    dense: bool = False  # makes the n × n Jacobian


def nksolve(name: str, **fields: Any) -> Competitor:
    """`nks.NewtonKrylov(rtol, atol=0, **fields)`."""

    def prepare(row: Row, fn: Fn) -> Solve:
        solver = nks.NewtonKrylov(rtol=row.rtol, atol=0.0, **fields)
        tags = row.tags
        return _compiled(
            row, lambda y, args, *_: nks.root_find(fn, solver, y, args, throw=False, tags=tags)
        )

    return Competitor(name, prepare)


def optimistix(
    name: str,
    linear_solver: Callable[[Any, Any], lx.AbstractLinearSolver],
    *,
    eta: float = 1e-2,
    looseness: float = 1.0,
    dense: bool = False,
) -> Competitor:
    """`optx.Newton` with `linear_solver(eta, atol)`, stopping at ‖F‖₂ ≤ looseness · rtol ‖F₀‖₂.

    It tests the residual of the iterate before the last, so that a looseness of 1 makes one step
    more than the accuracy needs.
    """

    def prepare(row: Row, fn: Fn) -> Solve:
        def solve(y, args, target, eta, looseness):
            # Lineax's tolerances are elementwise; below this one nothing needs to be solved.
            linear = linear_solver(eta, 0.5 * target / row.size**0.5)
            solver = optx.Newton(
                rtol=1e30, atol=looseness * target, norm=optx.two_norm, linear_solver=linear
            )
            tags = row.tags if isinstance(linear, lx.CG) else frozenset()
            return optx.root_find(fn, solver, y, args, max_steps=50, throw=False, tags=tags)

        return _compiled(row, solve, (eta, looseness))

    return Competitor(name, prepare, dense)


def scipy(name: str, **settings: Any) -> Competitor:
    """`scipy.optimize.newton_krylov`, the residual compiled by JAX; a batch one by one."""

    def prepare(row: Row, fn: Fn) -> Solve:
        residual = jax.jit(fn)

        def solve_one(y0: np.ndarray) -> tuple[np.ndarray, int, str | None]:
            steps = 0

            def count(x, f):
                nonlocal steps
                steps += 1

            f_tol = row.rtol * float(np.linalg.norm(residual(y0, row.args)))
            try:
                y = newton_krylov(
                    lambda x: np.asarray(residual(x, row.args)),
                    y0,
                    f_tol=f_tol,
                    tol_norm=np.linalg.norm,
                    maxiter=50,
                    callback=count,
                    **settings,
                )
            except (NoConvergence, ValueError) as error:
                return y0, steps, f"{type(error).__name__}: {_short(error)}"
            return y, steps, None

        def solve(knobs=None) -> Outcome:
            y0 = np.asarray(row.y0)
            results = [solve_one(y) for y in y0] if row.lanes else [solve_one(y0)]
            values = [y for y, _, _ in results]
            failure = next((f for *_, f in results if f), None)
            value = np.stack(values) if row.lanes else values[0]
            return Outcome(value, max(s for _, s, _ in results), failure)

        return solve

    return Competitor(name, prepare)


def _compiled(row: Row, solve: Callable[..., optx.Solution], knobs=(0.0, 0.0)) -> Solve:
    def run(y, args, target, knobs):
        solution = solve(y, args, target, *knobs)
        return solution.value, solution.stats["num_steps"], solution.result

    target = row.rtol * _norms(row)
    fn = jax.jit(jax.vmap(run, in_axes=(0, None, 0, None)) if row.lanes else run)

    def call(knobs=knobs) -> Outcome:
        numbers = [jnp.asarray(k, row.y0.dtype) for k in knobs]
        value, steps, result = jax.block_until_ready(fn(row.y0, row.args, target, numbers))
        failed = np.atleast_1d(np.asarray(result != optx.RESULTS.successful))
        if not failed.any():
            return Outcome(value, int(np.max(steps)), None)
        number = np.atleast_1d(np.asarray(result._value))[failed.argmax()]
        message = optx.RESULTS._index_to_message[int(number)]
        return Outcome(value, int(np.max(steps)), _short(message))

    return call


def _norms(row: Row) -> Array:
    """‖F(y0)‖₂, of each lane."""
    norm = lambda y: jnp.linalg.norm(row.fn(y, row.args))
    return jax.vmap(norm)(row.y0) if row.lanes else norm(row.y0)


def _short(message: Any) -> str:
    text = " ".join(str(message).split())
    return text if len(text) <= 70 else text[:67] + "..."

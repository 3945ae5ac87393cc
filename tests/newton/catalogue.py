"""Every nonlinear solver by name, as the tests of honesty run them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

import nksolve as nks


class Wanted(NamedTuple):
    """What a solver is made for: tolerances, which may be traced, the start, a vector, how many
    trials are recorded, and the size of Krylov spaces."""

    rtol: Any
    atol: Any
    y0: Array
    recorded: int
    restart: int


def _newton(want: Wanted, **fields: Any) -> nks.NewtonKrylov:
    fields = {"linear_solver": nks.GMRES(restart=want.restart)} | fields
    return nks.NewtonKrylov(want.rtol, want.atol, history_length=want.recorded, **fields)


def _robust(want: Wanted) -> nks.Robust:
    krylov = nks.GMRES(restart=want.restart)
    length = want.recorded
    return nks.Robust(want.rtol, want.atol, linear_solver=krylov, history_length=length)


def _with(globalisation: Any, **fields: Any) -> Callable[[Wanted], Any]:
    return lambda want: _newton(want, globalisation=globalisation, **fields)


def _levenberg_marquardt(want: Wanted) -> Any:
    lsmr = nks.LSMR(kept=want.restart)
    return _newton(want, globalisation=nks.LevenbergMarquardt(), linear_solver=lsmr)


def box(y0: Array) -> tuple[Array, Array]:
    """Bounds around a start."""
    return y0 - 3 * (1 + jnp.abs(y0)), y0 + 2 * (1 + jnp.abs(y0))


def _feasible(want: Wanted) -> Any:
    lower, upper = box(want.y0)
    return _newton(want, globalisation=nks.Feasible(nks.Backtracking(), lower, upper))


def _right(want: Wanted) -> Any:
    inner = nks.NewtonKrylov(0.0, 0.0, globalisation=nks.FullStep())
    return nks.RightPreconditioned(_newton(want), nks.NonlinearPreconditioner(inner, steps=1))


def _left(want: Wanted) -> Any:
    inner = nks.Picard(0.0, 0.0, damping=DAMPING)
    return nks.LeftPreconditioned(_newton(want), nks.NonlinearPreconditioner(inner, steps=2))


def _iteration(kind: Any, **fields: Any) -> Callable[[Wanted], Any]:
    return lambda want: kind(
        want.rtol, want.atol, damping=DAMPING, history_length=want.recorded, **fields
    )


def _switching(want: Wanted) -> Any:
    linear = nks.SwitchingLinear(nks.GMRES(restart=want.restart))
    length = want.recorded
    return nks.Switching(want.rtol, want.atol, linear_solver=linear, history_length=length)


def known_root(y0: Array) -> Array:
    """What `Deflated` takes for known; none of the problems has its root there."""
    return jnp.full((1, y0.size), 0.7321, y0.dtype)


_TIGHT = nks.ConstantForcing(1e-4)

#: β of the fixed-point iterations, for residuals of either sign: most of what they try fails.
DAMPING = -0.1

SOLVERS: dict[str, Callable[[Wanted], Any]] = {
    "FullStep": _with(nks.FullStep()),
    "Damped": _with(nks.Damped()),
    "Backtracking": _with(nks.Backtracking()),
    "Parabolic": _with(nks.Parabolic()),
    "NonMonotone": _with(nks.NonMonotone()),
    "CriticalPoint": _with(nks.CriticalPoint()),
    "Dogleg": _with(nks.Dogleg()),
    "Hookstep": _with(nks.Hookstep()),
    "LevenbergMarquardt": _levenberg_marquardt,
    "NLEQErr": _with(nks.NLEQErr(), forcing=_TIGHT),
    "PseudoTransient": _with(nks.PseudoTransient(0.1)),
    "PseudoTransient-TTE": _with(nks.PseudoTransient(0.1, rule=nks.TTE())),
    "Feasible": _feasible,
    "Robust": _robust,
    "Scaled": lambda want: nks.Scaled(_newton(want)),
    "Scaled-Robust": lambda want: nks.Scaled(_robust(want)),
    "Picard": _iteration(nks.Picard),
    "Anderson": _iteration(nks.Anderson),
    "NGMRES": _iteration(nks.NGMRES, depth=5),
    "Broyden": _iteration(nks.Broyden),
    "BadBroyden": _iteration(nks.BadBroyden),
    "Switching": _switching,
    "RightPreconditioned": _right,
    "LeftPreconditioned": _left,
    "Deflated": lambda want: nks.Deflated(_newton(want), known_root(want.y0)),
}

#: Those that may evaluate a better point than any that they record.
EVALUATING_MORE = frozenset({"NGMRES", "RightPreconditioned", "LeftPreconditioned"})

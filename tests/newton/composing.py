"""The parts that a Newton–Krylov solver is composed of, every public class at least once, and a
problem on which each of them is legitimate.

The problem is small, on a grid, and its Jacobian symmetric positive definite with eigenvalues in
(0.2, 1.8). A part belongs to a *kind*: members of a kind meet the rest of the library in the same
way.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np

import nksolve as nks

# --- the problem ----------------------------------------------------------------------------

N = 7  # nodes, with two unknowns each
SIZE = 2 * N
#: What is promised of the Jacobian.
TAGS = frozenset({lx.positive_semidefinite_tag})


def _neighbours(x):
    return 2 * x - jnp.pad(x[:-1], (1, 0)) - jnp.pad(x[1:], (0, 1))


def residual(y, args):
    """The gradient of a convex energy, on a grid of any size. From the left, where the slope is
    small, a full step overshoots and is refused by who looks at ‖F‖; from the right all converge.
    """
    u, v = y["u"], y["v"]
    load = args["load"] * jnp.linspace(0.5, 1.5, u.size, dtype=u.dtype)
    bent = lambda x: args["bend"] * jax.nn.softplus(x)
    part = lambda x, other: 0.2 * x + 0.05 * (_neighbours(x) + x - other) + bent(x)
    return {"u": part(u, v) - load, "v": part(v, u) - load[::-1]}


def negated(y, args):
    """The same with a negative definite Jacobian, for a preconditioner that is −I."""
    return jtu.tree_map(jnp.negative, residual(y, args))


def mean_slope(y, args):
    """Of the diagonal of the Jacobian."""
    return 0.35 + args["bend"] * jnp.mean(jax.nn.sigmoid(y["u"]))


#: Lanes: a linear problem, one where full steps are refused, one in between.
LANES = 3
ARGS = {"load": jnp.array([0.2, 1.0, -0.4]), "bend": jnp.array([0.0, 1.2, 0.6])}
_LEVELS = jnp.array([0.5, -4.0, 1.0])[:, None]
START = {
    "u": _LEVELS + 0.2 * jnp.cos(jnp.arange(N))[None],
    "v": _LEVELS - 0.3 * jnp.sin(jnp.arange(N))[None],
}


def lane(batch, i):
    """One of a batch."""
    return jtu.tree_map(lambda x: x[i], batch)


def functional(y):
    """What is differentiated."""
    weights = jnp.arange(1, N + 1, dtype=y["v"].dtype)
    return jnp.sum(jnp.sin(y["u"])) + jnp.sum(weights * y["v"])


@ft.cache
def pattern() -> nks.Pattern:
    """Of the Jacobian: found once."""
    return nks.find_pattern(nks.linearise(residual, lane(START, 2), lane(ARGS, 2)).operator)


# --- the parts ------------------------------------------------------------------------------


class Part(NamedTuple):
    """What makes a part, and its kind."""

    make: Callable[..., Any]
    kind: str


def _of(kind, parts):
    return {name: Part(make, kind) for name, make in parts.items()}


_BOX = {"lower": -5.0, "upper": 2.0}

GLOBALISATIONS = {
    **_of("along d", {
        "FullStep": nks.FullStep,
        "Damped": lambda: nks.Damped(0.7),
        "Backtracking": nks.Backtracking,
        "Parabolic": nks.Parabolic,
        "NonMonotone": lambda: nks.NonMonotone(window=3),
        "CriticalPoint": nks.CriticalPoint,
        "Feasible(Projected)": lambda: nks.Feasible(nks.Backtracking(), **_BOX),
        "Feasible(ProjectedDescent)": lambda: nks.Feasible(
            nks.NonMonotone(), **_BOX, bending=nks.ProjectedDescent()
        ),
    }),
    **_of("bends", {
        "Dogleg": lambda: nks.Dogleg(initial_radius=0.3),
        "Hookstep": lambda: nks.Hookstep(initial_radius=0.3),
        "LevenbergMarquardt": lambda: nks.LevenbergMarquardt(initial_radius=0.3),
        "Feasible(Interior)": lambda: nks.Feasible(nks.Dogleg(), **_BOX, bending=nks.Interior()),
    }),
    **_of("adds to J", {
        "PseudoTransient(SER)": lambda: nks.PseudoTransient(10.0),
        "PseudoTransient(TTE)": lambda: nks.PseudoTransient(10.0, nks.TTE()),
        "Feasible(Shortened)": lambda: nks.Feasible(
            nks.PseudoTransient(10.0), **_BOX, bending=nks.Shortened()
        ),
    }),
    **_of("solves to judge", {"NLEQErr": lambda: nks.NLEQErr(initial_length=0.5)}),
}  # fmt: skip

FORCINGS = {
    **_of("constant", {"ConstantForcing": lambda: nks.ConstantForcing(1e-3)}),
    **_of("adaptive", {
        "EisenstatWalker1": nks.EisenstatWalker1,
        "EisenstatWalker2": nks.EisenstatWalker2,
        "Tightened": lambda: nks.Tightened(patience=1),
    }),
}  # fmt: skip

LINEAR_SOLVERS = {
    **_of("Arnoldi", {
        "GMRES": lambda **kw: nks.GMRES(restart=8, **kw),
        "GMRES(side=left)": lambda **kw: nks.GMRES(side="left", **kw),
        "FGMRES": lambda **kw: nks.FGMRES(restart=8, **kw),
        "GCRODR": lambda **kw: nks.GCRODR(restart=6, recycle=3, **kw),
        "SwitchingLinear": lambda **kw: nks.SwitchingLinear(nks.GMRES(**kw)),
    }),
    **_of("symmetric", {"CG": nks.CG, "MINRES": nks.MINRES}),
    **_of("nonsymmetric", {
        "BiCGStab": nks.BiCGStab,
        "IDR": nks.IDR,
        "TFQMR": nks.TFQMR,
        "Richardson": nks.Richardson,
    }),
    **_of("least squares", {
        "LSMR": nks.LSMR,
        "LSMR(kept=m)": lambda **kw: nks.LSMR(kept=SIZE, **kw),
    }),
    **_of("direct", {
        "AutoLinear": nks.AutoLinear,
        "SparseDirect": lambda: nks.SparseDirect(pattern=pattern()),
        "BandedDirect": lambda: nks.BandedDirect(lower=2, upper=2),
        "DenseDirect": nks.DenseDirect,
    }),
}  # fmt: skip
#: Those that take no `preconditioner`: the factorisation is one.
WITHOUT_FIELD = ("SparseDirect", "BandedDirect", "DenseDirect")


def _inverse_of_one(field):
    def apply(v):
        return {k: x if k == field else jnp.zeros_like(x) for k, x in v.items()}

    return nks.UserPreconditioner(lambda *_: apply)


def _modes():
    x = jnp.asarray(np.sin(np.pi * np.outer([1, 2], np.arange(1, N + 1)) / (N + 1)))
    return {"u": x, "v": x}


def _spectral():
    return nks.Spectral(diffusion=0.05, shift=0.9)


def _by_field(split):
    return lambda: split({"u": nks.Banded(1, 1), "v": nks.Jacobi(probes=1)})


PRECONDITIONERS = {
    **_of("not made of J", {
        "Identity": nks.Identity,
        "UserPreconditioner": lambda: nks.UserPreconditioner(lambda *_: lambda v: v),
        "Spectral": _spectral,
        "Additive": lambda: nks.Additive([_inverse_of_one("u"), _inverse_of_one("v")]),
        "NegativeIdentity": nks.NegativeIdentity,
    }),
    **_of("of the entries of J", {
        "Jacobi": lambda: nks.Jacobi(probes=1),
        "BlockJacobi": lambda: nks.BlockJacobi(node_axes=1, coupling=1),
        "Dense": nks.Dense,
        "Banded": lambda: nks.Banded(2, 2),
        "BlockTridiagonal": nks.BlockTridiagonal,
        "SparseLU": lambda: nks.SparseLU(pattern()),
        "Auto": lambda: nks.Auto(pattern()),
    }),
    **_of("multiplies by J", {
        "Multigrid": lambda: nks.Multigrid(residual, nks.VertexDirichlet(), order=0, coarsest=6),
        "AlgebraicMultigrid": lambda: nks.AlgebraicMultigrid.from_jacobian(
            residual, lane(START, 2), lane(ARGS, 2), pattern=pattern(), coarsest=4,
            coarsening=nks.SmoothedAggregation(theta=0.0),
        ),
        "Chebyshev": lambda: nks.Chebyshev(2),
        "Nystrom": lambda: nks.Nystrom(3),
        "Deflation": lambda: nks.Deflation(2),
        "DeflationOf": lambda: nks.DeflationOf(_modes()),
        "FieldSplit": _by_field(nks.FieldSplit),
        "TriangularFieldSplit": _by_field(nks.TriangularFieldSplit),
        "Multiplicative": lambda: nks.Multiplicative([nks.Jacobi(probes=1), _spectral()]),
    }),
    **_of("changes otherwise than J", {
        "QuasiNewton": lambda: nks.QuasiNewton(_spectral(), memory=2),
        "Lagged": lambda: nks.Lagged(nks.Chebyshev(2), max_age=3, shift=mean_slope),
        "InnerKrylov": lambda: nks.InnerKrylov(nks.GMRES(rtol=1e-1, max_steps=3)),
    }),
}  # fmt: skip
#: Those whose state in a batch is made anew for all lanes as soon as for one.
NOT_AS_IF_ALONE = ("Lagged",)


class Arithmetic(NamedTuple):
    """A policy, the precision of y, and what a solve can then be held to."""

    policy: nks.AbstractPolicy
    dtype: Any = np.float64
    rtol: float = 1e-9
    gradient: float | None = 1e-6  # relative accuracy; `None` where there is none


ARITHMETICS = {
    **_of("double", {
        "Linearise": lambda: Arithmetic(nks.Linearise()),
        "Checkpointed": lambda: Arithmetic(nks.Checkpointed()),
        "Recompute": lambda: Arithmetic(nks.Recompute()),
        "Transposed": lambda: Arithmetic(nks.Transposed()),
    }),
    **_of("narrower", {
        "Linearise, float32": lambda: Arithmetic(nks.Linearise(), np.float32, 1e-5, 2e-3),
        "LowerPrecision": lambda: Arithmetic(nks.LowerPrecision()),
    }),
    **_of("differences", {
        "FiniteDifference": lambda: Arithmetic(nks.FiniteDifference(), rtol=1e-6, gradient=None),
    }),
}  # fmt: skip


# --- a solver of them -----------------------------------------------------------------------

FACTORS = (GLOBALISATIONS, FORCINGS, LINEAR_SOLVERS, PRECONDITIONERS, ARITHMETICS)


class Combination(NamedTuple):
    """One name of each list."""

    globalisation: str
    forcing: str
    linear_solver: str
    preconditioner: str
    arithmetic: str


@ft.cache
def _made(factor: int, name: str) -> Any:
    return FACTORS[factor][name].make()


@ft.cache
def linear_solver(name: str, preconditioner: str) -> nks.AbstractKrylovSolver:
    """With that preconditioner; `"Identity"` is none for those that take none."""
    keywords = {} if name in WITHOUT_FIELD else {"preconditioner": _made(3, preconditioner)}
    return LINEAR_SOLVERS[name].make(**keywords)


def arithmetic(combination: Combination) -> Arithmetic:
    return _made(4, combination.arithmetic)


def solver(combination: Combination) -> nks.NewtonKrylov:
    """The solver; raises where its parts cannot go together."""
    how = arithmetic(combination)
    return nks.NewtonKrylov(
        how.rtol,
        0.0,
        globalisation=_made(0, combination.globalisation),
        forcing=_made(1, combination.forcing),
        linear_solver=linear_solver(combination.linear_solver, combination.preconditioner),
        policy=how.policy,
    )


def _wants_negative(method: str, preconditioner: str) -> bool:
    """x − (b − J x) contracts where J is near −I; a Krylov method takes either sign."""
    return method == "Richardson" and preconditioner == "NegativeIdentity"


def suits(search: str, method: str, preconditioner: str) -> bool:
    """Whether there is a problem for all three: the flow u̇ = −F wants a positive J."""
    flows = GLOBALISATIONS[search].kind == "adds to J"
    return not (flows and _wants_negative(method, preconditioner))


def problem(combination: Combination) -> tuple[Any, frozenset[object]]:
    """The residual, and what is promised of its Jacobian."""
    if _wants_negative(combination.linear_solver, combination.preconditioner):
        return negated, frozenset({lx.negative_semidefinite_tag})
    return residual, TAGS

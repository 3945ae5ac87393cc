"""All problems of the registry in one program, solved by a solver from many starts, and the law.

A solve is compiled once for each solver and dtype: the residual is a switch over the problems,
each laid out as a vector and filled up with equations y = 0 that hold from the start on.
"""

import functools
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

import nksolve as nks
from nksolve import tree
from nksolve.problems import PROBLEMS, get
from nksolve.problems.base import Problem
from nksolve.results import code
from tests.helpers.rounding import rounding_bound

from .catalogue import EVALUATING_MORE, SOLVERS, Wanted, known_root
from .solving import SUCCESS

_SIDES = {
    2: "bratu bratu-3d convection-diffusion convection-diffusion-linear generalised-rosenbrock "
    "laplace",
    3: "brown-almost-linear brusselator discrete-boundary-value discrete-integral-equation "
    "obstacle variably-dimensioned",
    4: "beam bratu-1d broyden-banded broyden-tridiagonal chandrasekhar chandrasekhar-right "
    "trigonometric",
}
#: Sizes at which 32 of the problems have at most 4 unknowns, and all at most 24.
SMALL = {name: {"n": n} for n, names in _SIDES.items() for name in names.split()}
SMALL["food-web"] = {"mx": 2}

#: (rtol, atol): usual, loose, absolute, and out of reach.
TOLERANCES = {
    "float64": ((1e-8, 1e-10), (1e-3, 0.0), (0.0, 1e-6), (0.0, 0.0)),
    "float32": ((1e-5, 1e-6), (1e-2, 0.0), (0.0, 1e-3), (0.0, 0.0)),
}

FACTORS = (1.0, 10.0, 100.0)


class Member(NamedTuple):
    """A problem as a vector of a given size."""

    problem: Problem
    size: int

    @property
    def start(self) -> jax.Array:
        return self.filled(self.problem.y0)

    def filled(self, y: jax.Array) -> jax.Array:
        return jnp.pad(jnp.ravel(y), (0, self.size - y.size))

    def residual(self, y: jax.Array, args: Any) -> jax.Array:
        shape, n = self.problem.y0.shape, self.problem.y0.size
        value = self.problem.fn(y[:n].reshape(shape), args)
        return jnp.concatenate([jnp.ravel(value), y[n:]])


class Lanes(NamedTuple):
    """One solve each."""

    kind: jax.Array
    y0: jax.Array
    rtol: jax.Array
    atol: jax.Array


class Ended(NamedTuple):
    """What a solve returned, and what it recorded."""

    value: jax.Array
    reason: jax.Array
    succeeded: jax.Array
    reported: jax.Array
    initial: jax.Array
    norms: jax.Array  # of the history
    trials: jax.Array
    sizes: jax.Array  # S_F, by which the residual was divided


@functools.cache
def members(size: int, dtype: str) -> tuple[Member, ...]:
    """The problems of at most that size."""
    built = (get(name, **SMALL.get(name, {}), dtype=dtype) for name in PROBLEMS)
    return tuple(Member(p, size) for p in built if p.y0.size <= size)


@functools.cache
def any_of(size: int, dtype: str) -> Any:
    """(y, kind) → the residual of that problem: one object, so that it is traced once."""
    branches = [lambda y, m=m: m.residual(y, m.problem.args) for m in members(size, dtype)]
    return lambda y, kind: lax.switch(kind, branches, y)


def lanes(size: int, dtype: str, randoms: int) -> Lanes:
    """Every problem from its start, from 10 and 100 times as far, and from random points, to every
    tolerance."""
    rng = np.random.default_rng(20260730)
    kinds, starts = [], []
    for kind, member in enumerate(members(size, dtype)):
        y0 = np.asarray(member.problem.y0, np.float64)
        # As in MINPACK's tests a start of zero becomes the factor.
        multiple = lambda factor, y0=y0: factor * y0 if np.any(y0) else np.full_like(y0, factor)
        points = [y0, *(multiple(factor) for factor in FACTORS[1:])]
        for k in range(randoms):
            away = rng.standard_normal(y0.shape) * 10.0 ** (k % 3 - 1)
            points.append(y0 + (1 + np.abs(y0)) * away)
        kinds += [kind] * len(points)
        starts += [np.asarray(member.filled(jnp.asarray(p, dtype))) for p in points]
    each = len(TOLERANCES[dtype])
    rtol, atol = (
        np.tile(np.asarray(t, dtype), len(kinds)) for t in zip(*TOLERANCES[dtype], strict=True)
    )
    return Lanes(
        jnp.asarray(np.repeat(kinds, each), jnp.int32),
        jnp.asarray(np.repeat(np.stack(starts), each, axis=0)),
        jnp.asarray(rtol),
        jnp.asarray(atol),
    )


def most_steps(name: str) -> int:
    """Most trials of a solve."""
    return 150 if "Robust" in name else 50


def solved(name: str, given: Lanes, dtype: str, max_steps: int) -> Ended:
    """One lane after the other, each as it runs alone."""
    size = given.y0.shape[1]
    fn = any_of(size, dtype)

    def one(lane: Lanes) -> Ended:
        want = Wanted(lane.rtol, lane.atol, lane.y0, max_steps + 1, size)
        solver = SOLVERS[name](want)
        solution = nks.root_find(fn, solver, lane.y0, lane.kind, max_steps=max_steps, throw=False)
        stats = solution.stats
        sizes = stats["scaling"].residual if "scaling" in stats else jnp.ones_like(lane.y0)
        return Ended(
            solution.value,
            code(stats["reason"]),
            solution.result == optx.RESULTS.successful,
            stats["residual_norm"],
            stats["initial_residual_norm"],
            stats["history"].norm,
            1 + stats["num_steps"] + stats["num_rejected_steps"],
            sizes,
        )

    return jax.jit(lambda lanes: lax.map(one, lanes))(given)


class Recomputed(NamedTuple):
    """F/S_F of some points: in the dtype by a program of its own, in float64, and how far the
    former may lie from the latter."""

    norm: np.ndarray
    exact: np.ndarray
    rounding: np.ndarray


@functools.cache
def _programs(size: int, dtype: str, deflated: bool) -> Any:
    """`(kind, y, sizes) → (‖F/S_F‖ in the dtype, F/S_F in float64, bound)`."""
    fn = any_of(size, dtype)
    plain = (lambda y, kind: nks.deflate(fn, known_root(y))(y, kind)) if deflated else fn
    exact = [
        (rounding_bound(m.residual, *_double((m.start, m.problem.args))), m)
        for m in members(size, dtype)
    ]
    branches = [
        lambda eps, tiny, y, bound=bound, m=m: bound(eps, tiny, y, _double(m.problem.args))
        for bound, m in exact
    ]
    info = jnp.finfo(dtype)

    def one(given):
        kind, y, sizes = given
        norm = tree.norm2(plain(y, kind) / sizes)
        eps, tiny = (jnp.asarray(float(x), jnp.float64) for x in (info.eps, info.tiny))
        value, error = lax.switch(kind, branches, eps, tiny, _double(y))
        if deflated:
            away = jnp.sum((_double(y) - known_root(_double(y))[0]) ** 2)
            factor = 1 / away + 1
            # n squares and their sum, the power, σ, and the product with F.
            error = factor * error + (size + 12) * eps * jnp.abs(factor * value)
            value = factor * value
        value, error = value / _double(sizes), error / _double(sizes)
        norm64 = tree.norm2(value)
        bound = tree.norm2(error) + (size + 8) * eps * norm64 + tiny
        # Where a slope is infinite the bound says nothing.
        return norm, norm64, jnp.where(jnp.isnan(bound), jnp.inf, bound)

    return jax.jit(lambda given: lax.map(one, given))


def recomputed(
    given: Lanes, points: jax.Array, sizes: jax.Array, dtype: str, *, deflated: bool
) -> Recomputed:
    """At one point of each lane."""
    program = _programs(given.y0.shape[1], dtype, deflated)
    norm, exact, rounding = program((given.kind, points, sizes))
    return Recomputed(*(np.asarray(x, np.float64) for x in (norm, exact, rounding)))


def _double(values: Any) -> Any:
    inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    return jax.tree.map(lambda x: x.astype(jnp.float64) if inexact(x) else x, values)


class Verdict(NamedTuple):
    """Of all lanes.

    - `reasons`: how many ended for which.
    - `clauses`: of the law.
    - `broken`: the lanes in which one is broken.
    - `same`: in how many the two programs in the dtype agree to the last bit.
    - `void`: the successes of which the bound in float64 says nothing, as it is infinite.
    """

    reasons: Counter
    clauses: tuple[str, ...]
    broken: dict[str, np.ndarray]
    same: int
    void: int


def judged(name: str, given: Lanes, ended: Ended, dtype: str) -> Verdict:
    """Whether every success is one, every failure has its reason, and the best point is returned.

    Two programs may each be off by e of `rounding_bound`, and so differ by 2e; float64 is taken for
    exact beside float32, and is one of the two beside float64.
    """
    deflated = name == "Deflated"
    end = recomputed(given, ended.value, ended.sizes, dtype, deflated=deflated)
    start = recomputed(given, given.y0, ended.sizes, dtype, deflated=deflated)
    reason = np.asarray([nks.reason_name(int(r)) for r in ended.reason])
    success = np.isin(reason, SUCCESS)
    reported, initial = (np.asarray(x, np.float64) for x in (ended.reported, ended.initial))
    rtol, atol = (np.asarray(x, np.float64) for x in (given.rtol, given.atol))
    norms = np.asarray(ended.norms, np.float64)
    written = np.arange(norms.shape[1]) < np.asarray(ended.trials)[:, None]
    finite = np.isfinite(norms)
    seen, all_seen = finite.any(axis=1), (finite | ~written).all(axis=1)
    least = np.min(np.where(finite, norms, np.inf), axis=1)
    programs = 1 if dtype == "float32" else 2  # that are not exact
    # Of the sum and the product in the tolerance.
    near = 1 + 4 * float(jnp.finfo(dtype).eps)
    with np.errstate(invalid="ignore", over="ignore"):
        rounding = end.rounding + rtol * start.rounding
        own, again = atol + rtol * initial, atol + rtol * start.norm
        best = reported <= least if name in EVALUATING_MORE else reported == least
        law = {
            "result and reason disagree": success != np.asarray(ended.succeeded),
            "success, but not by its own numbers": success & ~(reported <= own * near),
            "success, but not in its dtype": success & ~(end.norm <= again * near + 2 * rounding),
            "success, but not in float64": success
            & ~(end.exact <= (atol + rtol * start.exact) * near + programs * rounding),
            "failure at a root": ~success & (reported <= own / near),
            "no reason": reason == "iterating",
            "nonfinite, but all was finite": (reason == "nonfinite") & all_seen,
            "a point that is not finite": seen & ~np.isfinite(ended.value).all(axis=1),
            "not the norm there": seen & ~(np.abs(end.norm - reported) <= 2 * end.rounding),
            "not the norm at the start": seen
            & ~(np.abs(start.norm - initial) <= 2 * start.rounding),
            "not the best": seen & ~best,
        }
    return Verdict(
        Counter(reason.tolist()),
        tuple(law),
        {clause: np.flatnonzero(bad) for clause, bad in law.items() if bad.any()},
        int(np.sum(seen & (end.norm == reported))),
        int(np.sum(success & ~np.isfinite(rounding))),
    )

"""No false success, ever: all problems, from near and far, by every solver, in both dtypes.

Each test is one program that solves hundreds of problems, one after the other. The full cross
product is slow; `python -m benchmarks --honesty` runs it too, and writes its counts down.
"""

import functools

import jax.numpy as jnp
import pytest

import nksolve as nks
from nksolve.problems import PROBLEMS

from .catalogue import SOLVERS
from .census import judged, lanes, members, most_steps, solved

SIZES = {"float64": 4, "float32": 2}


@functools.cache
def given(size, dtype, randoms):
    return lanes(size, dtype, randoms)


def verdict(name, size, dtype, randoms):
    some = given(size, dtype, randoms)
    ended = solved(name, some, dtype, most_steps(name))
    found = judged(name, some, ended, dtype)
    told = {
        clause: [_told(some, i, dtype) for i in bad[:5]] for clause, bad in found.broken.items()
    }
    assert not told, told
    # The bound says something, and both kinds of ends are there.
    assert found.void == 0
    assert {"residual_atol", "residual_rtol", "max_steps"} <= set(found.reasons)


def _told(some, i, dtype):
    member = members(some.y0.shape[1], dtype)[int(some.kind[i])]
    return member.problem.name, some.y0[i].tolist(), float(some.rtol[i]), float(some.atol[i])


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("name", SOLVERS)
def test_of_small_problems(name, dtype):
    verdict(name, SIZES[dtype], dtype, randoms=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("name", SOLVERS)
def test_of_all_problems(name, dtype):
    verdict(name, 24, dtype, randoms=12)


def test_all_problems_are_there():
    assert {m.problem.name for m in members(24, "float64")} == set(PROBLEMS)
    assert len(members(4, "float64")) == 32 and len(members(2, "float32")) == 12


# --- the law finds what it is there for -------------------------------------------------------


@functools.cache
def honest():
    some = given(2, "float64", 2)
    return some, solved("CriticalPoint", some, "float64", 50)


def _code(name):
    return getattr(nks.REASONS, name)._value


def _exhausted(e):
    return e.reason == _code("max_steps")


def _calling_exhausted(name):
    return lambda e: {"reason": jnp.where(_exhausted(e), _code(name), e.reason)}


def _halved(x, flag):
    return jnp.where(flag, 0.5 * x, x)


def _away(e):
    return {"value": e.value + jnp.where(e.succeeded, 1e-4, 0.0)[:, None]}


#: What a solver might say wrongly: the clause, and fields of an `Ended` that break it.
LIES = {
    "result and reason disagree": lambda e: {"succeeded": jnp.ones_like(e.succeeded)},
    "success, but not by its own numbers": _calling_exhausted("residual_rtol"),
    "success, but not in its dtype": _away,
    "success, but not in float64": _away,
    "failure at a root": lambda e: {"reason": jnp.full_like(e.reason, _code("step_small"))},
    "no reason": _calling_exhausted("iterating"),
    "nonfinite, but all was finite": _calling_exhausted("nonfinite"),
    "a point that is not finite": lambda e: {
        "value": jnp.where(_exhausted(e)[:, None], jnp.nan, e.value)
    },
    "not the norm there": lambda e: {"reported": _halved(e.reported, _exhausted(e))},
    "not the norm at the start": lambda e: {"initial": _halved(e.initial, e.initial > 1)},
    "not the best": lambda e: {"norms": e.norms.at[:, 0].set(0.5 * e.reported)},
}


@pytest.mark.parametrize("clause", LIES)
def test_a_lie_is_found(clause):
    some, ended = honest()
    found = judged("CriticalPoint", some, ended._replace(**LIES[clause](ended)), "float64")
    assert len(found.broken[clause]) > 0


def test_every_clause_finds_its_lie():
    some, ended = honest()
    truth = judged("CriticalPoint", some, ended, "float64")
    assert not truth.broken
    assert set(truth.clauses) == set(LIES)

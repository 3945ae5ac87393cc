"""The benchmark of differential equations still runs; nothing here looks at a time."""

import functools as ft
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from benchmarks import jacobian_1d, petsc
from benchmarks.pde import _table
from benchmarks.pde_cases import Contender, Outcome, bratu, brusselator
from benchmarks.pde_ours import bratu_shift, ours
from benchmarks.pde_peers import FastPoisson, MeanReaction, peers, scipy_contender
from benchmarks.pde_timing import measure


@ft.cache
def _petsc():
    found, reason = petsc.find()
    if found is None:
        pytest.skip(reason)
    return found


def _measured(case, contenders, before):
    return measure(case, contenders, repeats=1, limit=30.0, budget=30.0, before=before)


def _best(result) -> Any:
    assert result.best is not None
    return result.best


def test_scipys_preconditioners_are_inverses():
    case = bratu(7)
    inverse = FastPoisson(case)
    shift = float(bratu_shift(case.y0, case.args))
    v = np.random.default_rng(0).standard_normal((7, 7))
    padded = np.pad(inverse.matvec(v.ravel()).reshape(7, 7), 1)
    x = padded[1:-1, 1:-1]
    neighbours = padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2]
    np.testing.assert_allclose((4 + shift) * x - neighbours, v, atol=1e-12)
    case = brusselator(6)
    case.fn(case.y0, case.args)
    y = np.broadcast_to([1.2, 2.5], (6, 6, 2))
    inverse = MeanReaction(case)
    inverse.update(y.ravel(), None)
    jacobian = nks.linearise(case.fn, jnp.asarray(y), case.args).operator.as_matrix()
    v = np.random.default_rng(0).standard_normal(72)
    np.testing.assert_allclose(inverse.matvec(np.asarray(jacobian) @ v), v, rtol=1e-9)


def test_a_case_is_measured_and_printed():
    case = brusselator(8)
    scipy = scipy_contender("SciPy", MeanReaction, method="lgmres")
    before = {}
    results = _measured(case, [ours(case)[0], scipy], before)
    assert all(_best(r).residual <= 1.0 for r in results)
    assert 0 < _best(results[0]).newton <= 8
    assert _table(case, results, "").count("\n") == 3 + len(results)


def test_the_slow_and_the_failed_are_told():
    case = bratu(7)
    answers = {
        "slow": Outcome(10.0, 1, 1, 0.5, None),
        "failed": Outcome(1.0, 1, 1, float("nan"), "diverged"),
    }
    contenders = [Contender(k, lambda case, limit, k=k: lambda: answers[k]) for k in answers]
    before = {}
    slow, failed = _measured(case, contenders, before)
    assert _best(slow).seconds == 10.0 and failed.remark == "diverged"
    slow, failed = _measured(case, contenders, before)
    assert slow.remark == "not run: 10 s at 7², would pass 30 s"
    assert failed.remark == "not run: failed at 7²"
    assert "would pass" in _table(case, [slow, failed], "no PETSc")


def test_peers_without_petsc(monkeypatch):
    monkeypatch.setattr(petsc, "find", lambda: (None, "not here"))
    chosen, note = peers(bratu(7))
    assert note == "not here" and not any("PETSc" in c.name for c in chosen)


def test_lines_of_the_one_dimensional_jacobian():
    lines = jacobian_1d.measure(12, repeats=1)
    assert len(lines) == 5 and all(line.residual < 1e-12 for line in lines)


@pytest.mark.slow
def test_petsc_solves_the_same_problems():
    """Its ‖F‖ at our start is ours, and its solution has our sum of u."""
    found = _petsc()
    case = brusselator(16)
    program = petsc.build(found, petsc.BRUSSELATOR)
    run = petsc.run_brusselator(
        found, program, ["-n", "16", "-pc_type", "lu"], limit=30.0, repeats=2
    )
    assert run.failure is None and run.norm <= 1e-4 and 0 < run.newton <= 5
    refused = petsc.run_brusselator(
        found, program, ["-n", "16", "-snes_max_it", "1"], limit=30.0, repeats=1
    )
    assert refused.failure is not None
    case = bratu(15)
    theirs = [c for c in peers(case)[0] if c.name.startswith("PETSc")]
    results = _measured(case, theirs, {})
    assert results and all(0 < _best(r).newton <= 6 and _best(r).krylov > 0 for r in results)

"""The benchmark of equilibrium layers still runs; nothing here looks at a time."""

import functools as ft
import json

import numpy as np
import pytest

from benchmarks import layers, layers_cells as cells, layers_ours, layers_timing as timing
from benchmarks.layers_tables import tables
from benchmarks.layers_worker import main


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("cells")


@ft.cache
def _cell(store, spectrum="symmetric"):
    return cells.cell(8, 0.9, spectrum, store)


@pytest.mark.parametrize("spectrum", layers.SPECTRA)
def test_a_cell_is_what_it_says(store, spectrum):
    known = _cell(store, spectrum)
    slope = 1 - np.tanh(known.z @ known.V + known.injection) ** 2
    jacobians = [(known.V * s).T for s in slope]  # of g at the fixed point of each sample
    radii = [np.max(np.abs(np.linalg.eigvals(j))) for j in jacobians]
    assert max(radii) == pytest.approx(0.9, rel=0.02)
    np.testing.assert_allclose(known.radii, radii, rtol=1e-6)
    assert np.linalg.norm(known.V, 2) < 1
    np.testing.assert_allclose(np.tanh(known.z @ known.V + known.injection), known.z, atol=1e-12)


def test_the_oracle_of_the_gradient_agrees_with_differences(store):
    known = _cell(store)
    direction = np.random.default_rng(0).standard_normal(known.V.shape)

    def loss(V):
        z = known.z
        for _ in range(600):
            z = np.tanh(z @ V + known.injection)
        return np.sum(z * known.c)

    h = 1e-6
    difference = (loss(known.V + h * direction) - loss(known.V - h * direction)) / (2 * h)
    assert difference == pytest.approx(np.sum(direction * known.grad_V), rel=1e-6)


def test_residuals_tell_a_wrong_root_and_a_wrong_adjoint(store):
    known = _cell(store)
    forward, backward = cells.residuals(known, known.z, known.moved)
    assert max(forward, backward) < 1e-12
    assert cells.residuals(known, 1.001 * known.z, known.moved)[0] > 1e-5
    assert cells.residuals(known, known.z, 1.001 * known.moved)[1] > 1e-5


def _stand_in(known, errors):
    """Steps whose forward and backward errors are `errors` times the tolerances."""

    def step(forward, backward):
        z = known.z * (1 + errors[0] * forward)
        moved = known.moved * (1 + errors[1] * backward)
        return timing.Step(z, moved, (known.z.T @ moved, None, None))

    return timing.Variant("it", lambda known, units, dtype: timing.Prepared(step, 0.1))


def test_tolerances_are_as_loose_as_may_be(store):
    known = _cell(store)
    taken = {}
    for factor in (1.0, 10.0):
        variant = _stand_in(known, (factor, factor))
        found = timing.measure([variant], known, "float64", 1e-6, repeats=1, limit=9.0, budget=9.0)
        assert not found.failure and max(found.forward, found.backward) <= 1e-6
        taken[factor] = found.tolerances[1]
    assert taken[1.0] / taken[10.0] == pytest.approx(10.0)
    hopeless = _stand_in(known, (1e6, 1.0))
    found = timing.measure([hopeless], known, "float64", 1e-6, repeats=1, limit=9.0, budget=9.0)
    assert found.failure.startswith("forward residual")
    slow = timing.measure([variant], known, "float64", 1e-6, repeats=1, limit=-1.0, budget=9.0)
    assert slow.failure.endswith("a step")


def test_what_only_chooses():
    every = layers.cases(small=False)
    chosen, names = layers.select(every, ["D512", "rho0.9", "float32", "Anderson"])
    assert [case.mode for case in chosen] == ["joint", "per sample"] and names == ["Anderson"]
    assert {case.spectrum for case in chosen} == {"symmetric"}
    chosen, _ = layers.select(every, ["disc", "D64", "joint"])
    assert {(c.spectrum, c.size, c.mode) for c in chosen} == {("disc", 64, "joint")}
    assert len(chosen) == 6


def test_a_missing_peer_is_told(capsys, monkeypatch):
    monkeypatch.setitem(main.__globals__["FAMILIES"], "torchdeq", "layers_nowhere")
    main(json.dumps({"family": "torchdeq", "mode": "joint", "size": 8, "row": None}))
    assert "missing" in json.loads(capsys.readouterr().out)


def test_our_row_is_accurate_and_printed(store):
    known = _cell(store)
    variants = layers_ours.rows("joint", 8)["nksolve Newton–Krylov"][:1]
    found = timing.measure(variants, known, "float32", 1e-6, repeats=1, limit=60.0, budget=9.0)
    assert not found.failure and max(found.forward, found.backward) <= 1e-6
    assert found.gradient_error < 1e-5 and found.compile_seconds
    case = layers.Case(8, 0.9, "float32", "joint")
    failed = {"failure": "31 s a step"}
    result = vars(found)
    summary, table = tables({case: {"nksolve Newton–Krylov": result, "torchdeq Picard": failed}})
    assert "Newton–Krylov" in summary and "31 s a step" in table


@pytest.mark.slow
def test_a_report_is_kept_and_read_again(store):
    ask = dict(small=True, only=["joint", "LU"], repeats=1, budget=9.0, store=store)
    ask["families"] = ("Optimistix",)
    first = layers.report(**ask)
    lines = (store / "results.jsonl").read_text().splitlines()
    assert "| Optimistix Newton + LU" in first and len(lines) == 1
    assert layers.report(**ask) == first
    assert (store / "results.jsonl").read_text().splitlines() == lines

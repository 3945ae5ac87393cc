"""The benchmark of stiff integrators still runs; nothing here looks at a time."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import ode, ode_ours, ode_peers, ode_timing as timing
from benchmarks.ode_problems import problem
from benchmarks.ode_references import reference
from benchmarks.ode_tables import compared, seconds_at, tables


@pytest.mark.parametrize("name", ["rober", "hires", "orego", "bruss-20", "grid-8", "gray-8"])
def test_every_library_is_given_the_same_right_hand_side(name):
    pytest.importorskip("numba")
    known = problem(name)
    assert known.kernel is not None
    y = np.random.default_rng(0).uniform(0.5, 1.5, known.given.y0.shape)
    kernel, out = known.kernel(), np.empty(known.size)
    for t, on in [(1.0, False), (1.2, True)] if known.given.jumps else [(1.0, True)]:
        kernel(t, y.reshape(-1), out, on)
        ours = np.asarray(known.given.fn(t, jnp.asarray(y), known.given.args)).reshape(-1)
        np.testing.assert_allclose(out, ours, rtol=1e-12, atol=1e-12 * np.max(np.abs(ours)))


@pytest.mark.parametrize("name", ["bruss-20", "grid-8", "gray-8"])
def test_the_pattern_holds_every_entry_of_the_jacobian(name):
    pytest.importorskip("numba")
    known = problem(name)
    assert known.kernel is not None
    kernel, pattern = known.kernel(), known.sparsity().toarray() != 0
    y = np.random.default_rng(0).uniform(0.5, 1.5, known.size)
    base, moved = np.empty(known.size), np.empty(known.size)
    kernel(0.0, y, base, True)
    for j in range(known.size):
        kernel(0.0, y + 1e-3 * (np.arange(known.size) == j), moved, True)
        assert not np.any((moved != base) & ~pattern[:, j])


def test_the_preconditioner_inverts_a_uniform_state():
    known = problem("grid-6")
    gamma, y = 0.01, jnp.broadcast_to(jnp.array([1.2, 2.5])[:, None, None], (2, 6, 6))
    at = lambda y: known.given.fn(0.0, y, known.given.args)
    apply = ode_ours._mean_reaction(0.0, y, gamma, known.given.args)
    v = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 6)))
    slope = (at(y + 1e-6 * v) - at(y - 1e-6 * v)) / 2e-6
    np.testing.assert_allclose(apply(v - gamma * slope), v, rtol=1e-6, atol=1e-6)


def test_a_curve_keeps_to_its_budget_and_tells_failures(tmp_path):
    known = problem("rober")
    end = reference(known, tmp_path)

    def solve(rtol):
        y = end * (1 + rtol) if rtol > 1e-4 else np.full(3, np.nan)
        return timing.Solved(y, True, {"steps": 7})

    stand_in = timing.Runner(solve, 0.0, lambda rtol: round(1 / rtol))
    measured: Any = dict(repeats=2, ladder=(1e-2, 1e-3, 1e-5))
    points = list(timing.curve(known, stand_in, end, budget=10.0, **measured))
    np.testing.assert_allclose([p["error"] for p in points[:2]], [1e-2, 1e-3], rtol=1e-4)
    assert "error" not in points[2]
    assert [p["work"] for p in points] == [100, 1000, 100000]
    assert points[0]["runs"] == 2
    assert len(list(timing.curve(known, stand_in, end, budget=0.0, **measured))) == 1


def test_times_at_equal_error_are_interpolated_and_never_extrapolated():
    points = [{"error": 10.0**-k, "seconds": 10.0 ** (k / 2)} for k in (2, 4, 6)]
    row, failed = {"points": points}, {"points": [{"rtol": 1e-3, "seconds": 1.0}]}
    assert seconds_at(row, 1e-3) == pytest.approx(10**1.5)
    assert seconds_at(row, 1e-4) == pytest.approx(100.0)
    assert seconds_at(row, 1e-1) is None
    assert seconds_at(row, 1e-7) is None
    slow = {"points": [{"error": p["error"], "seconds": 3 * p["seconds"]} for p in points[:2]]}
    ratios = compared({"a": row, "failed": failed}, {"b": slow})
    assert len(ratios) > 20
    np.testing.assert_allclose([ratio for _, ratio, _, _ in ratios], 3.0)
    assert compared({"a": failed}, {"b": slow}) == []


def test_a_kept_row_is_not_measured_again(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    chosen: Any = dict(small=True, repeats=1, budget=60.0, store=tmp_path)
    monkeypatch.setitem(ode._SMALL, "rober", ("nksolve Kvaerno3", "SciPy BDF"))
    text = ode.report(only=["rober"], **chosen)
    kept = tmp_path / "small" / "results.jsonl"
    rows = dict(json.loads(line) for line in kept.read_text().splitlines())
    assert list(rows) == ["rober | nksolve Kvaerno3", "rober | SciPy BDF"]
    for row in rows.values():
        assert [p["rtol"] for p in row["points"]] == [1e-3, 1e-5]
        assert row["points"][1]["error"] < 1e-4
        assert row["points"][1]["work"] > row["points"][0]["work"] > 0
    monkeypatch.setattr(ode, "answers", lambda asked: pytest.fail("measured again"))
    assert ode.report(only=["rober"], **chosen) == text
    assert ode.report(only=["rober"], measure=False, **chosen) == text


def test_gradients_are_tabled_beside_the_aims():
    peer = {"forward": 0.1, "default": 0.5, "checkpoints": 0.3, "default_gradient": [1.0, 2.0]}
    peer |= {"steps": 9, "forward_compile": 2.0, "default_compile": 3.0, "checkpoints_compile": 4.0}
    ours = {**peer, "default_gradient": [1.0, 2.0 + 1e-6]}
    start = "gradient | rober | "
    text = "\n".join(tables({start + "nksolve BDF": ours, start + "Diffrax Kvaerno5": peer}))
    assert "| rober, nksolve BDF | 9 | 100 | 3.0 | 5.0 | 8 | 4.5e-07 |" in text


def test_cvode_solves_and_counts(tmp_path):
    pytest.importorskip("numba")
    pytest.importorskip("sksundae")
    known = problem("grid-8")
    cvode = ode_peers.runner(known, "CVODE GMRES")
    assert cvode.count is not None
    assert known.error(cvode.solve(1e-7).y, reference(known, tmp_path)) < 2e-3
    assert cvode.count(1e-7) > cvode.count(1e-5) > 100

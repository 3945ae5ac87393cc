"""What `Auto` and `AutoLinear` pick, say, and solve."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.precondition import auto
from nksolve.problems import get

LINE, SQUARE, DENSE = get("bratu-1d", n=40), get("bratu", n=23), get("chandrasekhar", n=48)


def _operator(problem, tags=frozenset()):
    return nks.linearise(problem.fn, problem.y0, problem.args, tags=tags).operator


def _pair(y, _):
    u, v = y["u"], y["v"]
    lap = lambda w: jnp.diff(jnp.pad(w, 1), 2)
    return {"u": lap(u) + u**2 * v, "v": lap(v) - u * v}


def _missing(monkeypatch, *names):
    found = auto.find_spec
    monkeypatch.setattr(auto, "find_spec", lambda name: None if name in names else found(name))


def _why(solver, operator):
    return solver.why(lambda: operator, None, None)


def test_picks_by_the_pattern():
    solver = nks.AutoLinear(rtol=1e-9)
    line, square, dense = map(_operator, (LINE, SQUARE, DENSE))
    assert solver.chosen(lambda: line, None, None) == nks.BandedDirect(1e-9, 0.0, lower=1, upper=1)
    chosen = solver.chosen(lambda: square, None, None)
    assert chosen == nks.SparseDirect(1e-9, 0.0, pattern=nks.find_pattern(square))
    assert _why(solver, dense).startswith("GMRES preconditioned by Identity: J is dense (48")
    assert isinstance(nks.Auto().chosen(lambda: line, None, None), nks.Banded)
    assert isinstance(nks.Auto().chosen(lambda: square, None, None), nks.SparseLU)


def test_few_unknowns_are_a_dense_matrix():
    """Also without asdex, and where the leaves lie along no line; complex ones are left alone."""
    y = {"a": jnp.ones(()), "b": jnp.ones(3)}
    operator = nks.linearise(lambda v, _: {"a": v["a"] ** 2, "b": v["b"] * v["a"]}, y).operator
    assert nks.AutoLinear(1e-7).chosen(lambda: operator, None, None) == nks.DenseDirect(1e-7)
    assert _why(nks.Auto(), operator) == "Dense: 4 unknowns"
    complexly = nks.linearise(lambda v, _: v * v, jnp.ones(4, jnp.complex128)).operator
    assert not isinstance(nks.Auto().chosen(lambda: complexly, None, None), nks.Dense)


def test_two_fields_along_a_line_are_a_band():
    y = {"u": jnp.ones(30), "v": jnp.ones(30)}
    operator = nks.linearise(_pair, y).operator
    chosen = nks.AutoLinear().chosen(lambda: operator, None, None)
    assert chosen == nks.BandedDirect(lower=2, upper=2)


def test_what_the_machine_lacks_is_not_picked(monkeypatch):
    operator = _operator(SQUARE)
    _missing(monkeypatch, "klujax")
    assert _why(nks.AutoLinear(), operator).startswith("GMRES preconditioned by Jacobi: 529 unk")
    monkeypatch.setattr(auto, "MAX_DETECTED", 100)
    assert "not looked for" in _why(nks.Auto(), operator)
    _missing(monkeypatch, "klujax", "asdex")
    assert "pip install 'nksolve[sparse]'" in _why(nks.Auto(), operator)
    diagonal = nks.Pattern(range(529), range(529), 529)
    given = nks.AutoLinear(preconditioner=nks.Auto(diagonal))
    assert _why(given, operator).startswith("BandedDirect: 529 unknowns with 1.0 entries a row")


def test_too_many_to_factor(monkeypatch):
    monkeypatch.setattr(auto, "MAX_FACTORED", 500)
    tagged = _operator(SQUARE, frozenset({lx.positive_semidefinite_tag}))
    assert _why(nks.AutoLinear(), tagged).startswith("CG (J is tagged definite) preconditioned by")
    solution = lx.linear_solve(tagged, SQUARE.y0 + 1.0, nks.AutoLinear(rtol=1e-10))
    np.testing.assert_allclose(tagged.mv(solution.value), SQUARE.y0 + 1.0, rtol=1e-8)
    assert int(solution.stats["num_steps"]) > 5


@pytest.mark.parametrize("solver", [nks.AutoLinear(), nks.GMRES(preconditioner=nks.Auto())])
def test_solves_differentiates_and_says_what_it_chose(solver):
    newton = nks.NewtonKrylov(rtol=1e-11, atol=1e-13, linear_solver=solver)

    @jax.jit
    def solve(lam):
        solution = nks.root_find(LINE.fn, newton, LINE.y0, lam)
        return solution.value.sum(), solution.stats

    lanes = jnp.array([1.0, 3.0])
    (sums, stats), slopes = jax.vmap(jax.value_and_grad(solve, has_aux=True))(lanes)
    h = 1e-5
    differences = [(solve(lam + h)[0] - solve(lam - h)[0]) / (2 * h) for lam in lanes]
    np.testing.assert_allclose(slopes, differences, rtol=1e-6)
    assert "Banded" in str(stats["choice"]) and "3 diagonals" in str(stats["choice"])
    assert np.all(np.asarray(stats["num_probes"]) == 3 * np.asarray(stats["num_steps"]))
    assert np.all(np.isfinite(sums))


def test_printed_when_asked_and_absent_where_nothing_was_chosen(capsys):
    newton = nks.NewtonKrylov(1e-8, 1e-12, linear_solver=nks.AutoLinear(), verbose=True)
    nks.root_find(LINE.fn, newton, LINE.y0, LINE.args)
    jax.effects_barrier()
    assert (
        "BandedDirect: 40 unknowns with 3.0 entries a row, 3 diagonals" in capsys.readouterr().out
    )
    plain = nks.root_find(LINE.fn, nks.NewtonKrylov(1e-8, 1e-12), LINE.y0, LINE.args)
    assert "choice" not in plain.stats


def test_as_a_lineax_solver():
    operator = _operator(SQUARE)
    b = jnp.linspace(-1.0, 1.0, 529).reshape(23, 23)
    for made, matrix in ((operator, operator.as_matrix()), (operator.T, operator.as_matrix().T)):
        x = lx.linear_solve(made, b, nks.AutoLinear(rtol=1e-11)).value
        np.testing.assert_allclose(matrix @ x.ravel(), b.ravel(), rtol=1e-9, atol=1e-10)
    solver = nks.AutoLinear(rtol=1e-11)
    state, _ = solver.transpose(solver.init(operator, {}), {})
    x, result, _ = solver.compute(state, b, {})
    assert bool(result == lx.RESULTS.successful)
    np.testing.assert_allclose(operator.as_matrix().T @ x.ravel(), b.ravel(), atol=1e-10)

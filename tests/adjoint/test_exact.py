"""`KrylovAdjoint`: its failures, its reports and its floor; the common part of the adjoints."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from nksolve.adjoint.failure import BestEffort, NaNOnFailure, RaiseOnFailure
from nksolve.adjoint.krylov import KrylovAdjoint
from tests.adjoint.cells import CELLS, operator, vector
from tests.verbs.problems import ARGS, COTANGENT, SOLVER, N, dense_root, layer

ONE_STEP = nks.GMRES(max_steps=1)


def _value(args, adjoint, throw=False):
    solution = nks.root_find(layer, SOLVER, jnp.zeros(N), args, adjoint=adjoint, throw=throw)
    return jnp.vdot(COTANGENT, solution.value)


def _reported(fn, *inputs):
    """fn's value and the reports that its adjoint made; `fn` takes the receiver first."""
    reports = []
    out = jax.block_until_ready(eqx.filter_jit(ft.partial(fn, reports.append))(*inputs))
    jax.effects_barrier()
    return out, reports


@ft.cache
def _jacobian():
    """Jᵀ of the layer at its root, by dense differentiation."""
    root = lambda args: nks.root_find(layer, SOLVER, jnp.zeros(N), args, throw=False).value
    y = jax.jit(root)(ARGS)
    return np.asarray(jax.jacfwd(layer)(y, ARGS))


# --- values -------------------------------------------------------------------------------


def pytree(y, args):
    """The layer's unknowns split over a PyTree."""
    flat = layer(jnp.concatenate([y["a"].ravel(), y["b"][0]]), args)
    return {"a": flat[:4].reshape(2, 2), "b": (flat[4:],)}


def test_trees_of_unknowns_in_a_batch_against_the_dense_adjoint():
    start = {"a": jnp.zeros((2, 2)), "b": (jnp.zeros(3),)}

    def value(b):
        args = {**ARGS, "b": b}
        root = nks.root_find(pytree, SOLVER, start, args, throw=False).value
        return jnp.vdot(COTANGENT, jnp.concatenate([root["a"].ravel(), root["b"][0]]))

    shifts = jnp.stack([ARGS["b"], 0.3 * ARGS["b"], jnp.zeros(N)])
    found = jax.jit(jax.vmap(jax.grad(value)))(shifts)
    dense = jax.jit(jax.grad(lambda b: jnp.vdot(COTANGENT, dense_root({**ARGS, "b": b}))))
    for b, gradient in zip(shifts, found, strict=True):
        np.testing.assert_allclose(gradient, dense(b), rtol=1e-9, atol=1e-9)


# --- failures -----------------------------------------------------------------------------


def test_best_effort_is_the_best_iterate():
    """One step of GMRES on Jᵀλ = ȳ: λ = α ȳ with α = ⟨Jᵀȳ, ȳ⟩ / ‖Jᵀȳ‖²."""

    def gradient(receive, args):
        adjoint = KrylovAdjoint(ONE_STEP, failure=BestEffort(), report=receive)
        return jax.grad(_value)(args, adjoint)

    found, (report,) = _reported(gradient, ARGS)
    image = _jacobian().T @ COTANGENT
    multiplier = (image @ COTANGENT) / (image @ image) * COTANGENT
    root = nks.root_find(layer, SOLVER, jnp.zeros(N), ARGS).value
    expected = jax.vjp(lambda a: layer(root, a), ARGS)[1](-multiplier)[0]
    for name in ARGS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-12)
    residual = np.linalg.norm(COTANGENT - _jacobian().T @ multiplier)
    np.testing.assert_allclose(report.residual_norm, residual, rtol=1e-8)
    assert report.transposed and report.failed and report.result == "max_steps"


def test_a_failure_gives_nan_or_an_error_whatever_the_verb_says():
    silent = KrylovAdjoint(ONE_STEP, failure=NaNOnFailure())
    gradient = jax.jit(jax.grad(lambda a: _value(a, silent, throw=True)))(ARGS)
    assert all(np.all(np.isnan(leaf)) for leaf in jtu.tree_leaves(gradient))
    loud = KrylovAdjoint(ONE_STEP, failure=RaiseOnFailure())
    with pytest.raises(eqx.EquinoxRuntimeError, match="linear solve for a derivative"):
        jax.block_until_ready(eqx.filter_jit(jax.grad(lambda a: _value(a, loud)))(ARGS))


def test_best_effort_of_a_cotangent_that_is_not_finite_is_nan():
    solve = KrylovAdjoint(failure=BestEffort()).resolved(SOLVER, None, frozenset(), throw=True)
    b = jnp.asarray(vector(8)).at[3].set(jnp.nan)
    matrix = jnp.asarray(CELLS["disc"](8, 0.5))
    assert np.all(np.isnan(jax.jit(lambda b: solve(operator(matrix), b, b))(b)))


# --- reports ------------------------------------------------------------------------------


def test_reports_of_a_batch_in_both_modes():
    cotangents = jnp.stack([COTANGENT, 3.0 * COTANGENT[::-1], jnp.zeros(N)])

    def both(receive, args, cotangents):
        adjoint = KrylovAdjoint(rtol=1e-6, report=receive)
        fn = lambda b: (
            nks.root_find(
                layer, SOLVER, jnp.zeros(N), {**args, "b": b}, adjoint=adjoint, throw=False
            ).value
        )
        _, tangent = jax.jvp(fn, (args["b"],), (COTANGENT,))
        return tangent, jax.vmap(lambda c: jax.vjp(fn, args["b"])[1](c)[0])(cotangents)

    (_, found), reports = _reported(both, ARGS, cotangents)
    forward = [r for r in reports if not r.transposed]
    assert len(forward) == 1 and forward[0].result == "successful"
    lanes = [r for r in reports if r.transposed]
    assert len(lanes) == 3 and all(r.result == "successful" and not r.failed for r in lanes)
    root = nks.root_find(layer, SOLVER, jnp.zeros(N), ARGS).value
    by_b = np.asarray(jax.jacfwd(lambda b: layer(root, {**ARGS, "b": b}))(ARGS["b"]))
    by_norm = {round(r.rhs_norm, 9): r for r in lanes}
    for c, cotangent in zip(cotangents, found, strict=True):
        report = by_norm[round(float(jnp.linalg.norm(c)), 9)]
        multiplier = -np.linalg.solve(by_b.T, cotangent)
        residual = np.linalg.norm(c - _jacobian().T @ multiplier)
        np.testing.assert_allclose(report.residual_norm, residual, rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(report.solution_norm, np.linalg.norm(multiplier), rtol=1e-8)
        assert report.residual_norm <= 1e-6 * report.rhs_norm


def test_a_report_prints_a_line(capsys):
    adjoint = KrylovAdjoint(report=True)
    jax.block_until_ready(jax.jit(jax.grad(lambda b: _value({**ARGS, "b": b}, adjoint)))(ARGS["b"]))
    jax.effects_barrier()
    assert "Jᵀλ = ȳ" in capsys.readouterr().out


def test_no_callback_unless_asked_for():
    text = lambda adjoint: str(jax.make_jaxpr(jax.grad(lambda a: _value(a, adjoint)))(ARGS))
    assert "callback" not in text(KrylovAdjoint())
    assert "callback" in text(KrylovAdjoint(report=True))


# --- the floor ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 512])
def test_float32_at_the_edge_of_contraction(size):
    """ρ(J_g) = 0.99, 1e-6 forward and backward: solved, or at the floor, with the true residual."""

    def gradient(receive, args, cotangent):
        adjoint = KrylovAdjoint(rtol=1e-6, failure=RaiseOnFailure(), report=receive)
        solver = nks.NewtonKrylov(1e-6, 1e-6)

        def value(args):
            cell = lambda z, a: jnp.tanh(a["W"] @ z) + a["b"] - z
            z = nks.root_find(cell, solver, args["start"], args, adjoint=adjoint).value
            return jnp.vdot(cotangent, z)

        return jax.grad(value)(args)

    reports = []
    compiled = eqx.filter_jit(ft.partial(gradient, reports.append))
    cotangent = vector(size, 7).astype(np.float32)
    for name, cell in CELLS.items():
        w = cell(size, 0.99).astype(np.float32)
        b = np.zeros(size, np.float32)  # the root is 0, where J = W − I
        start = (1e-2 * vector(size, 3)).astype(np.float32)
        args = {k: jnp.asarray(v) for k, v in {"W": w, "b": b, "start": start}.items()}
        multiplier = -np.asarray(compiled(args, jnp.asarray(cotangent))["b"], np.float64)
        jax.effects_barrier()
        report = reports.pop()
        assert not reports and not report.failed, name
        # dF/db = I, so that the gradient is −λ; the root is 0 to 1e-6.
        transposed = w.T.astype(np.float64) - np.eye(size)
        residual = np.linalg.norm(cotangent - transposed @ multiplier)
        scale = np.finfo(np.float32).eps * np.linalg.norm(multiplier)
        np.testing.assert_allclose(report.residual_norm, residual, rtol=0.5, atol=4 * scale)
        assert residual <= 1.1e-6 * np.linalg.norm(cotangent) + 8 * scale
        exact = np.linalg.solve(transposed, cotangent)
        assert np.linalg.norm(multiplier - exact) <= 1e-4 * np.linalg.norm(exact)


def test_what_is_not_solved_is_no_floor():
    """A singular J with a right-hand side outside its range fails, at any tolerance."""
    solve = KrylovAdjoint(nks.GMRES(), rtol=1e-14, failure=NaNOnFailure())
    solve = solve.resolved(SOLVER, None, frozenset(), throw=True)
    w = np.array(CELLS["near-symmetric"](20, 0.9))
    w[0] = 0.0
    w[0, 0] = 1.0  # a row of J that is zero
    run = jax.jit(lambda w, b: solve(operator(w), b, b))
    b = jnp.asarray(vector(20))
    assert np.all(np.isnan(run(jnp.asarray(w), b)))
    b = b.at[0].set(0.0)  # in its range
    x = np.asarray(run(jnp.asarray(w), b))
    assert np.linalg.norm((w - np.eye(20)) @ x - b) <= 1e-13 * np.linalg.norm(b)


def test_float64_below_the_floor():
    """A tolerance of two units of round-off is met as far as it can be."""
    reports = []
    solve = KrylovAdjoint(nks.GMRES(), rtol=1e-16, report=reports.append)
    solve = solve.resolved(SOLVER, None, frozenset(), throw=True)
    w = CELLS["near-symmetric"](20, 0.99)
    run = jax.jit(lambda w, b: solve(operator(w), b, b))
    x = np.asarray(run(jnp.asarray(w), jnp.asarray(vector(20))))
    jax.effects_barrier()
    (report,) = reports
    assert report.result in ("successful", "at_floor")
    exact = np.linalg.solve(w - np.eye(20), vector(20))
    np.testing.assert_allclose(x, exact, rtol=1e-11)


# --- Optimistix ---------------------------------------------------------------------------


def test_in_optimistix_with_a_report():
    def gradient(receive, b):
        adjoint = KrylovAdjoint(rtol=1e-10, report=receive)
        args = lambda b: {**ARGS, "b": b}
        find = lambda b: optx.root_find(layer, SOLVER, jnp.zeros(N), args(b), adjoint=adjoint)
        return jax.grad(lambda b: jnp.vdot(COTANGENT, find(b).value))(b)

    found, (report,) = _reported(gradient, ARGS["b"])
    dense = jax.grad(lambda b: jnp.vdot(COTANGENT, dense_root({**ARGS, "b": b})))(ARGS["b"])
    np.testing.assert_allclose(found, dense, rtol=1e-9, atol=1e-9)
    assert report.transposed and report.result == "successful"

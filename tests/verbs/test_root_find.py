"""`root_find` itself: what it takes, returns and refuses, and whom it hands over to."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from tests.verbs.problems import ARGS, SOLVER, N, dense_root, layer

NEWTON = nks.NewtonKrylov(rtol=1e-10, atol=1e-10)


def cubic(y, args):
    """y³ + y = args, for any PyTree of y."""
    return jtu.tree_map(lambda x: x**3 + x - args, y)


# --- what it returns ------------------------------------------------------------------------


def test_fields_of_a_solution():
    a = jnp.asarray(10.0)
    solution = nks.root_find(cubic, NEWTON, jnp.ones(3), a)
    assert isinstance(solution, optx.Solution)
    np.testing.assert_allclose(solution.value, jnp.full(3, 2.0), rtol=1e-10)
    assert solution.result == optx.RESULTS.successful
    assert solution.aux is None and solution.state is None
    counters = {
        f"num_{name}"
        for name in (
            "steps",
            "rejected_steps",
            "fn_evals",
            "linearisations",
            "matvecs",
            "transposed_matvecs",
            "preconditioner_applications",
            "preconditioner_updates",
            "probes",
            "linear_failures",
        )
    }
    others = {"residual_norm", "initial_residual_norm", "reason", "max_steps", "arnoldi"}
    assert set(solution.stats) == counters | others
    for name in counters:
        assert jnp.issubdtype(solution.stats[name].dtype, jnp.integer)
        assert solution.stats[name].shape == ()
    stats = solution.stats
    assert stats["reason"] in (nks.REASONS.residual_rtol, nks.REASONS.residual_atol)
    assert int(stats["max_steps"]) == 256
    np.testing.assert_allclose(stats["initial_residual_norm"], 8.0 * 3**0.5, rtol=1e-12)
    norm = np.linalg.norm(cubic(solution.value, a))
    np.testing.assert_allclose(stats["residual_norm"], norm, rtol=1e-3, atol=1e-14)


def test_history_is_there_when_asked_for():
    solver = nks.NewtonKrylov(rtol=1e-10, atol=1e-10, history_length=9)
    stats = nks.root_find(cubic, solver, jnp.ones(3), jnp.asarray(10.0)).stats
    rows = int(stats["num_fn_evals"])
    norm = stats["history"].norm
    assert norm.shape == (9,)
    np.testing.assert_allclose(norm[0], stats["initial_residual_norm"])
    np.testing.assert_allclose(norm[rows - 1], stats["residual_norm"])
    assert np.all(np.isnan(norm[rows:]))


def test_max_steps_are_trials_and_failure_raises_its_reason():
    short = lambda **kwargs: nks.root_find(
        cubic, NEWTON, jnp.ones(3), jnp.asarray(1e6), max_steps=2, **kwargs
    )
    solution = short(throw=False)
    assert solution.result == optx.RESULTS.nonlinear_max_steps_reached
    assert nks.reason_name(solution.stats["reason"]) == "max_steps"
    assert int(solution.stats["num_fn_evals"]) == 3
    assert int(solution.stats["max_steps"]) == 2
    norm = np.linalg.norm(cubic(solution.value, 1e6))
    np.testing.assert_allclose(solution.stats["residual_norm"], norm, rtol=1e-12)
    with pytest.raises(eqx.EquinoxRuntimeError, match="Allow more with `max_steps`"):
        short()


def test_no_steps_at_all():
    find = lambda y0: nks.root_find(cubic, NEWTON, y0, jnp.asarray(10.0), max_steps=0, throw=False)
    there = find(jnp.full(3, 2.0))
    assert there.result == optx.RESULTS.successful
    assert int(there.stats["num_fn_evals"]) == 1 and int(there.stats["num_steps"]) == 0
    away = find(jnp.ones(3))
    assert nks.reason_name(away.stats["reason"]) == "max_steps"
    np.testing.assert_array_equal(away.value, jnp.ones(3))


def test_nan_at_the_start():
    solution = nks.root_find(
        cubic, NEWTON, jnp.array([1.0, jnp.nan, 1.0]), jnp.asarray(10.0), throw=False
    )
    assert solution.result == optx.RESULTS.nonfinite
    assert nks.reason_name(solution.stats["reason"]) == "nonfinite"
    assert int(solution.stats["num_fn_evals"]) == 1


# --- what it takes --------------------------------------------------------------------------


class _Module(eqx.Module):
    weight: jax.Array
    activation: object
    name: str = eqx.field(static=True)


STARTS = {
    "Python float": 1.0,
    "NumPy float": np.float64(1.0),
    "NumPy array": np.ones(3),
    "scalar": jnp.asarray(1.0),
    "empty": jnp.zeros((0,)),
    "tree": {"a": jnp.ones((2, 2)), "b": (jnp.asarray(1.0), None)},
}


@pytest.mark.parametrize("name", list(STARTS))
def test_starts(name):
    y0 = STARTS[name]
    value = nks.root_find(cubic, NEWTON, y0, 10.0).value
    assert jtu.tree_structure(value) == jtu.tree_structure(y0)
    for leaf, start in zip(jtu.tree_leaves(value), jtu.tree_leaves(y0), strict=True):
        assert isinstance(leaf, jax.Array)
        assert leaf.shape == np.shape(start)
        np.testing.assert_allclose(leaf, np.full(np.shape(start), 2.0), rtol=1e-9)


def test_a_module_as_the_unknown_and_no_args():
    """Weights for which the module takes given values; its other leaves stay as they were."""
    y0 = _Module(jnp.ones(3), jnp.tanh, "kept")

    def fn(module, args):
        assert args is None and module.name == "kept"
        out = module.activation(module.weight) - jnp.array([0.1, 0.2, 0.3])
        return eqx.tree_at(lambda m: m.weight, eqx.filter(module, eqx.is_inexact_array), out)

    solution = nks.root_find(fn, NEWTON, y0)
    assert isinstance(solution.value, _Module)
    assert solution.value.activation is jnp.tanh and solution.value.name == "kept"
    np.testing.assert_allclose(solution.value.weight, np.arctanh([0.1, 0.2, 0.3]), rtol=1e-9)


def test_aux_is_that_of_the_root_and_keeps_static_leaves():
    def fn(y, args):
        aux = {"twice": 2.0 * y, "label": "root", "fn": jnp.tanh, "n": jnp.array(7), "k": 3}
        return cubic(y, args), aux

    solution = nks.root_find(fn, NEWTON, jnp.ones(3), jnp.asarray(10.0), has_aux=True)
    aux = solution.aux
    np.testing.assert_array_equal(aux["twice"], 2.0 * solution.value)
    assert aux["label"] == "root" and aux["fn"] is jnp.tanh
    assert int(aux["n"]) == 7 and int(aux["k"]) == 3


def test_traced_tolerances():
    def find(tol):
        solution = nks.root_find(
            cubic, nks.NewtonKrylov(rtol=tol, atol=0.0), jnp.ones(3), jnp.asarray(10.0)
        )
        return solution.value, solution.stats["residual_norm"], solution.stats["num_steps"]

    jitted = jax.jit(find)
    _, norm, few = jitted(jnp.asarray(1e-1))
    value, tight, more = jitted(jnp.asarray(1e-12))
    assert float(norm) <= 1e-1 * 8.0 * 3**0.5 and float(tight) <= 1e-12 * 8.0 * 3**0.5
    assert int(few) < int(more)
    np.testing.assert_allclose(value, jnp.full(3, 2.0), rtol=1e-11)


def test_tags_reach_the_operator():
    seen = []

    def build(operator, y, args):
        del y, args
        seen.append(operator)
        return lx.IdentityLinearOperator(operator.out_structure())

    krylov = nks.GMRES(preconditioner=nks.UserPreconditioner(build))
    solver = nks.NewtonKrylov(rtol=1e-8, atol=1e-8, linear_solver=krylov)
    tags = frozenset({lx.symmetric_tag})
    nks.root_find(cubic, solver, jnp.ones(3), jnp.asarray(10.0), tags=tags)
    assert seen and all(lx.is_symmetric(operator) for operator in seen)


# --- what it refuses ------------------------------------------------------------------------

REFUSED = {
    "integers": (lambda: nks.root_find(cubic, NEWTON, jnp.arange(3), 1.0), TypeError, "int64"),
    "Python integer": (lambda: nks.root_find(cubic, NEWTON, 1, 1.0), TypeError, "integer"),
    "integers deep down": (
        lambda: nks.root_find(cubic, NEWTON, {"a": [jnp.ones(2), jnp.arange(2)]}, 1.0),
        TypeError,
        r"y\['a'\]\[1\]",
    ),
    "not square": (
        lambda: nks.root_find(lambda y, _: y[:2], NEWTON, jnp.ones(3)),
        ValueError,
        r"as many equations as unknowns.*float64\[3\].*float64\[2\]",
    ),
    "another dtype": (
        lambda: nks.root_find(lambda y, _: y.astype(jnp.float32), NEWTON, jnp.ones(3)),
        ValueError,
        r"float64\[3\].*float32\[3\]",
    ),
    "another structure": (
        lambda: nks.root_find(lambda y, _: [y["a"]], NEWTON, {"a": jnp.ones(3)}),
        ValueError,
        "same PyTree",
    ),
    "integer residual": (
        lambda: nks.root_find(lambda y, _: y.astype(int), NEWTON, jnp.ones(3)),
        TypeError,
        r"leaf of dtype int64 at `f`",
    ),
    "no aux": (
        lambda: nks.root_find(cubic, NEWTON, jnp.ones(3), 1.0, has_aux=True),
        TypeError,
        "must return a pair",
    ),
    "options": (
        lambda: nks.root_find(cubic, NEWTON, jnp.ones(3), 1.0, {"jac": "fwd"}),
        ValueError,
        r"takes no options, but got \['jac'\]",
    ),
    "negative max_steps": (
        lambda: nks.root_find(cubic, NEWTON, jnp.ones(3), 1.0, max_steps=-1),
        ValueError,
        "non-negative integer",
    ),
    "Lineax solver": (
        lambda: nks.NewtonKrylov(rtol=1e-8, atol=1e-8, linear_solver=lx.LU()),
        Exception,  # a type check in tests, a TypeError without
        "linear_solver",
    ),
    "while_loop": (
        lambda: nks.root_find(
            lambda y, _: jax.lax.while_loop(lambda x: x[0] < 1.0, lambda x: 2.0 * x, y),
            NEWTON,
            jnp.ones(3),
        ),
        nks.LinearisationError,
        "while_loop",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals(name):
    call, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        call()


# --- whom it hands over to ------------------------------------------------------------------


def _value_and_grad(solver, adjoint):
    def value(args):
        y = nks.root_find(layer, solver, jnp.zeros(N), args, adjoint=adjoint).value
        return jnp.sum(jnp.sin(y))

    return jax.jit(jax.value_and_grad(value))(ARGS)


FOREIGN = {
    "Newton": (optx.Newton(1e-12, 1e-12), None),
    "Newton, GMRES of Lineax": (
        optx.Newton(1e-12, 1e-12, linear_solver=lx.GMRES(rtol=1e-12, atol=1e-12)),
        None,
    ),
    "Newton, GMRES of nksolve": (
        optx.Newton(1e-12, 1e-12, linear_solver=nks.GMRES(rtol=1e-12)),
        None,
    ),
    "Newton, KrylovAdjoint": (
        optx.Newton(1e-12, 1e-12),
        nks.KrylovAdjoint(linear_solver=nks.GMRES()),
    ),
    "NewtonKrylov, ImplicitAdjoint": (SOLVER, optx.ImplicitAdjoint()),
    "NewtonKrylov, another Krylov method": (
        SOLVER,
        nks.KrylovAdjoint(linear_solver=nks.FGMRES(restart=4), rtol=1e-12),
    ),
}


@pytest.mark.parametrize("name", list(FOREIGN))
def test_other_solvers_and_adjoints(name):
    value, gradient = _value_and_grad(*FOREIGN[name])
    dense = lambda args: jnp.sum(jnp.sin(dense_root(args)))
    expected, expected_gradient = jax.jit(jax.value_and_grad(dense))(ARGS)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    for key in ARGS:
        np.testing.assert_allclose(gradient[key], expected_gradient[key], rtol=1e-7, atol=1e-9)


def test_a_foreign_solver_has_no_krylov_method_to_take():
    with pytest.raises(ValueError, match=r"Newton has none: pass `linear_solver=nks.GMRES\(\)`"):
        nks.root_find(
            layer, optx.Newton(1e-8, 1e-8), jnp.zeros(N), ARGS, adjoint=nks.KrylovAdjoint()
        )


def test_max_steps_mean_the_same_through_other_adjoints():
    """Trials after the initial point, whoever drives."""
    stats = [
        nks.root_find(
            layer, SOLVER, jnp.zeros(N), ARGS, max_steps=2, adjoint=adjoint, throw=False
        ).stats
        for adjoint in (None, optx.ImplicitAdjoint())
    ]
    for name in ("num_fn_evals", "num_steps", "num_matvecs"):
        assert int(stats[0][name]) == int(stats[1][name])
    assert int(stats[0]["num_fn_evals"]) == 3

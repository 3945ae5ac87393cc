"""Every kind of y, and what is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks

from .solving import SUCCESS, counters, reason, run, two_norm

SOLVER = nks.NewtonKrylov(1e-9, 1e-12)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "vector"])
def test_one_unknown(shape):
    def fn(y, args):
        return jnp.cos(y) - y

    solution = run(fn, SOLVER, jnp.full(shape, 0.5))
    assert reason(solution) in SUCCESS and solution.value.shape == shape
    np.testing.assert_allclose(solution.value, 0.7390851332151607, rtol=1e-9)
    # One unknown: one Krylov iteration solves any linear system.
    assert counters(solution)["num_matvecs"] == counters(solution)["num_steps"]


@pytest.mark.parametrize(
    "y0", [{}, None, jnp.zeros((0,)), {"held": "text"}], ids=["dict", "none", "array", "static"]
)
def test_no_unknowns(y0):
    def fn(y, args):
        return eqx.filter(y, eqx.is_inexact_array)

    solution = run(fn, SOLVER, y0)
    assert reason(solution) in SUCCESS
    assert counters(solution)["num_steps"] == counters(solution)["num_matvecs"] == 0
    assert jax.tree.structure(solution.value) == jax.tree.structure(y0)


def test_a_root_at_the_start_takes_no_step():
    def fn(y, args):
        return y**2 - args

    solution = run(fn, nks.NewtonKrylov(0.0, 0.0), jnp.asarray([2.0, 3.0]), jnp.asarray([4.0, 9.0]))
    counted = counters(solution)
    assert reason(solution) == "residual_atol"
    assert counted["num_steps"] == counted["num_rejected_steps"] == counted["num_matvecs"] == 0
    assert counted["num_fn_evals"] == 1
    np.testing.assert_array_equal(solution.value, [2.0, 3.0])
    assert float(solution.stats["residual_norm"]) == 0.0


def _holomorphic(y, args):
    return y**2 + args @ y - 1.0


def _real_linear(y, args):
    return y**2 + 0.2 * (args @ y.conj()) - 1.0


@pytest.mark.parametrize(
    ("fn", "tags"),
    [
        (_holomorphic, frozenset()),
        (_holomorphic, frozenset({nks.holomorphic_tag})),
        (_real_linear, frozenset()),
    ],
    ids=["holomorphic-untagged", "holomorphic", "real-linear"],
)
def test_complex_unknowns(fn, tags):
    args = jnp.asarray([[1.0 + 1j, 0.3], [0.2j, -0.5]])
    y0 = jnp.asarray([1.0 + 1j, 1.0 - 1j])
    solver = nks.NewtonKrylov(1e-10, 0.0, forcing=nks.ConstantForcing(1e-10))
    solution = run(fn, solver, y0, args, tags=tags)
    counted = counters(solution)
    assert reason(solution) == "residual_rtol"
    assert solution.value.dtype == jnp.complex128
    assert two_norm(fn(solution.value, args)) <= 1e-10 * two_norm(fn(y0, args)) + 1e-14
    assert solution.stats["residual_norm"].dtype == jnp.float64
    # Over ℂ there are two directions a step, over ℝ four.
    dimension = 2 if tags else 4
    assert counted["num_matvecs"] == dimension * counted["num_steps"]


def test_tree_of_several_dtypes():
    def fn(y, args):
        mixed = y["single"].astype(jnp.float64)
        return {
            "single": y["single"] ** 2 - args.astype(jnp.float32),
            "double": [y["double"][0] ** 3 - mixed],
            "complex": y["complex"] ** 2 + 1.0,
        }

    y0 = {
        "single": jnp.asarray([3.0, 2.0], jnp.float32),
        "double": [jnp.asarray([1.0, 2.0])],
        "complex": jnp.asarray([[0.5 + 0.5j]]),
    }
    args = jnp.asarray([4.0, 9.0])
    solution = run(fn, nks.NewtonKrylov(1e-6, 0.0), y0, args)
    assert reason(solution) == "residual_rtol"
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), y0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), solution.value) == expected
    np.testing.assert_allclose(solution.value["single"], [2.0, 3.0], rtol=1e-5)
    np.testing.assert_allclose(solution.value["double"][0], [2 ** (1 / 3), 3 ** (1 / 3)], rtol=1e-5)
    np.testing.assert_allclose(solution.value["complex"], [[1j]], atol=1e-5)


def test_a_module_as_the_unknown():
    class Affine(eqx.Module):
        weight: jax.Array
        bias: jax.Array
        activation: object
        name: str = eqx.field(static=True)

        def __call__(self, x):
            return self.activation(self.weight * x + self.bias)

    def fn(module, args):
        low, high = module(-jnp.ones(())), module(jnp.ones(()))
        return Affine(low - args[0], high - args[1], module.activation, module.name)

    y0 = Affine(jnp.asarray(0.1), jnp.asarray(0.2), jnp.tanh, "affine")
    args = jnp.tanh(jnp.asarray([-1.5, 2.5]))

    def residual(module, args):
        return eqx.filter(fn(module, args), eqx.is_inexact_array)

    solution = run(residual, SOLVER, y0, args)
    assert reason(solution) in SUCCESS
    assert isinstance(solution.value, Affine) and solution.value.activation is jnp.tanh
    np.testing.assert_allclose([solution.value.weight, solution.value.bias], [2.0, 0.5], rtol=1e-6)


def test_aux_is_that_of_the_returned_point():
    def fn(y, args):
        return y**3 - 2 * y + 2, {"cube": y**3, "label": "held"}

    solver = nks.NewtonKrylov(1e-9, 0.0, globalisation=nks.FullStep())
    # Cycles between 0 and 1: the best point is not the last.
    solution = run(fn, solver, jnp.zeros(1), has_aux=True, max_steps=6)
    assert reason(solution) == "max_steps"
    np.testing.assert_allclose(solution.value, [1.0], atol=1e-12)
    np.testing.assert_allclose(solution.aux["cube"], solution.value**3)
    assert solution.aux["label"] == "held"


# --- refused ---------------------------------------------------------------------------------


def _identity(y, args):
    return y


@pytest.mark.parametrize(
    "y0",
    [jnp.asarray([1, 2]), 1, [jnp.ones(2), 3], {"a": jnp.asarray(True)}, np.arange(3)],
    ids=["array", "int", "nested-int", "bool-array", "numpy"],
)
def test_integer_unknowns(y0):
    with pytest.raises(TypeError, match="unknown has"):
        run(_identity, SOLVER, y0)


def test_python_and_numpy_floats_are_unknowns():
    def fn(y, args):
        return {"a": y["a"] - 1.0, "b": y["b"] - 2.0}

    solution = run(fn, SOLVER, {"a": 0.0, "b": np.zeros(2)})
    np.testing.assert_allclose(solution.value["a"], 1.0)
    np.testing.assert_allclose(solution.value["b"], [2.0, 2.0])


@pytest.mark.parametrize(
    "fn",
    [
        lambda y, args: y[:1],
        lambda y, args: [y],
        lambda y, args: y.astype(jnp.float32),
        lambda y, args: y.astype(jnp.complex128),
        lambda y, args: y[None],
        lambda y, args: (y, y),
    ],
    ids=["shape", "structure", "dtype", "complex", "rank", "two"],
)
def test_residual_that_does_not_match(fn):
    with pytest.raises(ValueError, match="as many equations as unknowns"):
        run(fn, SOLVER, jnp.ones(2))


def test_integer_residual():
    with pytest.raises(TypeError, match="residual must be"):
        run(lambda y, args: y.astype(jnp.int32), SOLVER, jnp.ones(2))


def test_has_aux_without_a_pair():
    with pytest.raises((TypeError, ValueError)):
        run(_identity, SOLVER, jnp.ones(3), has_aux=True)


def test_has_aux_without_a_pair_of_two_unknowns():
    # An array of two rows unpacks into two: still no pair of residual and aux.
    with pytest.raises((TypeError, ValueError)):
        run(_identity, SOLVER, jnp.ones(2), has_aux=True)


def test_options():
    with pytest.raises(ValueError, match="takes no options"):
        run(_identity, SOLVER, jnp.ones(2), options={"damping": 0.5})


@pytest.mark.parametrize("bad", [(-1e-3, 0.0), (0.0, -1.0), (float("nan"), 0.0)])
def test_negative_tolerances(bad):
    with pytest.raises(ValueError, match="must not be negative"):
        nks.NewtonKrylov(*bad)


@pytest.mark.parametrize("bad", [-1, 2.0, None])
def test_bad_max_steps(bad):
    with pytest.raises(Exception, match="max_steps"):
        run(_identity, SOLVER, jnp.ones(2), max_steps=bad)


@pytest.mark.parametrize("bad", [lx.GMRES(1e-6, 1e-6), lx.LU(), "gmres"])
def test_wrong_linear_solver(bad):
    with pytest.raises(Exception, match="linear_solver"):
        nks.NewtonKrylov(1e-6, 0.0, linear_solver=bad)


def test_tolerances_are_required():
    with pytest.raises(TypeError):
        nks.NewtonKrylov()


def test_a_pytree_of_random_shapes_and_optimistix():
    """The same solve through `optx.root_find`, whose `max_steps` counts the start too."""

    def fn(y, args):
        return jax.tree.map(lambda x: x**3 + x - args, y)

    y0 = [jr.normal(jr.key(0), (2, 3)), {"x": jr.normal(jr.key(1), ())}]
    ours = run(fn, SOLVER, y0, 2.0)
    theirs = optx.root_find(fn, SOLVER, y0, 2.0, throw=False)
    for a, b in zip(jax.tree.leaves(ours.value), jax.tree.leaves(theirs.value), strict=True):
        np.testing.assert_allclose(a, 1.0, rtol=1e-7)
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert counters(ours) == counters(theirs)

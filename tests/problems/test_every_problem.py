"""What holds for each problem of the registry."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nksolve.problems import NONLINEAR_LIBRARY, PROBLEMS, get

from .oracle import dense, residual

DEFAULT = {name: get(name) for name in PROBLEMS}
SMALL = {"bratu": {"n": 12}, "chandrasekhar": {"n": 32}, "laplace": {"n": 9}, "bratu-3d": {"n": 5}}


def small(name, **more):
    return get(name, **SMALL.get(name, {}), **more)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_residual_and_its_jvp_are_like_y(name, dtype):
    problem = small(name, dtype=dtype)
    assert problem.name == name
    assert problem.y0.dtype == dtype

    @jax.jit
    def push(y, args):
        return jax.jvp(lambda y: problem.fn(y, args), (y,), (y,))

    value, tangent = push(problem.y0, problem.args)
    for out in (value, tangent):
        assert (out.shape, out.dtype) == (problem.y0.shape, problem.y0.dtype)
        assert np.all(np.isfinite(out))


@pytest.mark.parametrize("name", PROBLEMS)
def test_default_dtype_is_that_of_jax(name):
    assert small(name).y0.dtype == jnp.result_type(float)


@pytest.mark.parametrize("name", PROBLEMS)
def test_fn_is_one_object_and_args_have_one_structure(name):
    first, second = small(name), small(name)
    assert first.fn is second.fn
    assert jax.tree.structure(first.args) == jax.tree.structure(second.args)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(first.args))


def test_another_parameter_does_not_compile_again():
    problems = [get("bratu", n=5, lam=lam) for lam in (1.0, 2.0)]
    evaluate = jax.jit(problems[0].fn)
    values = [evaluate(p.y0 + 1.0, p.args) for p in problems]
    assert evaluate._cache_size() == 1
    assert not np.allclose(*values)


@pytest.mark.parametrize("name", [n for n in PROBLEMS if DEFAULT[n].root is not None])
def test_residual_vanishes_at_the_root_and_not_at_the_start(name):
    problem = DEFAULT[name]
    at_root = np.linalg.norm(residual(problem, problem.root))
    at_start = np.linalg.norm(residual(problem, problem.y0))
    assert at_root <= 1e-13 * max(1.0, float(np.max(np.abs(problem.root))))
    assert at_start > 1e-3


@pytest.mark.parametrize("name", [n for n in PROBLEMS if DEFAULT[n].root is not None])
def test_the_tag_singular_root_tells_the_truth(name):
    problem = get(name)
    jacobian = dense(problem, problem.root)[1]
    singular = np.linalg.cond(jacobian.reshape(problem.root.size, -1)) > 1e12
    assert singular == ("singular-root" in problem.tags)


@pytest.mark.parametrize("name", [n for n in PROBLEMS if "symmetric" in get(n).tags])
def test_the_tag_symmetric_tells_the_truth(name):
    problem = small(name)
    jacobian = dense(problem, problem.y0 + 0.1)[1]
    np.testing.assert_allclose(jacobian, jacobian.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in PROBLEMS if DEFAULT[n].field is not None])
def test_field_can_be_plotted(name):
    problem = small(name)
    field = problem.field(problem.y0)
    assert field.ndim in (1, 2)
    assert ("2d" in problem.tags) == (field.ndim == 2)


@pytest.mark.parametrize("name", [n for n in PROBLEMS if DEFAULT[n].bounds is not None])
def test_start_and_published_solution_lie_within_the_bounds(name):
    problem = get(name)
    lower, upper = problem.bounds
    inside = [problem.y0]
    if "solution" in problem.published:
        inside.append(np.asarray(problem.published["solution"]))
    for y in inside:
        assert np.all(lower <= y) and np.all(y <= upper)


@pytest.mark.parametrize("name", PROBLEMS)
def test_sizes_have_defaults_and_docstrings_say_where_it_comes_from(name):
    build = PROBLEMS[name]
    assert "Source:" in build.__doc__
    for parameter in inspect.signature(build).parameters.values():
        assert parameter.default is not inspect.Parameter.empty


@pytest.mark.parametrize(
    "name", [n for n, p in PROBLEMS.items() if "n" in inspect.signature(p).parameters]
)
def test_n_is_the_number_of_unknowns_along_an_axis(name):
    assert get(name, n=7).y0.shape[0] == 7
    with pytest.raises(ValueError, match="n must be"):
        get(name, n=0)


def test_the_library_has_its_23():
    assert len(NONLINEAR_LIBRARY) == 23
    assert NONLINEAR_LIBRARY.items() <= PROBLEMS.items()
    assert all("nonlinear-library" in get(name).tags for name in NONLINEAR_LIBRARY)


def test_unknown_name_suggests_the_near_one():
    with pytest.raises(ValueError, match=r"'bratoo'.*'bratu'"):
        get("bratoo")


def test_unknown_size_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(ValueError, match=r"'bratu' does not take m; it takes n=511, lam=6.0"):
        get("bratu", m=3)


def test_a_dtype_that_is_not_real_floating_is_refused():
    with pytest.raises(ValueError, match="not int32"):
        get("bratu", dtype=jnp.int32)

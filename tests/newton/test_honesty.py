"""Random residuals, tame and hostile: no success that is none, no NaN that was not there before."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks

from .catalogue import SOLVERS, Wanted
from .solving import SUCCESS, all_finite, reason, rows, run


def _residual(y, args):
    """s (b + A y + c y² + d sin y), NaN where a real part exceeds the wall."""
    value = args["b"] + args["A"] @ y + args["c"] * y**2 + args["d"] * jnp.sin(y)
    value = args["s"].astype(value.dtype) * value
    beyond = jnp.any(y.real > args["wall"])
    return jnp.where(beyond, jnp.full_like(value, jnp.nan), value)


def _newton(globalisation, **fields):
    return lambda want: nks.NewtonKrylov(
        want.rtol,
        want.atol,
        globalisation=globalisation,
        history_length=want.recorded,
        **fields,
    )


# Few structures, as each is compiled; everything else varies through arrays.
STRUCTURES = {
    "one": (1, jnp.float64, _newton(nks.Backtracking())),
    "six": (6, jnp.float64, _newton(nks.Parabolic())),
    "single": (3, jnp.float32, _newton(nks.Backtracking())),
    "complex": (2, jnp.complex128, _newton(nks.FullStep())),
    "dogleg": (3, jnp.float64, SOLVERS["Dogleg"]),
    "hookstep": (3, jnp.float32, SOLVERS["Hookstep"]),
    "levenberg-marquardt": (3, jnp.float64, SOLVERS["LevenbergMarquardt"]),
    "error": (3, jnp.float64, SOLVERS["NLEQErr"]),
    "transient": (3, jnp.float32, SOLVERS["PseudoTransient"]),
    "feasible": (3, jnp.float64, SOLVERS["Feasible"]),
    "scaled": (3, jnp.float32, SOLVERS["Scaled"]),
    "robust": (2, jnp.float64, SOLVERS["Robust"]),
    "robust-complex": (2, jnp.complex128, SOLVERS["Robust"]),
    "broyden": (3, jnp.float64, SOLVERS["Broyden"]),
}


@st.composite
def cases(draw, n, dtype):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def normal(*shape):
        value = rng.normal(size=shape)
        return value + 1j * rng.normal(size=shape) if dtype == jnp.complex128 else value

    matrix = normal(n, n)
    kind = draw(st.sampled_from(["regular", "singular", "zero", "graded"]))
    if kind == "singular":
        matrix[-1] = matrix[0]
    elif kind == "zero":
        matrix = 0 * matrix
    elif kind == "graded":
        matrix = matrix * 10.0 ** rng.uniform(-6, 6, (n, 1))
    scale = 10.0 ** draw(st.integers(-12, 12))
    bend, wave = draw(st.sampled_from([(0.0, 0.0), (1.0, 0.0), (30.0, 0.0), (0.3, 5.0)]))
    hole = draw(st.sampled_from([np.inf, np.inf, 0.3, 1.5]))
    y0 = normal(n) * 10.0 ** draw(st.integers(-2, 2))
    y0 = np.where(y0.real > hole, -y0, y0)  # starts where the residual is finite
    arrays = {"A": matrix, "b": normal(n), "c": bend * normal(n), "d": wave * normal(n)}
    if draw(st.booleans()):
        arrays["b"] = -(arrays["c"] + matrix.sum(1) + arrays["d"] * np.sin(1))  # 1 is a root
    if draw(st.integers(0, 9)) == 0:
        arrays["b"] = arrays["b"] * np.nan
    real = jnp.finfo(dtype).dtype
    args = {name: jnp.asarray(value, dtype) for name, value in arrays.items()}
    args |= {"s": jnp.asarray(scale, real), "wall": jnp.asarray(hole, real)}
    rtol = draw(st.sampled_from([0.0, 1e-12, 1e-6, 1e-2]))
    atol = draw(st.sampled_from([0.0, 1e-10, 1e-3])) * scale
    return jnp.asarray(y0, dtype), args, rtol, atol


@pytest.mark.parametrize("name", STRUCTURES)
@hypothesis.settings(max_examples=100)
@hypothesis.given(data=st.data())
def test_never_a_false_success(name, data):
    n, dtype, make = STRUCTURES[name]
    y0, args, rtol, atol = data.draw(cases(n, dtype))
    most = 60 if "robust" in name else 25
    solver = make(Wanted(jnp.asarray(rtol), jnp.asarray(atol), y0, most + 7, n))
    solution = run(_residual, solver, y0, args, max_steps=most)
    assert solution.value.dtype == dtype and solution.value.shape == (n,)
    assert all_finite(solution.value)

    evaluate = jax.jit(_residual)
    sizes = np.asarray(solution.stats["scaling"].residual if name == "scaled" else np.ones(n))
    norm = lambda f: np.linalg.norm(np.asarray(f) / sizes)
    start, end = (norm(evaluate(y, args)) for y in (y0, solution.value))
    y = np.abs(np.asarray(solution.value, np.complex128))
    terms = (np.abs(args[k]) for k in ("b", "A", "c", "d"))
    b, matrix, c, d = terms
    size = float(args["s"]) * norm(b + matrix @ y + c * y**2 + d)
    rounding = 20 * n * float(jnp.finfo(dtype).eps) * size
    norms = rows(solution)["norm"]
    if np.isfinite(start):
        assert np.isfinite(end)
        reported = float(solution.stats["residual_norm"])
        assert abs(reported - end) <= rounding + 1e-6 * end
        assert reported == np.nanmin(norms)
        assert end <= start + rounding
    else:
        np.testing.assert_array_equal(solution.value, y0)
        assert reason(solution) == "nonfinite"
    if reason(solution) in SUCCESS:
        assert end <= (atol + rtol * start) * (1 + 1e-5) + rounding
    else:
        assert not end <= (atol + rtol * start) * (1 - 1e-5) - rounding


def _at_root(y, args):
    return args * (y - 1)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_huge_and_tiny_residuals(scale):
    solver = nks.NewtonKrylov(1e-8, 0.0)
    solution = run(_at_root, solver, jnp.asarray([3.0, -2.0]), jnp.asarray(scale))
    assert reason(solution) in SUCCESS
    np.testing.assert_allclose(solution.value, 1.0, rtol=1e-7)

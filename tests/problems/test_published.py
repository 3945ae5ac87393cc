"""Published answers, reached by a dense Newton's method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nksolve.problems import bratu_1d_solution, get

from .oracle import dense, newton, residual


def test_chandrasekhar_newton_history():
    problem = get("chandrasekhar")
    _, norms = newton(problem, atol=1e-6)
    np.testing.assert_allclose(norms, problem.published["newton_history"], rtol=2e-5)


@pytest.mark.parametrize("name", ["chandrasekhar", "chandrasekhar-right"])
@pytest.mark.parametrize("c", [0.5, 0.9])
def test_chandrasekhar_mean_is_exact(name, c):
    problem = get(name, n=20, c=c)
    y, _ = newton(problem, atol=1e-12)
    np.testing.assert_allclose(np.mean(y), problem.published["mean"], rtol=1e-12)
    np.testing.assert_allclose(problem.published["mean"], 2 / c * (1 - np.sqrt(1 - c)), rtol=1e-14)


def test_chandrasekhar_is_singular_at_one():
    assert "singular-root" in get("chandrasekhar", c=1.0).tags
    assert "singular-root" not in get("chandrasekhar").tags


def test_convection_diffusion_newton_history():
    problem = get("convection-diffusion")
    y, norms = newton(problem, atol=1e-8)
    history = problem.published["newton_history"]
    assert len(norms) == len(history)
    np.testing.assert_allclose(norms[:5], history[:5], rtol=2e-3)
    np.testing.assert_allclose(norms[0], problem.published["start_norm"], rtol=1e-7)
    np.testing.assert_allclose(norms[5], history[5], rtol=1e-2)
    error = np.max(np.abs(y - problem.continuum))
    np.testing.assert_allclose(error, problem.published["discretisation_error"], rtol=1e-2)


@pytest.mark.parametrize(
    "name", ["convection-diffusion", "convection-diffusion-linear", "bratu-1d"]
)
def test_discretisation_is_of_second_order(name):
    errors = []
    for n in (15, 31):
        problem = get(name, n=n)
        y, _ = newton(problem, atol=1e-9)
        errors.append(np.max(np.abs(y - problem.continuum)))
    # 5.2 for the nonlinear one, whose x^4.5 these grids do not resolve yet.
    assert 3.4 < errors[0] / errors[1] < 5.4


def test_convection_diffusion_linear_takes_one_step():
    _, norms = newton(get("convection-diffusion-linear", n=15), atol=1e-10)
    assert len(norms) == 2


@pytest.mark.parametrize("start", ["lower", "middle"])
def test_ferraris_tronconi(start):
    problem = get("ferraris-tronconi", start=start)
    y, norms = newton(problem, atol=1e-5, ord=np.inf)
    assert len(norms) - 1 == problem.published["newton_steps"]
    np.testing.assert_allclose(y, problem.published["solution"], rtol=1e-5)
    y, _ = newton(problem, atol=1e-13)
    np.testing.assert_allclose(y, problem.root, rtol=1e-12)


def test_ferraris_tronconi_refuses_another_start():
    with pytest.raises(ValueError, match="'upper'"):
        get("ferraris-tronconi", start="upper")


def test_robokin():
    problem = get("robokin")
    y, norms = newton(problem, atol=1e-8)
    assert len(norms) - 1 == problem.published["newton_steps"]
    np.testing.assert_allclose(y, problem.published["solution"], atol=6e-7)


def test_roberts():
    problem = get("roberts")
    y, _ = newton(problem, atol=1e-15)
    np.testing.assert_allclose(y, problem.root, rtol=1e-12)
    # Backward Euler conserves mass.
    np.testing.assert_allclose(np.sum(y), 1.0, rtol=1e-14)


def test_laplace_by_modified_newton():
    problem = get("laplace")
    y = np.asarray(problem.y0)
    f, jacobian = dense(problem, y)
    inverse = np.linalg.inv(jacobian)
    steps = 0
    while np.max(np.abs(f)) > 1e-12 and steps < 20:
        y = y - (inverse @ f).reshape(y.shape)
        f = residual(problem, y)
        steps += 1
    # KINSOL differences its Jacobian.
    assert steps == 5 < problem.published["modified_newton_steps"]
    assert f"{y[15, 15]:.5f}" == f"{problem.published['centre']:.5f}"
    assert f"{y[0, 0]:.5f}" == f"{problem.published['corner']:.5f}"


@pytest.mark.parametrize("mx", [5, 8])
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
def test_food_web_corners(mx, scaled):
    problem = get("food-web", mx=mx, scaled=scaled)
    y, norms = newton(problem, atol=1e-7 if scaled else 1e-2, ord=np.inf)
    assert len(norms) - 1 == 4
    concentrations = y / np.asarray(problem.args.scale)
    for corner, node in (("bottom_left", (0, 0)), ("top_right", (-1, -1))):
        prey, predator = problem.published[corner]
        np.testing.assert_allclose(concentrations[node][:3], prey, rtol=1e-5)
        np.testing.assert_allclose(concentrations[node][3:], predator, rtol=2e-6)


def test_food_web_scaling_is_that_of_the_variables_and_residuals():
    scaled, plain = get("food-web", mx=4), get("food-web", mx=4, scaled=False)
    scale = np.asarray(scaled.args.scale)
    np.testing.assert_allclose(scaled.y0, scale * np.asarray(plain.y0), rtol=1e-15)
    key = jax.random.key(0)
    c = plain.y0 * (1.0 + 0.1 * jax.random.normal(key, plain.y0.shape))
    f = plain.fn(c, plain.args)
    np.testing.assert_allclose(
        scaled.fn(jnp.asarray(scale * np.asarray(c)), scaled.args),
        scale * np.asarray(f),
        rtol=1e-9,
        atol=1e-9,
    )


def test_beam_by_pseudo_transient_continuation():
    problem = get("beam")
    y, delta = np.asarray(problem.y0), problem.published["ptc_delta0"]
    f, jacobian = dense(problem, y)
    norms = [np.linalg.norm(f)]
    while norms[-1] > 1e-10 * norms[0] and len(norms) < 60:
        y = y - np.linalg.solve(np.eye(y.size) / delta + jacobian, f)
        f, jacobian = dense(problem, y)
        norms.append(np.linalg.norm(f))
        delta *= norms[-2] / norms[-1]
    assert abs(len(norms) - problem.published["ptc_residuals"]) <= 1
    assert np.max(y) == np.max(np.abs(y))
    np.testing.assert_allclose(np.max(y), problem.published["max"], atol=1e-3)


def test_simple_2d_history_with_one_halved_step():
    problem = get("simple-2d")
    y, norms = newton(problem, atol=1e-10, damping=(0.5,))
    np.testing.assert_allclose(norms[:4], problem.published["newton_history"][:4], rtol=5e-5)
    assert len(norms) == len(problem.published["newton_history"])
    np.testing.assert_allclose(y, problem.root, rtol=1e-10)


def test_bratu_1d_closed_form_satisfies_the_equation():
    x = np.linspace(0.0, 1.0, 2001)
    for upper in (False, True):
        u = bratu_1d_solution(x, 2.0, upper=upper)
        second = (u[2:] - 2 * u[1:-1] + u[:-2]) / (x[1] - x[0]) ** 2
        np.testing.assert_allclose(second, -2.0 * np.exp(u[1:-1]), rtol=1e-4)
        np.testing.assert_allclose(u[[0, -1]], 0.0, atol=1e-12)
    assert np.max(bratu_1d_solution(x, 2.0)) < 0.5 < np.max(bratu_1d_solution(x, 2.0, upper=True))


def test_bratu_1d_fold():
    published = get("bratu-1d").published
    theta = published["fold_theta"]
    np.testing.assert_allclose(theta / 4 * np.tanh(theta / 4), 1.0, rtol=1e-13)
    np.testing.assert_allclose(
        theta**2 / 2 / np.cosh(theta / 4) ** 2, published["fold"], rtol=1e-13
    )
    assert get("bratu-1d", lam=3.52).continuum is None
    with pytest.raises(ValueError, match=r"3\.52"):
        bratu_1d_solution(np.zeros(1), 3.52)


def test_bratu_fold_on_the_grid():
    """The extended system F = 0, J v = 0, v·v = 1 has its root at the fold (Moore & Spence)."""
    problem = get("bratu", n=15, lam=6.6)
    y, _ = newton(problem, atol=1e-10)
    _, jacobian = dense(problem, y)
    v = np.linalg.eigh(jacobian)[1][:, 0].reshape(y.shape)
    fn = problem.fn
    m = y.size

    @jax.jit
    def extended(z):
        u, w, lam = z[:m].reshape(15, 15), z[m : 2 * m].reshape(15, 15), z[2 * m]
        f, fw = jax.jvp(lambda u: fn(u, lam), (u,), (w,))
        return jnp.concatenate([f.ravel(), fw.ravel(), jnp.sum(w**2)[None] - 1.0])

    slope = jax.jit(jax.jacfwd(extended))
    z = np.concatenate([y.ravel(), v.ravel(), [6.6]])
    for _ in range(12):
        z = z - np.linalg.solve(
            np.asarray(slope(jnp.asarray(z))), np.asarray(extended(jnp.asarray(z)))
        )
    assert np.linalg.norm(extended(jnp.asarray(z))) < 1e-11
    np.testing.assert_allclose(z[-1], problem.published["fold_on_grid"][15], atol=6e-7)

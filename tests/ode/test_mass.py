"""Mass matrices, and differential-algebraic equations of index 1."""

import functools as ft

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.linearise.linearisation import linearise
from nksolve.ode.mass import check_mass, consistent, mass_shifted, weighted
from nksolve.ode.newton import SimplifiedNewton
from nksolve.ode.rosenbrock import Rodas4, Rodas5P, Rosenbrock23
from tests.helpers import dense_steps

ALONE = SimplifiedNewton.alone(1e-11, 1e-11)
SEMI = np.array([1.0, 1.0, 0.0])


def _index_one(t, y, k):
    """`dense_steps.index_one`, with a parameter that is 1 there."""
    a, b, z = y
    return jnp.stack(
        [-k * a + z * b + jnp.sin(t), a * z - b**2 * jnp.cos(t), a * b + jnp.cos(t) - z - z**3 / 3]
    )


@ft.cache
def _end(name):
    """y(1) by steps of length h from the consistent state at k."""

    def run(k, h):
        y0 = jnp.asarray(dense_steps.index_one().y0)
        y0 = consistent(_index_one, 0.0, y0, k, mass=SEMI)
        sol = dfx.diffeqsolve(
            dfx.ODETerm(_index_one), ROWS[name], 0.0, 1.0, h, y0, k, max_steps=128
        )
        assert sol.ys is not None
        return sol.ys[0]

    return jax.jit(run)


DIAGONAL = Rodas5P(mass=SEMI, root_finder=ALONE)
ROWS = {
    "Rodas5P, diagonal": DIAGONAL,
    "Rodas5P, operator, GMRES": Rodas5P(
        mass=lx.DiagonalLinearOperator(jnp.asarray(SEMI)),
        root_finder=ALONE,
        linear_solver=nks.GMRES(restart=3),
    ),
    "Rodas4": Rodas4(mass=SEMI, root_finder=ALONE),
    "Rosenbrock23": Rosenbrock23(mass=SEMI, root_finder=ALONE),
}
slowly = ft.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["Rodas5P, diagonal", *(slowly(name) for name in list(ROWS)[1:])])
def test_order_for_index_one(name):
    """Full order in the differential and the algebraic unknowns."""
    solver, one = ROWS[name], jnp.asarray(1.0)
    errors = [
        np.abs(np.asarray(_end(name)(one, 1.0 / count)) - dense_steps.index_one().solution)
        for count in (32, 64)
    ]
    slopes = np.log2(errors[0] / errors[1])
    order = solver.tableau.order
    assert np.all(slopes > order - 0.2)
    assert np.all(slopes < order + 0.6)
    # The same step as in dense NumPy.
    problem, y = dense_steps.index_one(), dense_steps.index_one().y0
    tableau = solver.tableau
    for i in range(32):
        y = dense_steps.rosenbrock_step(tableau, tableau.m, problem, i / 32, y, 1 / 32)
    np.testing.assert_allclose(_end(name)(one, 1.0 / 32), y, rtol=1e-8)


@pytest.mark.parametrize("name", ["Rodas5P, diagonal", slowly("Rodas5P, operator, GMRES")])
def test_gradient(name):
    """Through the equation and its consistent start, against differences."""
    f = _end(name)
    k, e = jnp.asarray(1.0), 2e-3
    weights = jnp.arange(1.0, 4.0)
    found = jax.jit(jax.grad(lambda k: f(k, 0.125) @ weights))(k)
    central = lambda e: (f(k + e, 0.125) - f(k - e, 0.125)) @ weights / (2 * e)
    np.testing.assert_allclose(found, (4 * central(e / 2) - central(e)) / 3, rtol=1e-8)


def test_rober_as_a_dae():
    """The conserved sum in the place of the third equation; the end of the published solution."""

    def f(t, y, args):
        r1, r2, r3 = 0.04 * y[0], 3e7 * y[1] ** 2, 1e4 * y[1] * y[2]
        return jnp.stack([r3 - r1, r1 - r3 - r2, y[0] + y[1] + y[2] - 1.0])

    rtol = 1e-6
    sol = eqx.filter_jit(dfx.diffeqsolve)(
        dfx.ODETerm(f),
        Rodas5P(mass=SEMI),
        0.0,
        1e11,
        None,
        jnp.array([1.0, 0.0, 0.0]),
        stepsize_controller=dfx.PIDController(rtol=rtol, atol=1e-6 * rtol),
        max_steps=1000,
    )
    assert sol.ys is not None
    ref = np.array([2.083340149701255e-08, 8.333360770334713e-14, 0.999999979166505])
    y = np.asarray(sol.ys[0])
    assert np.max(np.abs(y - ref) / (1e-6 * rtol + rtol * np.abs(ref))) < 20
    assert abs(y.sum() - 1) < 1e-14


def test_a_regular_mass_matrix():
    """M y' = f is y' = M⁻¹ f: one step of each, with its error estimate, on a tree."""
    dense = np.array([[2.0, 0.3, 0.0], [0.1, 1.0, 0.2], [0.0, -0.4, 0.5]])

    def f(t, y, args):
        v = jnp.append(y["a"], y["b"])
        out = jnp.stack([-v[0] * v[1] + jnp.cos(t), v[0] - v[2] ** 2, -3.0 * v[2] + v[1]])
        return {"a": out[:2], "b": out[2]}

    def solved(t, y, args):
        v = f(t, y, args)
        out = jnp.linalg.solve(jnp.asarray(dense), jnp.append(v["a"], v["b"]))
        return {"a": out[:2], "b": out[2]}

    def product(y):
        out = jnp.asarray(dense) @ jnp.append(y["a"], y["b"])
        return {"a": out[:2], "b": out[2]}

    y0 = {"a": jnp.array([0.3, 0.8]), "b": jnp.asarray(0.5)}
    structure = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), y0)
    mass = lx.FunctionLinearOperator(product, structure)
    out = []
    for g, m in ((f, mass), (solved, None)):
        solver = Rosenbrock23(nks.GMRES(restart=3), root_finder=ALONE, mass=m)
        terms, t0, t1 = dfx.ODETerm(g), jnp.asarray(0.1), jnp.asarray(0.3)

        @eqx.filter_jit
        def step(terms, y0, solver=solver, t0=t0, t1=t1):
            state = solver.init(terms, t0, t1, y0, None)
            return solver.step(terms, t0, t1, y0, None, state, jnp.array(False))[:2]

        out.append(step(terms, y0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), *out)


def test_the_matrix_and_its_transpose():
    """M − γA against dense algebra, both ways, for a diagonal and an operator."""
    y = jnp.array([0.3, 0.8, -0.2])
    operator = linearise(lambda y, _: _index_one(0.4, y, 1.0), y).operator
    dense_a = np.stack([operator.mv(e) for e in jnp.eye(3)], axis=1)
    full = np.array([[2.0, 0.3, 0.0], [0.1, 1.0, 0.2], [0.0, -0.4, 0.0]])
    gamma = jnp.asarray(0.3)
    for mass, dense in (
        (jnp.asarray(SEMI), np.diag(SEMI)),
        (lx.MatrixLinearOperator(jnp.asarray(full)), full),
        (None, np.eye(3)),
    ):
        w = mass_shifted(mass, operator, gamma)
        expected = dense - 0.3 * dense_a
        for i, e in enumerate(jnp.eye(3)):
            np.testing.assert_allclose(w.mv(e), expected[:, i], atol=1e-14)
            np.testing.assert_allclose(w.transpose().mv(e), expected[i], atol=1e-14)
        np.testing.assert_allclose(weighted(mass, y), dense @ y)


def test_consistent_start():
    """The root of the algebraic row, its derivative, and the other rows as they were."""
    problem = dense_steps.index_one()
    guess = jnp.asarray(problem.y0).at[2].set(0.1)
    start = lambda k: consistent(_index_one, 0.0, guess, k, mass=SEMI)
    found = start(jnp.asarray(1.0))
    np.testing.assert_allclose(found, problem.y0, rtol=1e-9)
    np.testing.assert_array_equal(found[:2], guess[:2])
    a, b, z = problem.y0
    moved = jax.jit(
        jax.jacfwd(lambda a: consistent(_index_one, 0.0, guess.at[0].set(a), 1.0, mass=SEMI))
    )
    np.testing.assert_allclose(moved(jnp.asarray(a)), [1.0, 0.0, b / (1.0 + z**2)], rtol=1e-6)


def test_bad_masses():
    y = {"a": jnp.ones(2), "b": jnp.asarray(1.0)}
    check_mass({"a": jnp.ones(2), "b": jnp.asarray(0.0)}, y)
    check_mass({"a": jnp.asarray(2.0), "b": jnp.asarray(0.0)}, y)
    with pytest.raises(ValueError, match="tree like the state"):
        check_mass(jnp.ones(3), y)
    with pytest.raises(ValueError, match="shape"):
        check_mass({"a": jnp.ones(3), "b": jnp.asarray(0.0)}, y)
    with pytest.raises(ValueError, match="vectors like the state"):
        check_mass(lx.IdentityLinearOperator(jax.ShapeDtypeStruct((3,), jnp.float64)), y)
    with pytest.raises(ValueError, match="complex"):
        check_mass(jnp.ones(2, complex), jnp.ones(2))
    with pytest.raises(TypeError, match="zeros of a diagonal"):
        consistent(_index_one, 0.0, jnp.ones(3), 1.0, mass=None)
    with pytest.raises(ValueError, match="tree like the state"):
        Rodas4(mass=jnp.ones(3)).init(dfx.ODETerm(lambda t, y, _: y), 0.0, 1.0, y, None)

"""Derivatives of ESDIRK steps: those of the converged discrete equations, matrix-free."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
import nksolve.ode as ode
from tests.helpers.hlo import square_tensors
from tests.helpers.jaxprs import square_values

N = 11  # prime: only an n × n value has two axes of it
TIGHT = ode.SimplifiedNewton.alone(1e-10, 1e-10, kappa=1e-3, max_steps=40)
REVERSE = dfx.RecursiveCheckpointAdjoint()
GRID = dfx.StepTo(jnp.linspace(0.0, 1.0, 9))


class Field(eqx.Module):
    """Diffusion and a small network whose weights are in the terms."""

    weights: jax.Array
    bias: jax.Array

    def __call__(self, t, y, args):
        around = jnp.pad(y, 1)
        flux = 40.0 * (around[2:] - 2 * y + around[:-2])
        return flux + jnp.tanh(self.weights * y + self.bias * jnp.cos(t)) + args["source"]


FIELD = Field(jnp.linspace(0.5, 1.5, N), jnp.linspace(-1.0, 1.0, N))
Y0 = jnp.sin(jnp.linspace(0.0, 3.0, N))
ARGS = {"source": jnp.linspace(0.0, 1.0, N), "n": 3}


def _loss(field, y0, args, *, solver, adjoint=REVERSE, controller=GRID, rtol=None):
    if rtol is not None:
        controller = dfx.PIDController(rtol=rtol, atol=rtol)
    sol = dfx.diffeqsolve(
        dfx.ODETerm(field),
        solver,
        0.0,
        1.0,
        None,
        y0,
        args,
        stepsize_controller=controller,
        max_steps=64,
        adjoint=adjoint,
    )
    return jnp.sum(sol.ys[-1] ** 2 * jnp.linspace(1.0, 2.0, N))


def _gradient(**keywords):
    def run(field, y0, source):
        return _loss(field, y0, {**ARGS, "source": source}, **keywords)

    return eqx.filter_jit(jax.grad(run, argnums=(0, 1, 2)))


GMRES = nks.GMRES(preconditioner=nks.Banded(1, 1))
SOLVERS = {
    "krylov": ode.Kvaerno3(root_finder=TIGHT, linear_solver=GMRES, adjoint_rtol=1e-12),
    "direct": ode.Kvaerno5(root_finder=TIGHT, linear_solver=nks.BandedDirect(lower=1, upper=1)),
    "euler": ode.ImplicitEuler(root_finder=TIGHT, linear_solver=nks.GMRES(), adjoint_rtol=1e-12),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_gradients_on_given_steps_are_those_of_finite_differences(name):
    solver = SOLVERS[name]
    grads = _gradient(solver=solver)(FIELD, Y0, ARGS["source"])
    loss = jax.jit(
        lambda w, b, y0, source: _loss(Field(w, b), y0, {**ARGS, "source": source}, solver=solver)
    )
    at = [FIELD.weights, FIELD.bias, Y0, ARGS["source"]]
    found = [grads[0].weights, grads[0].bias, grads[1], grads[2]]
    rng = np.random.default_rng(3)
    for i, g in enumerate(found):
        direction = jnp.asarray(rng.standard_normal(N))
        moved = lambda s, i=i, d=direction: [x + s * d if j == i else x for j, x in enumerate(at)]
        step = 1e-4
        slope = (loss(*moved(step)) - loss(*moved(-step))) / (2 * step)
        np.testing.assert_allclose(jnp.vdot(g, direction), slope, rtol=1e-6)


def test_every_adjoint_of_diffrax_gives_the_same():
    """Also under `vmap`, and forward-mode."""
    solver = SOLVERS["direct"]
    reverse = _gradient(solver=solver)(FIELD, Y0, ARGS["source"])
    direct = _gradient(solver=solver, adjoint=dfx.DirectAdjoint())(FIELD, Y0, ARGS["source"])
    for a, b in zip(jax.tree.leaves(reverse), jax.tree.leaves(direct), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
    forward = lambda y0, adjoint: _loss(FIELD, y0, ARGS, solver=solver, adjoint=adjoint)
    d = jnp.linspace(-1.0, 2.0, N)
    slope = jax.jit(lambda y0: jax.jvp(lambda y0: forward(y0, dfx.ForwardMode()), (y0,), (d,))[1])(
        Y0
    )
    np.testing.assert_allclose(slope, jnp.vdot(reverse[1], d), rtol=1e-9)
    starts = jnp.stack([Y0, 2 * Y0, -Y0])
    grad = jax.grad(lambda y0: forward(y0, dfx.RecursiveCheckpointAdjoint()))
    lanes = jax.jit(jax.vmap(grad))(starts)
    np.testing.assert_allclose(lanes[0], reverse[1], rtol=1e-8)
    np.testing.assert_allclose(lanes[2], jax.jit(grad)(-Y0), rtol=1e-8)


def test_gradients_with_adaptive_steps_agree_with_a_dense_adjoint():
    rtol = 1e-5
    dense = dfx.Kvaerno5(root_finder=optx.Newton(rtol=1e-10, atol=1e-12), root_find_max_steps=20)
    theirs = _gradient(solver=dense, rtol=rtol)(FIELD, Y0, ARGS["source"])
    direct = nks.BandedDirect(lower=1, upper=1)
    ours = _gradient(solver=ode.Kvaerno5(linear_solver=direct), rtol=rtol)(
        FIELD, Y0, ARGS["source"]
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=10 * rtol, atol=10 * rtol * np.abs(b).max())


def test_no_matrix_anywhere():
    solver = ode.Kvaerno5(linear_solver=nks.GMRES())
    jaxpr = jax.make_jaxpr(
        lambda w, y0: jax.grad(
            lambda w, y0: _loss(Field(w, FIELD.bias), y0, ARGS, solver=solver, rtol=1e-5), (0, 1)
        )(w, y0)
    )(FIELD.weights, Y0)
    assert square_values(jaxpr, N) == []
    lowered = jax.jit(jax.grad(lambda y0: _loss(FIELD, y0, ARGS, solver=solver, rtol=1e-5))).lower(
        Y0
    )
    assert square_tensors(lowered.as_text(), N) == []
    theirs = jax.jit(jax.grad(lambda y0: _loss(FIELD, y0, ARGS, solver=dfx.Kvaerno5(), rtol=1e-5)))
    assert square_tensors(theirs.lower(Y0).as_text(), N)  # the reader sees one that is there


def test_the_derivative_of_a_gradient():
    solver = SOLVERS["euler"]
    loss = lambda a: _loss(FIELD, Y0 * a, ARGS, solver=solver, adjoint=dfx.DirectAdjoint())
    one = jnp.ones(())
    slope = lambda a: jax.jvp(loss, (a,), (one,))[1]
    forward = jax.jit(lambda a: jax.jvp(slope, (a,), (one,))[1])(one)
    mixed = jax.jit(lambda a: jax.jvp(jax.grad(loss), (a,), (one,))[1])(one)
    step = 1e-3
    first = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(mixed, forward, rtol=1e-8)
    np.testing.assert_allclose(
        forward, (first(one + step) - first(one - step)) / (2 * step), rtol=1e-5
    )


def test_a_rejected_step_with_nan_inside():
    """y' = −√y reaches zero at t = 2: trial steps beyond it are NaN, and are rejected."""

    @jax.jit
    @jax.value_and_grad
    def end(y0):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -jnp.sqrt(y)),
            ode.Kvaerno3(linear_solver=nks.GMRES()),
            0.0,
            1.5,
            4.0,
            jnp.full(3, 1.0) * y0,
            stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-6),
            max_steps=64,
        )
        return jnp.sum(sol.ys[-1])

    value, slope = end(jnp.ones(()))
    np.testing.assert_allclose(value, 3 * 0.25**2, rtol=1e-4)
    np.testing.assert_allclose(slope, 3 * 0.25, rtol=1e-4)


def test_what_the_terms_close_over_is_differentiated():
    """y' = −s y with s closed over: y(1) = e^−s."""

    def end(s):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -s * y),
            ode.Kvaerno3(linear_solver=nks.BandedDirect(block=2)),
            0.0,
            1.0,
            0.1,
            jnp.array([1.0, 0.5]),
            stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-6),
            max_steps=64,
            adjoint=dfx.ForwardMode(),
        )
        return sol.ys[-1, 0]

    slope = jax.jit(lambda s: jax.jvp(end, (s,), (jnp.ones(()),))[1])(jnp.asarray(2.0))
    np.testing.assert_allclose(slope, -np.exp(-2.0), rtol=1e-4)


@pytest.mark.slow
def test_memory_of_a_gradient():
    """n = 2048 in float32, at most 16 steps: no more than 1.5 MB of temporaries."""
    n = 2048

    def loss(y0):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: jnp.roll(y, 1) - 2 * y + jnp.roll(y, -1) - y**3),
            ode.Kvaerno3(linear_solver=nks.GMRES()),
            0.0,
            0.5,
            None,
            y0,
            stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-3),
            max_steps=16,
        )
        return jnp.sum(sol.ys[-1])

    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones(n, jnp.float32)).compile()
    used = compiled.memory_analysis().temp_size_in_bytes
    print(f"{used / 1e6:.2f} MB")
    assert used < 1.5e6

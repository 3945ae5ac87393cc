"""The user's own M(t, y, γ, args)."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
import nksolve.ode as ode

N = 31
ANGLES = np.pi * np.arange(1, N + 1) / (N + 1)
SINES = jnp.asarray(np.sqrt(2 / (N + 1)) * np.sin(np.outer(np.arange(1, N + 1), ANGLES)))
EIGENVALUES = jnp.asarray(2.0 * np.cos(ANGLES) - 2.0)


def _diffusion(t, y, args):
    around = jnp.pad(y, 1)
    return args * (around[2:] - 2 * y + around[:-2]) - y**3 + jnp.sin(t)


def _build(t, y, gamma, args):
    """The sine transform inverts I − γ args Δ."""
    assert y.shape == (N,)
    scale = 1 / (1 - gamma * args * EIGENVALUES)
    return lambda v: SINES @ (scale * (SINES @ v))


def _solved(linear_solver, args):
    return dfx.diffeqsolve(
        dfx.ODETerm(_diffusion),
        ode.Kvaerno3(linear_solver=linear_solver),
        0.0,
        1.0,
        None,
        jnp.ones(N),
        args,
        stepsize_controller=dfx.PIDController(rtol=1e-5, atol=1e-5),
        saveat=dfx.SaveAt(t1=True, solver_state=True),
        max_steps=256,
    )


def test_it_saves_iterations_and_serves_the_gradient():
    def loss(args, linear_solver):
        sol = _solved(linear_solver, args)
        return jnp.sum(sol.ys[-1] ** 2), sol.solver_state.work

    run = lambda linear_solver: jax.jit(
        lambda args: jax.value_and_grad(loss, has_aux=True)(args, linear_solver)
    )(jnp.asarray(1000.0))
    (value, work), slope = run(nks.GMRES(preconditioner=ode.StagePreconditioner(_build)))
    (exact, plain), exact_slope = run(nks.GMRES(restart=N))
    np.testing.assert_allclose(value, exact, rtol=1e-4)
    np.testing.assert_allclose(slope, exact_slope, rtol=1e-3)
    assert 2.5 * int(work.num_matvecs) < int(plain.num_matvecs)
    # Kept where γ hardly changes.
    assert 0 < int(work.num_preconditioner_updates) < int(work.num_linearisations)


def test_outside_an_integrator_it_says_so():
    solver = nks.NewtonKrylov(
        1e-6, 1e-6, linear_solver=nks.GMRES(preconditioner=ode.StagePreconditioner(_build))
    )
    with pytest.raises(TypeError, match="UserPreconditioner"):
        nks.root_find(lambda y, args: y**3 - 1, solver, 2 * jnp.ones(N))

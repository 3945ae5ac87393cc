"""IMEX methods: order, agreement with Diffrax, gradients."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
import nksolve.ode as ode

TIGHT = ode.SimplifiedNewton.alone(1e-13, 1e-13, kappa=1e-1, max_steps=30)
N = 7


def _explicit(t, y, args):
    return args["forcing"] * jnp.cos(3 * t) - y**2


def _implicit(t, y, args):
    del t
    around = jnp.pad(y, 1)
    return args["diffusion"] * (around[2:] - 2 * y + around[:-2]) - y**3


TERMS = dfx.MultiTerm(dfx.ODETerm(_explicit), dfx.ODETerm(_implicit))
Y0 = jnp.sin(jnp.linspace(0.3, 2.8, N))
ARGS = {"forcing": jnp.linspace(1.0, 2.0, N), "diffusion": jnp.asarray(5.0)}
BAND = nks.BandedDirect(lower=1, upper=1)


def _end(solver, args, dt):
    sol = dfx.diffeqsolve(TERMS, solver, 0.0, 0.5, dt, Y0, args, max_steps=400)
    return sol.ys[-1]


@pytest.mark.parametrize(
    ("method", "order"), [(ode.KenCarp3, 3), (ode.KenCarp4, 4), (ode.KenCarp5, 5)]
)
def test_order_of_convergence(method, order):
    end = jax.jit(lambda dt: _end(method(linear_solver=BAND, root_finder=TIGHT), ARGS, dt))
    exact = end(0.5 / 400)
    counts = [10, 20, 40]
    errors = np.array([float(jnp.max(jnp.abs(end(0.5 / n) - exact))) for n in counts])
    orders = np.log2(errors[:-1] / errors[1:])
    assert np.all(orders > order - 0.5), orders


def test_the_steps_are_those_of_diffrax():
    """Same tableau and interpolant: equal values at the end and in between, equal error control."""

    @eqx.filter_jit
    def run(solver):
        return dfx.diffeqsolve(
            TERMS,
            solver,
            0.0,
            0.5,
            None,
            Y0,
            ARGS,
            stepsize_controller=dfx.PIDController(rtol=1e-5, atol=1e-5),
            saveat=dfx.SaveAt(ts=jnp.linspace(0.0, 0.5, 6)),
        )

    newton = ode.SimplifiedNewton(kappa=1e-6, max_steps=30)
    ours = run(ode.KenCarp4(linear_solver=BAND, root_finder=newton))
    theirs = run(
        dfx.KenCarp4(root_finder=optx.Newton(rtol=1e-11, atol=1e-12), root_find_max_steps=30)
    )
    assert ours.stats["num_accepted_steps"] == theirs.stats["num_accepted_steps"]
    assert ours.stats["num_rejected_steps"] == theirs.stats["num_rejected_steps"]
    np.testing.assert_allclose(ours.ys, theirs.ys, rtol=1e-7)


def test_gradients_are_those_of_finite_differences():
    solver = ode.KenCarp3(linear_solver=nks.GMRES(), root_finder=TIGHT, adjoint_rtol=1e-12)
    loss = lambda args: jnp.sum(_end(solver, args, 0.05) ** 2)
    grads = jax.jit(jax.grad(loss))(ARGS)
    direction = {"forcing": jnp.linspace(-1.0, 1.0, N), "diffusion": jnp.asarray(0.7)}
    at = jax.jit(lambda s: loss(jax.tree.map(lambda x, d: x + s * d, ARGS, direction)))
    slope = (at(1e-4) - at(-1e-4)) / 2e-4
    found = sum(
        jnp.vdot(g, d)
        for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
    )
    np.testing.assert_allclose(found, slope, rtol=1e-6)


def test_one_term_is_refused():
    with pytest.raises(ValueError, match="term"):
        dfx.diffeqsolve(
            dfx.ODETerm(_implicit), ode.KenCarp3(root_finder=TIGHT), 0.0, 1.0, 0.1, Y0, ARGS
        )

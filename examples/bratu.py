# %% [markdown]
# # Bratu's problem: a preconditioner of your own, and a gradient
#
# −Δu = λeᵘ on the unit square, u = 0 on the boundary. Solved without a preconditioner, and with the
# exact inverse of the Laplacian by fast sine transforms. The table counts what each solve needs.

# %%
import os

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)

import equinox as eqx

import nksolve as nks
from nksolve.plot import new_figure, plot_field, plot_history

SMALL = os.environ.get("NKSOLVE_EXAMPLES_SMALL") == "1"
n = 15 if SMALL else 127
h = 1 / (n + 1)


def residual(u, lam):
    p = jnp.pad(u, 1)
    neighbours = p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2]
    return 4 * u - neighbours - h**2 * lam * jnp.exp(u)


# %% [markdown]
# Sines diagonalise the five-point Laplacian: its eigenvalues are
# 4 − 2cos(πih) − 2cos(πjh). A sine transform is a Fourier transform of the odd continuation.

# %%
cosines = 2 - 2 * jnp.cos(jnp.pi * h * jnp.arange(1, n + 1))
eigenvalues = cosines[:, None] + cosines[None, :]


def sine_transform(v):
    """Type I, along the last axis; its own inverse up to 2(n + 1)."""
    zero = jnp.zeros((*v.shape[:-1], 1), v.dtype)
    odd = jnp.concatenate([zero, v, zero, -v[..., ::-1]], axis=-1)
    return -jnp.fft.rfft(odd).imag[..., 1:-1]


def sine_transform_2d(v):
    return sine_transform(sine_transform(v).T).T


def poisson_inverse(operator, u, lam):
    """M⁻¹ of the Laplacian part of J, which depends neither on u nor on λ."""
    return lambda v: sine_transform_2d(sine_transform_2d(v) / eigenvalues) / (2 * (n + 1)) ** 2


# %%
def newton(preconditioner):
    krylov = nks.GMRES(restart=60, preconditioner=preconditioner)
    return nks.NewtonKrylov(rtol=1e-10, atol=1e-12, linear_solver=krylov, history_length=20)


solvers = {
    "none": newton(nks.Identity()),
    "fast Poisson": newton(nks.UserPreconditioner(poisson_inverse)),
}
u0, lam = jnp.zeros((n, n)), jnp.array(6.0)
solutions = {name: nks.root_find(residual, solver, u0, lam) for name, solver in solvers.items()}

counters = ["num_steps", "num_fn_evals", "num_matvecs", "num_preconditioner_applications"]
print(f"Bratu, {n} x {n} unknowns, lambda = {float(lam)}\n")
print(f"{'preconditioner':34s}" + "".join(f"{name:>15s}" for name in solvers))
for counter in counters:
    print(f"{counter:34s}" + "".join(f"{int(s.stats[counter]):15d}" for s in solutions.values()))
assert jnp.allclose(solutions["none"].value, solutions["fast Poisson"].value, atol=1e-7)


# %% [markdown]
# The gradient of max u with respect to λ is one transposed Krylov solve, with the transpose of the
# same preconditioner; it does not evaluate the residual again.


# %%
@eqx.filter_jit
def peak(lam):
    return jnp.max(nks.root_find(residual, solvers["fast Poisson"], u0, lam).value)


gradient = eqx.filter_jit(jax.grad(peak))(lam)
delta = 1e-4
difference = (peak(lam + delta) - peak(lam - delta)) / (2 * delta)
print(f"\nd max(u) / d lambda    by the adjoint {gradient:.9f}    by differences {difference:.9f}")
assert abs(gradient - difference) < 1e-5 * abs(gradient)

# %%
figure = new_figure(2)
for name, solution in solutions.items():
    plot_history(solution.stats["history"], figure.axes[0], label=name)
figure.axes[0].legend(title="preconditioner", frameon=False)
plot_field(solutions["none"].value, figure.axes[1], label="u")
figure.suptitle(f"Bratu's problem, {n} × {n} interior nodes, λ = {float(lam):g}")
figure.savefig("bratu.png")
print("\nwrote bratu.png")

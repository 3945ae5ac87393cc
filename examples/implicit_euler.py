# %% [markdown]
# # A stiff equation by implicit Euler, and how it depends on a rate
#
# Fisher's equation with fast diffusion, u_t = D u_xx + r u (1 − u) on the unit interval with zero
# flux. Each step solves v − u − Δt f(v) = 0 by `nks.root_find` inside `lax.scan`; reverse mode
# solves one transposed system per step.

# %%
import os

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)

import equinox as eqx

import nksolve as nks
from nksolve.plot import new_figure

SMALL = os.environ.get("NKSOLVE_EXAMPLES_SMALL") == "1"
n, steps = (20, 10) if SMALL else (200, 100)
h, dt = 1 / (n - 1), 4.0 / steps
x = jnp.linspace(0, 1, n)


def rates(u, args):
    diffusion, growth = args
    p = jnp.pad(u, 1, mode="reflect")  # the neighbour beyond the end is the one inside it
    return diffusion * (p[2:] - 2 * u + p[:-2]) / h**2 + growth * u * (1 - u)


# %% [markdown]
# Explicit Euler would need Δt < h²/2D. Diffusion is what makes J ill-conditioned, so the
# preconditioner solves with I − Δt D Δ, a constant tridiagonal matrix.


# %%
def implicit_step(v, args):
    """The residual of one step from u to v."""
    u, parameters = args
    return v - u - dt * rates(v, parameters)


def diffusion_inverse(operator, v, args):
    _, (diffusion, _) = args
    c = dt * diffusion / h**2 * jnp.ones(n)
    # Reflection counts the inner neighbour of an end node twice.
    upper, lower = (-c).at[0].multiply(2).at[-1].set(0), (-c).at[-1].multiply(2).at[0].set(0)

    def solve(w):
        return jax.lax.linalg.tridiagonal_solve(lower, 1 + 2 * c, upper, w[:, None])[:, 0]

    return solve


solver = nks.NewtonKrylov(
    rtol=1e-8,
    atol=1e-10,
    linear_solver=nks.GMRES(preconditioner=nks.UserPreconditioner(diffusion_inverse)),
)


# %%
@eqx.filter_jit
def integrate(parameters):
    def step(u, _):
        solution = nks.root_find(implicit_step, solver, u, (u, parameters))
        return solution.value, (solution.value, solution.stats)

    u0 = 0.9 * jnp.exp(-200 * (x - 0.2) ** 2)
    _, (path, stats) = jax.lax.scan(step, u0, None, length=steps)
    return path, {k: jnp.sum(stats[k]) for k in ("num_steps", "num_fn_evals", "num_matvecs")}


def mass(growth):
    """∫ u dx at half time, while the front moves."""
    path, _ = integrate((jnp.array(1e-2), growth))
    return jnp.trapezoid(path[steps // 2], dx=h)


growth = jnp.array(2.0)
path, counters = integrate((jnp.array(1e-2), growth))
print(f"{n} unknowns, {steps} steps of {dt:g}; explicit Euler needs steps below {h**2 / 0.02:.1e}")
for name, count in counters.items():
    print(f"{name:15s} {int(count):6d}   per time step {int(count) / steps:5.1f}")

# %%
gradient = eqx.filter_jit(jax.grad(mass))(growth)
difference = (mass(growth + 1e-4) - mass(growth - 1e-4)) / 2e-4
print(f"d mass / d growth    reverse mode {gradient:.8f}    by differences {difference:.8f}")
assert abs(gradient - difference) < 1e-5 * abs(gradient)

# %%
figure = new_figure()
(ax,) = figure.axes
for k in range(0, steps, max(1, steps // 8)):
    ax.plot(x, path[k], color=(0.1, 0.3, 0.5 + 0.5 * k / steps), label=f"t = {(k + 1) * dt:.2f}")
ax.set(xlabel="x", ylabel="u", title="Fisher's equation by implicit Euler")
ax.legend(frameon=False, fontsize=8)
figure.savefig("implicit_euler.png")
print("wrote implicit_euler.png")

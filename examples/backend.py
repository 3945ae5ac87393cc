# %% [markdown]
# # nksolve as a backend
#
# Every Krylov method is a Lineax solver, every Newton solver an Optimistix root finder, and the
# linearisation that they share can be used by hand.

# %%
import os

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)

import lineax as lx
import optimistix as optx

import nksolve as nks

SMALL = os.environ.get("NKSOLVE_EXAMPLES_SMALL") == "1"
n = 50 if SMALL else 500
h = 1 / (n + 1)
rows = []


def convection_diffusion(u):
    """−u″ + 10u′ + 100u by centred differences, u(0) = u(1) = 0."""
    p = jnp.pad(u, 1)
    return (2 * u - p[2:] - p[:-2]) / h**2 + 10 * (p[2:] - p[:-2]) / (2 * h) + 100 * u


# %% [markdown]
# ## A Krylov method in Lineax
#
# The operator is a function; no matrix is formed.

# %%
b = jnp.ones(n)
operator = lx.FunctionLinearOperator(convection_diffusion, jax.ShapeDtypeStruct(b.shape, b.dtype))
krylov = nks.GMRES(rtol=1e-8, atol=0.0, restart=n)
linear = lx.linear_solve(operator, b, krylov)
error = jnp.linalg.norm(operator.mv(linear.value) - b) / jnp.linalg.norm(b)
rows.append(("lx.linear_solve, nks.GMRES", int(linear.stats["num_matvecs"]), float(error)))
assert error < 1e-8


# %% [markdown]
# ## A Newton solver in Optimistix


# %%
def residual(u, source):
    return convection_diffusion(u) + 50 * u**3 - source


newton = nks.NewtonKrylov(rtol=1e-8, atol=1e-10, linear_solver=nks.GMRES(restart=n))
source = 300 * jnp.ones(n)
solution = optx.root_find(residual, newton, jnp.zeros(n), source)
error = jnp.linalg.norm(residual(solution.value, source)) / jnp.linalg.norm(source)
rows.append(("optx.root_find, nks.NewtonKrylov", int(solution.stats["num_matvecs"]), float(error)))
assert error < 1e-7

# %% [markdown]
# ## The linearisation by hand
#
# One evaluation of the residual gives its value, J and Jᵀ as Lineax operators, and ∂f/∂args. Here
# it makes six steps of Newton's method with `lx.linear_solve`, then a sensitivity of the root.


# %%
@jax.jit
def newton_step(u):
    lin = nks.linearise(residual, u, source)
    step = lx.linear_solve(lin.operator, lin.value, krylov)
    return u - step.value, step.stats["num_matvecs"]


@jax.jit
def sensitivity(u):
    lin = nks.linearise(residual, u, source)
    tangent = lin.args_tangent(jnp.ones(n))  # (∂f/∂source) 1
    return -lx.linear_solve(lin.operator, tangent, krylov).value


u, matvecs = jnp.zeros(n), 0
for _ in range(6):
    u, count = newton_step(u)
    matvecs += int(count)
error = jnp.linalg.norm(residual(u, source)) / jnp.linalg.norm(source)
rows.append(("nks.linearise by hand, six steps", matvecs, float(error)))
assert jnp.allclose(u, solution.value, rtol=1e-6)

du = sensitivity(u)
moved = optx.root_find(residual, newton, jnp.zeros(n), source + 0.1).value
error = jnp.linalg.norm((moved - u) / 0.1 - du) / jnp.linalg.norm(du)
rows.append(("du/dsource against a difference", 0, float(error)))
assert error < 1e-3

# %%
print(f"{'':36s} {'matvecs':>8} {'relative error':>15}")
for name, count, error in rows:
    print(f"{name:36s} {count or '':>8} {error:15.1e}")

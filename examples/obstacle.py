# %% [markdown]
# # A membrane over an obstacle: bounds, contact, and a gradient through both
#
# A membrane u is stretched over a ball ψ: −Δu ≥ 0 and u ≥ ψ, and at each point one of them holds
# with equality. `nks.complementarity` makes a residual of that, `nks.Feasible` keeps every trial on
# or above the ball. The force with which the ball carries the membrane is differentiated by its
# height, and from a force that somebody measured the height is found.

# %%
import os

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)

import nksolve as nks
from nksolve.plot import new_figure, plot_field, plot_history
from nksolve.problems.obstacle import obstacle, obstacle_force

SMALL = os.environ.get("NKSOLVE_EXAMPLES_SMALL") == "1"
n = 17 if SMALL else 65
problem = obstacle(n)
ball, boundary = problem.args

# %% [markdown]
# What must hold at each node: u ≥ ψ, f ≥ 0, u = ψ or f = 0. f is the force −Δu times h².


# %%
def solve(height):
    """The membrane over the ball lifted by `height`, from the flat one."""
    psi = ball + height
    residual = nks.complementarity(obstacle_force, lower=psi, upper=None)
    solver = nks.NewtonKrylov(
        rtol=0,
        atol=1e-10,
        linear_solver=nks.GMRES(restart=80),
        forcing=nks.ConstantForcing(1e-5),
        globalisation=nks.Feasible(lower=psi),
        history_length=40,
    )
    args = problem.args._replace(obstacle=psi)
    return nks.root_find(residual, solver, jnp.maximum(psi, 0.0), args, max_steps=40)


def force(height):
    """What the ball carries: the sum of f over the nodes in contact."""
    solution = solve(height)
    f = obstacle_force(solution.value, problem.args)
    touching = solution.value <= ball + height
    return jnp.sum(jnp.where(touching, f, 0.0)), (solution, touching)


# %%
(total, (solution, touching)), slope = jax.jit(jax.value_and_grad(force, has_aux=True))(0.0)
error = jnp.abs(solution.value - problem.continuum)
print(f"{int(solution.stats['num_steps'])} steps, {int(solution.stats['num_matvecs'])} matvecs")
print(f"error: mean {error.mean():.3e}, largest {error.max():.3e}")
print(f"{int(touching.sum())} of {n * n} nodes in contact; the ball carries {total:.6f}")
assert bool(jnp.all(solution.value >= ball))

# %% [markdown]
# The active set is piecewise constant in the height, and the implicit function theorem holds in
# between: the gradient is that of differences that change no node's contact.

# %%
delta = 1e-6
ahead, behind = jax.jit(force)(delta), jax.jit(force)(-delta)
assert all(bool(jnp.all(other[1][1] == touching)) for other in (ahead, behind))
difference = (ahead[0] - behind[0]) / (2 * delta)
print(f"dforce/dheight: by the adjoint {slope:.8f}, by differences {difference:.8f}")
assert abs(slope - difference) < 1e-5 * abs(slope)

# %% [markdown]
# A measured force, and the height that it tells: a root of a scalar equation whose residual is a
# solve itself.

# %%
measured = force(0.05)[0]
outer = nks.NewtonKrylov(rtol=1e-10, atol=0)
found = nks.root_find(lambda height, goal: force(height)[0] - goal, outer, jnp.zeros(()), measured)
print(f"the height from the force: {float(found.value):.8f} (0.05)")
assert abs(float(found.value) - 0.05) < 1e-7

# %%
figure = new_figure(2)
plot_field(solution.value, figure.axes[0], label="u")
plot_history(solution.stats["history"], figure.axes[1])
figure.savefig("obstacle.png")
print("wrote obstacle.png")

# %% [markdown]
# # Units: prey, and 30,000 times as many predators
#
# KINSOL's food web as a biologist would write it: three prey of some 1 and three predators of some
# 30,000 a node. The residual of the predators is 10⁹ at the start, that of the prey 1, and a norm
# of both sees the predators alone. `nks.Scaled` finds typical sizes at the start and gives the
# solver the problem in their units.

# %%
import os

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)

import nksolve as nks
from nksolve.plot import new_figure, plot_field
from nksolve.problems import get

SMALL = os.environ.get("NKSOLVE_EXAMPLES_SMALL") == "1"
n = 8 if SMALL else 20
problem = get("food-web", mx=n, scaled=False)


def fn(y, args):
    """The food web with a leaf for each kind, so that the history can tell them apart."""
    f = problem.fn(jnp.concatenate([y["prey"], y["predators"]], axis=-1), args)
    return {"prey": f[..., :3], "predators": f[..., 3:]}


y0 = {"prey": problem.y0[..., :3], "predators": problem.y0[..., 3:]}


def largest(f):
    return jnp.maximum(jnp.max(jnp.abs(f["prey"])), jnp.max(jnp.abs(f["predators"])))


newton = nks.NewtonKrylov(
    rtol=1e-12,
    atol=0,
    norm=largest,
    linear_solver=nks.GMRES(restart=60),
    history_length=nks.PerLeaf(80),
)

# %% [markdown]
# ## The same solver, with and without


# %%
def solve(solver):
    solution = nks.root_find(fn, solver, y0, problem.args, max_steps=80, throw=False)
    stats = solution.stats
    print(
        f"{type(solver).__name__:13s} {nks.reason_name(stats['reason']):13s} "
        f"{int(stats['num_steps']):3d} steps, {int(stats['num_rejected_steps']):3d} rejected, "
        f"{int(stats['num_matvecs']):5d} matvecs"
    )
    return solution


plain, scaled = solve(newton), solve(nks.Scaled(newton))
assert scaled.stats["num_rejected_steps"] == 0
assert int(scaled.stats["num_matvecs"]) < int(plain.stats["num_matvecs"])

# %% [markdown]
# What was found at the start: a unit for each unknown and each equation.

# %%
sizes = scaled.stats["scaling"]
for kind in ("prey", "predators"):
    unit, equation = sizes.unknowns[kind][0, 0, 0], sizes.residual[kind][0, 0, 0]
    print(f"{kind:10s} unknowns in units of {unit:g}, equations in units of {equation:g}")

# %% [markdown]
# To judge the residual in units of your own, give them. KINSOL's example stops where the prey's
# equations hold to 1e-7 and the predators' to 1e-2.

# %%
units = {"prey": 1.0, "predators": 1e5}
judged = nks.Scaled(
    nks.NewtonKrylov(0, 1e-7, norm=largest, linear_solver=nks.GMRES(restart=60)), residual=units
)
solution = solve(judged)
f = fn(solution.value, problem.args)
reached = {kind: f"{jnp.max(jnp.abs(part)):.1e}" for kind, part in f.items()}
print("largest residuals:", reached)
assert largest({k: f[k] / units[k] for k in f}) < 1e-7

# %%
figure = new_figure(2)
plot_field(solution.value["prey"][:, :, 0], figure.axes[0], label="the first prey")
axes = figure.axes[1]
for name, found, style in (("plain", plain, ":"), ("scaled", scaled, "-")):
    for place, norms in found.stats["history"].leaf_norms.items():
        axes.semilogy(norms / norms[0], style, label=f"{name}: {place}")
axes.set(xlabel="trial", ylabel="‖F‖ of the leaf over that at the start")
axes.legend()
figure.savefig("units.png")
print("wrote units.png")

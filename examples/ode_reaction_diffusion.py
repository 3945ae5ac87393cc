# %% [markdown]
# # An unknown reaction in a stiff reaction–diffusion equation
#
# Two substances on a line react and diffuse: y' = d ∂²y/∂x² + r(y). The diffusion is known; the
# reaction is a network, learned from noisy snapshots of both, on a grid whose diffusion alone would
# hold an explicit method to steps of 3e-4. `nks.ode.Kvaerno3` with a banded solver takes a few
# dozen steps, forward and in reverse, and holds no n × n matrix.

# %%
import os

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)

import diffrax as dfx
import equinox as eqx
import numpy as np
import optax
import optax.contrib
from scipy.integrate import solve_ivp
from tqdm import trange

import nksolve as nks
import nksolve.ode as ode
from nksolve.plot import new_figure

SMALL = os.environ.get("NKSOLVE_EXAMPLES_SMALL") == "1"
nodes, epochs = (24, 300) if SMALL else (300, 300)  # two unknowns a node
wanted = 0.1 if SMALL else 0.05  # error of the reaction, relative, where the data went
ends = jnp.array([[1.0, 3.0]])
diffusion, noise = 0.02, 0.01
x = jnp.arange(1, nodes + 1) / (nodes + 1)
ts = jnp.linspace(0.0, 4.0, 17)

# %% [markdown]
# The reaction that made the data is the Brusselator's, solved by SciPy from three starts.


# %%
def brusselator(y):
    u, v = y
    return jnp.stack([1.0 + u * u * v - 4.0 * u, 3.0 * u - u * u * v])


def field(t, y, reaction):
    del t
    wide = jnp.concatenate([ends, y, ends])
    flux = diffusion * (nodes + 1) ** 2 * (wide[2:] - 2.0 * y + wide[:-2])
    return flux + jax.vmap(reaction)(y)


waves = jnp.array([1.0, 2.0, 3.0])[:, None]
y0s = jnp.stack([1.0 + 0.5 * jnp.sin(waves * jnp.pi * x), 3.0 - 0.0 * waves * x], axis=-1)
flat = jax.jit(lambda t, y: field(t, y.reshape(-1, 2), brusselator).reshape(-1))
options = {"method": "LSODA", "lband": 2, "uband": 2, "rtol": 1e-8, "atol": 1e-8}
trajectories = [
    solve_ivp(flat, (0.0, float(ts[-1])), np.ravel(y0), t_eval=np.asarray(ts), **options).y.T
    for y0 in y0s
]
clean = jnp.asarray(np.stack(trajectories)).reshape(3, -1, nodes, 2)
data = clean + noise * jax.random.normal(jax.random.key(1), clean.shape)

# %% [markdown]
# The network sees whitened concentrations (of unit variance and uncorrelated: here u and v move
# against each other), and its outputs are in units of the rates that the snapshots show. So it
# starts with values and slopes of the right size.

# %%
mean = jnp.mean(data, axis=(0, 1, 2))
variances, directions = jnp.linalg.eigh(jnp.cov(data.reshape(-1, 2).T))
whiten = directions / jnp.sqrt(variances)
rate = jnp.std(jnp.diff(data, axis=1), axis=(0, 1, 2)) / (ts[1] - ts[0])


class Reaction(eqx.Module):
    network: eqx.nn.MLP

    def __call__(self, y):
        return rate * self.network((y - mean) @ whiten)


# %% [markdown]
# A trajectory of a wrong reaction leaves the data early, and what it meets later teaches little. So
# the horizon grows: from the first eight snapshots to all in the first third of the epochs. Times
# past the horizon are moved onto it and weigh nothing: one compiled program serves all horizons,
# and a short one costs few steps. Muon, Adam on biases, orthogonalises the updates of matrices.


# %%
def solve(reaction, y0, ts):
    return dfx.diffeqsolve(
        dfx.ODETerm(field),
        ode.Kvaerno3(linear_solver=nks.BandedDirect(block=2)),
        0.0,
        ts[-1],
        1e-3,
        y0,
        reaction,
        saveat=dfx.SaveAt(ts=ts),
        stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-3),
        max_steps=256,
    )


def loss(reaction, shown):
    inside = jnp.arange(1, ts.size) <= shown
    saved = jnp.minimum(ts[1:], ts[shown])
    sol = jax.vmap(lambda y0: solve(reaction, y0, saved))(y0s)
    misfit = jnp.mean((sol.ys - data[:, 1:]) ** 2, axis=(0, 2, 3))
    mean = jnp.sum(jnp.where(inside, misfit, 0.0)) / shown
    return mean, (sol.ys, sol.stats["num_steps"])


optimiser = optax.contrib.muon(optax.cosine_decay_schedule(5e-2, epochs, alpha=0.01))


@eqx.filter_jit
def step(reaction, state, shown):
    (value, aux), grads = eqx.filter_value_and_grad(loss, has_aux=True)(reaction, shown)
    updates, state = optimiser.update(grads, state, eqx.filter(reaction, eqx.is_inexact_array))
    return value, aux, eqx.apply_updates(reaction, updates), state


reaction = Reaction(eqx.nn.MLP(2, 2, 24, 2, activation=jax.nn.gelu, key=jax.random.key(0)))
state = optimiser.init(eqx.filter(reaction, eqx.is_inexact_array))
losses = []
for epoch in (bar := trange(epochs)):
    shown = min(8 + 24 * epoch // epochs, ts.size - 1)
    value, (ys, steps), reaction, state = step(reaction, state, jnp.asarray(shown))
    losses.append(float(value))
    bar.set_postfix(loss=f"{value:.2e}", horizon=f"{ts[shown]:.2f}", steps=int(max(steps)))

# %% [markdown]
# How well the reaction is known where the data went.

# %%
visited = clean.reshape(-1, 2)
true, learned = (jax.vmap(r)(visited) for r in (brusselator, reaction))
error = float(jnp.linalg.norm(learned - true) / jnp.linalg.norm(true))
print(f"{2 * nodes} unknowns, at most {int(max(steps))} steps a trajectory")
print(f"mean square of the misfit {losses[0]:.2e} -> {losses[-1]:.2e} (noise {noise**2:.0e})")
print(f"error of the reaction {error:.4f}")
assert error < wanted

# %%
figure = new_figure(2)
left, right = figure.axes
for i in (1, 4, 8, 16):
    left.plot(x, data[0, i, :, 0], ".", color="0.7", markersize=2)
    left.plot(x, ys[0, i - 1, :, 0], label=f"t = {float(ts[i]):.2g}")
left.set_xlabel("x")
left.set_ylabel("u")
left.legend(fontsize=8)
right.semilogy(np.asarray(losses))
right.axhline(noise**2, color="0.5", linestyle="--", label="noise")
right.set_xlabel("epoch")
right.set_ylabel("mean square of the misfit")
right.legend(fontsize=8)
figure.suptitle(f"A learned reaction, {2 * nodes} unknowns: error {100 * error:.1f} %")
figure.savefig("ode_reaction_diffusion.png")
print("wrote ode_reaction_diffusion.png")

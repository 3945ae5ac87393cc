# %% [markdown]
# # A latent neural ODE: Van der Pol oscillators seen at irregular times
#
# Each of 64 oscillators is seen through one noisy coordinate, at its own irregular times. A
# recurrent encoder reads the first part of a record backwards and gives a latent state at its
# start; the latent ODE carries it through all times; a decoder maps it to what was seen. The latent
# dynamics have rates of their own, from slow to 1e3, and are stiff; `nks.ode.Kvaerno3` solves all
# records together under `vmap`, each with its own steps.

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
records, epochs = (64, 130) if SMALL else (64, 1500)
seen, trained, end = 5.0, 8.0, 12.0  # read by the encoder, fitted, and predicted up to
wanted = (0.8, 0.9) if SMALL else (0.45, 0.45)  # errors up to `trained`, and after it
noise, latent, hidden = 0.02, 4, 32

# %% [markdown]
# The data: u'' = 2 (1 − u²) u' − u from random starts, u with noise at 60 random times in [0, 12].
# A quarter of the records is kept out of training.


# %%
def van_der_pol(t, y):
    del t
    return [y[1], 2.0 * (1.0 - y[0] ** 2) * y[1] - y[0]]


keys = jax.random.split(jax.random.key(0), 5)
y0s = jax.random.uniform(keys[0], (records, 2), minval=-2.0, maxval=2.0)
ts = jnp.sort(jax.random.uniform(keys[1], (records, 60), maxval=end), axis=1)
orbits = [
    solve_ivp(van_der_pol, (0.0, end), y0, t_eval=t, rtol=1e-8, atol=1e-8).y[0]
    for y0, t in zip(np.asarray(y0s), np.asarray(ts), strict=True)
]
clean = jnp.asarray(np.stack(orbits))
data = clean + noise * jax.random.normal(keys[2], clean.shape)
kept_out = jnp.arange(records) < records // 4

# %% [markdown]
# The latent ODE is z' = λ (g(z) − z), with a network g and trained rates λ, which start between 0.5
# and 1000: a fast component soon equals its g(z), and is slaved to the slow ones.


# %%
class LatentODE(eqx.Module):
    cell: eqx.nn.GRUCell
    to_latent: eqx.nn.Linear
    g: eqx.nn.MLP
    log_rates: jax.Array
    decoder: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.cell = eqx.nn.GRUCell(2, hidden, key=keys[0])
        self.to_latent = eqx.nn.Linear(hidden, latent, key=keys[1])
        self.g = eqx.nn.MLP(latent, latent, hidden, 2, jnp.tanh, key=keys[2])
        self.log_rates = jnp.log(jnp.array([0.5, 1.0, 2.0, 1000.0]))
        self.decoder = eqx.nn.MLP(latent, 1, hidden, 1, jnp.tanh, key=keys[3])

    def encode(self, ts, us):
        """z at t = 0, from what was seen in [0, `seen`]: other entries leave the memory alone."""

        def read(memory, entry):
            t, u, gap = entry
            new = self.cell(jnp.stack([gap, u]), memory)
            return jnp.where((t >= 0.0) & (t <= seen), new, memory), None

        gaps = jnp.diff(jnp.maximum(ts, 0.0), prepend=0.0)
        memory, _ = jax.lax.scan(read, jnp.zeros(hidden), (ts, us, gaps), reverse=True)
        return self.to_latent(memory)

    def field(self, t, z, args):
        del t, args
        return jnp.exp(self.log_rates) * (self.g(z) - z)

    def __call__(self, ts, us, until):
        """What would be seen at `ts`; times outside [0, until] are moved to its ends."""
        z0 = self.encode(ts, us)
        sol = dfx.diffeqsolve(
            dfx.ODETerm(self.field),
            ode.Kvaerno3(linear_solver=nks.BandedDirect(block=latent)),
            0.0,
            until,
            1e-2,
            z0,
            saveat=dfx.SaveAt(ts=jnp.clip(ts, 0.0, until)),
            stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-3),
            max_steps=1024,
        )
        return jax.vmap(self.decoder)(sol.ys)[:, 0], sol.stats["num_steps"]


# %% [markdown]
# The clocks of a record say nothing about the oscillator: in each epoch each record starts at a
# random time of its own, so that the encoder meets more starts than 48. Training fits eight
# units of time from there, of which the encoder reads the first five. The horizon grows to eight in
# the first half of the epochs.


# %%
def loss(model, until, shifts):
    clocks = ts - shifts[:, None]
    seen_as, steps = jax.vmap(lambda t, u: model(t, u, until))(clocks, data)
    fitted = (clocks >= 0.0) & (clocks <= until) & ~kept_out[:, None]
    return jnp.mean((seen_as - data) ** 2, where=fitted), (seen_as, steps)


schedule = optax.cosine_decay_schedule(3e-2, epochs, alpha=0.01)
optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.contrib.muon(schedule))


@eqx.filter_jit
def step(model, state, until, shifts):
    (value, aux), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model, until, shifts)
    updates, state = optimiser.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return value, aux, eqx.apply_updates(model, updates), state


model = LatentODE(keys[3])
state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
losses, rng = [], np.random.default_rng(0)
for epoch in (bar := trange(epochs)):
    until = min(1.0 + 14.0 * epoch / epochs, trained)
    shifts = jnp.asarray(rng.uniform(0.0, end - trained, records))
    value, (_, steps), model, state = step(model, state, jnp.asarray(until), shifts)
    losses.append(float(value))
    bar.set_postfix(loss=f"{value:.2e}", horizon=f"{until:.1f}", steps=int(max(steps)))

# %% [markdown]
# Root mean square errors on the records kept out, against u without noise.

# %%
_, (predicted, _), _, _ = step(model, state, jnp.asarray(end), jnp.zeros(records))
spread = float(jnp.std(clean))


def error_between(start, stop, rows=kept_out):
    inside = (ts > start) & (ts <= stop) & rows[:, None]
    return float(jnp.sqrt(jnp.mean((predicted - clean) ** 2, where=inside)))


print(f"loss {losses[0]:.2e} -> {losses[-1]:.2e} (noise alone {noise**2:.0e})")
print(f"rates of the latent ODE {np.round(np.exp(model.log_rates), 2)}")
print(f"errors, where u has a spread of {spread:.2f}, on records kept out of training:")
reconstruction, extrapolation = error_between(0.0, trained), error_between(trained, end)
print(f"  up to t = {seen:.0f}, read by the encoder {error_between(0.0, seen):.3f}")
print(f"  up to t = {trained:.0f} {reconstruction:.3f}")
print(f"  from {trained:.0f} to {end:.0f}, longer than any horizon trained on {extrapolation:.3f}")
print(f"  (records trained on: {error_between(0.0, trained, ~kept_out):.3f} up to {trained:.0f})")
assert reconstruction < wanted[0]
assert extrapolation < wanted[1]

# %%
figure = new_figure(2)
left, right = figure.axes
for i, colour in zip(range(3), ("C0", "C1", "C2"), strict=True):
    left.plot(ts[i], data[i], ".", color=colour, markersize=4)
    left.plot(ts[i], predicted[i], color=colour, linewidth=1)
left.axvline(seen, color="0.7", linestyle=":")
left.axvline(trained, color="0.7", linestyle="--")
left.set_xlabel("t")
left.set_ylabel("u, records kept out")
right.semilogy(np.asarray(losses))
right.axhline(noise**2, color="0.5", linestyle="--", label="noise")
right.set_xlabel("epoch")
right.set_ylabel("mean square of the misfit")
right.legend(fontsize=8)
figure.suptitle(f"Latent ODE: error {reconstruction:.2f}, extrapolated {extrapolation:.2f}")
figure.savefig("ode_latent.png")
print("wrote ode_latent.png")

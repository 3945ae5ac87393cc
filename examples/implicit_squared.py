# %% [markdown]
# # (Implicit)²: a picture as the equilibrium of a network
#
# An implicit neural representation is a function from coordinates to intensity, trained on one
# picture. Here its hidden layer is implicit too: z = sin(W z + U x + b) at every point x. The batch
# is the whole picture in every training step, so that the last equilibria are where the next ones
# are sought; the matvecs of a step fall to one, then below: z still meets its tolerance.
#
# Huang, Bai & Kolter, *(Implicit)²: implicit layers for implicit representations*, NeurIPS 2021.

# %%
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nksolve as nks
from nksolve.plot import new_figure, plot_field

SMALL = os.environ.get("NKSOLVE_EXAMPLES_SMALL") == "1"
side, width, steps, rate = (16, 32, 200, 1e-2) if SMALL else (64, 64, 400, 3e-3)
wanted_psnr = 30.0 if SMALL else 34.0  # dB
frequency, bound = 12.0, 0.6

# %% [markdown]
# The picture: two gratings, of which one is bent, a bright disc and a dark one.

# %%
line = jnp.linspace(-1, 1, side)
x1, x2 = jnp.meshgrid(line, line, indexing="ij")
points = jnp.stack([x1.ravel(), x2.ravel()], axis=-1)


def disc(c1, c2, radius):
    return jax.nn.sigmoid(25 * (radius - jnp.hypot(x1 - c1, x2 - c2)))


gratings = 0.2 * jnp.sin(9 * x1 + 4 * x2) * jnp.cos(5 * x2 - 3 * x1**2)
picture = 0.4 + gratings + 0.35 * disc(0.3, 0.35, 0.4) - 0.3 * disc(-0.4, -0.3, 0.3)

# %% [markdown]
# |sin′| ≤ 1, so that ‖W‖₂ ≤ 0.6 makes the cell a contraction and the equilibrium unique. The bound
# holds by construction: W is rescaled, outside of the solve, where a step of training exceeds it.
#
# All points are one system (`nks.Joint`): one Krylov vector holds the z of every point. GMRES of a
# few steps is enough. `GCRODR` could not get down to one matvec a step: a recycled space of k
# vectors costs k of them whenever J has changed. The gradient needs no more accuracy than training
# does: one digit.


# %%
class Cell(eqx.Module):
    recurrent: jax.Array
    inward: jax.Array
    bias: jax.Array

    def __call__(self, z, x):
        return jnp.sin(self.recurrent @ z + self.inward @ x + self.bias)


reports = []  # on the solves for gradients
krylov, forcing = nks.GMRES(restart=4), nks.ConstantForcing(0.3)
solver = nks.NewtonKrylov(rtol=0.0, atol=1e-3, linear_solver=krylov, forcing=forcing)
adjoint = nks.KrylovAdjoint(rtol=0.1, report=reports.append)


class Model(eqx.Module):
    cell: Cell
    outward: jax.Array
    offset: jax.Array

    def __init__(self, width, *, key):
        w_key, u_key, b_key, out_key = jax.random.split(key, 4)
        self.cell = Cell(
            jax.random.normal(w_key, (width, width)) / width**0.5,
            frequency * jax.random.normal(u_key, (width, 2)),
            jax.random.uniform(b_key, (width,), minval=-jnp.pi, maxval=jnp.pi),
        )
        self.outward = jax.random.normal(out_key, (width,)) / width
        self.offset = jnp.zeros(())

    def __call__(self, points, z0):
        excess = jnp.maximum(jnp.linalg.norm(self.cell.recurrent, 2) / bound, 1.0)
        cell = eqx.tree_at(lambda c: c.recurrent, self.cell, self.cell.recurrent / excess)
        layer = nks.ImplicitLayer(cell, solver, adjoint, nks.Joint())
        z, info = layer(points, z0)
        return z @ self.outward + self.offset, z, info


# %%
def loss_fn(model, z0):
    prediction, z, info = model(points, z0)
    return jnp.mean((prediction - picture.ravel()) ** 2), (prediction, z, info)


optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps, alpha=3e-4 / rate))


@eqx.filter_jit
def train(model, state, z0):
    value_and_grad = eqx.filter_value_and_grad(loss_fn, has_aux=True)
    (loss, (prediction, z, info)), gradient = value_and_grad(model, z0)
    updates, state = optimiser.update(gradient, state)
    return eqx.apply_updates(model, updates), state, z, prediction, -10 * jnp.log10(loss), info


# %% [markdown]
# The warm start is `z`, passed on. Every tenth step is also taken from z₀ = 0, at the same weights,
# and thrown away: it shows what a cold start costs.

# %%
model = Model(width, key=jax.random.key(0))
state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
zero = jnp.zeros((side**2, width))
z, warm, cold = zero, [], []
print(f"{'step':>5} {'PSNR':>8}   matvecs of a step: {'warm':>5} {'cold':>5}")
for step in range(steps):
    if step % 10 == 0:
        *_, info = train(model, state, zero)
        cold.append(int(info.stats["num_matvecs"]))
    model, state, z, prediction, psnr, info = train(model, state, z)
    assert info.success.all()
    warm.append(int(info.stats["num_matvecs"]))
    if step % (steps // 10) == 0 or step == steps - 1:
        recent = np.mean(warm[-10:])
        print(f"{step:5d} {float(psnr):5.1f} dB {recent:25.1f} {cold[-1]:5d}")

jax.effects_barrier()
late = np.mean(warm[-steps // 10 :])
print(f"\nmatvecs of a step, mean of the last tenth: {late:.2f} warm, {cold[-1]} cold")
print(f"of the last gradient: {reports[-1].num_matvecs}, of them 2 for the report")
assert psnr >= wanted_psnr
assert late <= 1.5
assert late < cold[-1] / 3

# %%
figure = new_figure(3)
figure.axes[0].plot(10 * np.arange(len(cold)), cold, label="from zero")
figure.axes[0].plot(warm, label="from the last z")
figure.axes[0].set(xlabel="training step", ylabel="matvecs", ylim=(0, None))
figure.axes[0].legend(title="Newton–GMRES", frameon=False)
plot_field(picture, figure.axes[1], label="picture")
plot_field(prediction.reshape(side, side), figure.axes[2], label="its representation")
figure.suptitle(f"(Implicit)²: {side} × {side} points, {width} units, {float(psnr):.1f} dB")
figure.savefig("implicit_squared.png")
print("wrote implicit_squared.png")

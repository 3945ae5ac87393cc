# %% [markdown]
# # A layer defined by an equation
#
# An equilibrium layer returns the z with z = tanh(W z + U x + b). `nks.root_find` solves for it;
# its gradient is one transposed Krylov solve, whatever the number of iterations that found z.
# The layer sits in an Equinox module, and Optax trains it.

# %%
import os

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)

import equinox as eqx
import optax

import nksolve as nks

SMALL = os.environ.get("NKSOLVE_EXAMPLES_SMALL") == "1"
steps = 12 if SMALL else 120
batch, width = (32, 8) if SMALL else (256, 32)


def equilibrium(z, args):
    """Zero at the equilibrium; z of shape (batch, width) is one unknown."""
    layer, x = args
    return z - jnp.tanh(z @ layer.recurrent.T + x @ layer.inward.T + layer.bias)


class EquilibriumLayer(eqx.Module):
    recurrent: jax.Array
    inward: jax.Array
    bias: jax.Array
    solver: nks.NewtonKrylov = eqx.field(static=True)

    def __init__(self, inputs, width, *, key):
        w_key, u_key = jax.random.split(key)
        self.recurrent = 0.5 * jax.random.normal(w_key, (width, width)) / width**0.5
        self.inward = jax.random.normal(u_key, (width, inputs))
        self.bias = jnp.zeros(width)
        self.solver = nks.NewtonKrylov(rtol=1e-6, atol=1e-8, linear_solver=nks.GMRES(restart=20))

    def __call__(self, x):
        z0 = jnp.zeros((x.shape[0], self.bias.shape[0]))
        solution = nks.root_find(equilibrium, self.solver, z0, (self, x))
        return solution.value, solution.stats


class Model(eqx.Module):
    layer: EquilibriumLayer
    outward: jax.Array

    def __init__(self, inputs, width, *, key):
        layer_key, out_key = jax.random.split(key)
        self.layer = EquilibriumLayer(inputs, width, key=layer_key)
        self.outward = jax.random.normal(out_key, (width,)) / width**0.5

    def __call__(self, x):
        z, stats = self.layer(x)
        return z @ self.outward, stats


# %% [markdown]
# Data: y = sin(x₁ x₂ + x₃).

# %%
x_key, model_key = jax.random.split(jax.random.key(0))
x = jax.random.normal(x_key, (batch, 3))
y = jnp.sin(x[:, 0] * x[:, 1] + x[:, 2])
model = Model(3, width, key=model_key)
optimiser = optax.adam(1e-2)
state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))


def loss_fn(model, x, y):
    prediction, stats = model(x)
    return jnp.mean((prediction - y) ** 2), stats


@eqx.filter_jit
def train(model, state, x, y):
    (loss, stats), gradient = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, x, y)
    updates, state = optimiser.update(gradient, state)
    return eqx.apply_updates(model, updates), state, loss, stats


# %% [markdown]
# An evaluation of the layer's map costs one evaluation per Newton step and one at the start. The
# gradient adds none: the linearisation at the root is kept.

# %%
print(f"{'step':>5} {'loss':>10} {'evaluations of fn':>18} {'matvecs':>8}")
losses = []
for step in range(steps + 1):
    model, state, loss, stats = train(model, state, x, y)
    losses.append(float(loss))
    if step % max(1, steps // 12) == 0:
        print(
            f"{step:5d} {losses[-1]:10.5f} {int(stats['num_fn_evals']):18d} "
            f"{int(stats['num_matvecs']):8d}"
        )
assert losses[-1] < 0.5 * losses[0]

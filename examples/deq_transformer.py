# %% [markdown]
# # A transformer block, applied until it no longer changes anything
#
# One block of attention and MLP, whose output z is its own input: as deep as it needs to be, with
# the weights of one block. It learns to sort strings of symbols. A batch is one system, solved by
# Newton–Krylov; what a training step costs is printed.

# %%
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nksolve as nks
from nksolve.plot import new_figure, plot_history

SMALL = os.environ.get("NKSOLVE_EXAMPLES_SMALL") == "1"
symbols, length, batch, steps = (4, 5, 32, 100) if SMALL else (8, 8, 64, 400)
stated = 0.8 if SMALL else 0.95  # of the symbols of strings that it was not trained on
width, heads = 32, 4


# %% [markdown]
# The cell is of one string: z and the input x, the embedded symbols, are (length, width). z enters
# through the attention alone, x is added beside it (the injection).


# %%
class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm]

    def __init__(self, *, key):
        attention_key, mlp_key = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=attention_key)
        self.mlp = eqx.nn.MLP(width, width, 2 * width, 1, jax.nn.gelu, key=mlp_key)
        self.norms = (eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width))

    def __call__(self, z, x):
        h = jax.vmap(self.norms[0])(x + self.attention(z, z, z))
        return jax.vmap(self.norms[1])(h + jax.vmap(self.mlp)(h))


class Model(eqx.Module):
    symbols: jax.Array
    places: jax.Array
    layer: nks.ImplicitLayer
    outward: eqx.nn.Linear

    def __init__(self, adjoint, *, key):
        keys = jax.random.split(key, 4)
        self.symbols = jax.random.normal(keys[0], (symbols, width))
        self.places = jax.random.normal(keys[1], (length, width))
        krylov = nks.GMRES(restart=20)
        self.layer = nks.ImplicitLayer(
            Block(key=keys[2]),
            nks.NewtonKrylov(1e-3, 1e-3, linear_solver=krylov, history_length=30),
            adjoint,
            nks.Joint(),
            guess=lambda x: x,
            max_steps=30,
        )
        self.outward = eqx.nn.Linear(width, symbols, key=keys[3])

    def __call__(self, tokens):
        x = self.symbols[tokens] + self.places
        z, info = self.layer(x)
        return jax.vmap(jax.vmap(self.outward))(z), z, x, info


# %% [markdown]
# Nothing bounds the attention: training may lead to where the equilibrium is lost. A penalty
# on ‖∂cell/∂z‖ holds it back (Bai, Koltun & Kolter, 2021), estimated by one product of the
# transpose with noise; a step whose gradient is not finite is left out.

# %%
adam = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
optimiser = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), adam), 10)
backward = []


def squared_jacobian(cell, z, x, key):
    """‖∂cell/∂z‖²_F for each unknown."""
    _, transposed = jax.vjp(lambda z: jax.vmap(cell)(z, x), jax.lax.stop_gradient(z))
    (product,) = transposed(jax.random.normal(key, z.shape))
    return jnp.mean(product**2)


@eqx.filter_value_and_grad(has_aux=True)
def loss_fn(model, tokens, key):
    logits, z, x, info = model(tokens)
    target = jnp.sort(tokens, axis=1)
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, target))
    penalty = 10.0 * squared_jacobian(model.layer.cell, z, x, key)
    return loss + penalty, (loss, jnp.mean(jnp.argmax(logits, axis=-1) == target), info)


@eqx.filter_jit
def train(model, state, key):
    tokens_key, noise_key = jax.random.split(key)
    tokens = jax.random.randint(tokens_key, (batch, length), 0, symbols)
    (_, (loss, accuracy, info)), gradient = loss_fn(model, tokens, noise_key)
    updates, state = optimiser.update(gradient, state)
    names = ("num_steps", "num_fn_evals", "num_matvecs")
    row = [loss, accuracy, *(info.stats[name] for name in names)]
    return eqx.apply_updates(model, updates), state, row, info


# %% [markdown]
# Columns: Newton steps, evaluations of the cell (one for each trial point, one at the start),
# matvecs forward, and those of the transposed solve for the gradient (two are of its report).

# %%
adjoint = nks.KrylovAdjoint(report=lambda report: backward.append(report.num_matvecs))
model = Model(adjoint, key=jax.random.key(0))
state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
print(" step     loss  accuracy  Newton  evals  forward  backward")
rows, histories = [], {}
for step, key in enumerate(jax.random.split(jax.random.key(1), steps)):
    model, state, row, info = train(model, state, key)
    jax.effects_barrier()  # the report has arrived
    rows.append([*map(float, row), backward[-1], float(jnp.mean(info.success))])
    if step % (steps // 5) == 0 or step == steps - 1:
        print("{:5d} {:8.4f} {:9.3f} {:7.0f} {:6.0f} {:8.0f} {:9.0f}".format(step, *rows[-1]))
        histories[step] = info.stats["history"]
rows = np.array(rows)

# %%
# Every step has strings of its own, new to the model when it answers. Of a solve that fails the
# point of least residual is used.
last = rows[-10:]
print(f"\n{np.mean(last[:, 1]):.1%} of the symbols right in the last {10 * batch} strings")
print(f"{np.mean(rows[:, -1]):.1%} of all solves met the tolerance")
assert np.mean(last[:, 1]) >= stated
assert np.mean(rows[:, -1]) >= 0.9

# %%
figure = new_figure(2)
left, right = figure.axes
left.plot(rows[:, 0], color="tab:blue", label="loss")
left.set(xlabel="training step", ylabel="loss", ylim=(0, None))
twin = left.twinx()
twin.plot(rows[:, 1], color="tab:orange")
left.plot([], [], color="tab:orange", label="accuracy")
twin.set(ylabel="accuracy", ylim=(0, 1.02))
left.legend(frameon=False, loc="center right")
for step, history in histories.items():
    plot_history(history, right, label=f"step {step}")
right.set_title("one solve for the batch", fontsize=10)
figure.savefig("deq_transformer.png")
print("wrote deq_transformer.png")

# %% [markdown]
# # Two spirals, told apart by an equilibrium
#
# One layer, applied until nothing changes: z = tanh(W z + U x + b). The weights are parametrised so
# that exactly one z solves this whatever they become, although repeating the cell need not find it.
# Newton–Krylov does, for all points as one system. The table counts what a training step costs.

# %%
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import nksolve as nks
from nksolve.plot import new_figure

SMALL = os.environ.get("NKSOLVE_EXAMPLES_SMALL") == "1"
count, turns, steps, grid = (128, 1.0, 40, 24) if SMALL else (512, 1.75, 250, 60)
stated = 0.9 if SMALL else 0.99  # accuracy, on points that it was not trained on
width = 32


# %% [markdown]
# With W = (1 − m) I − AᵀA + B − Bᵀ the symmetric part of I − W is at least m > 0: the root is
# unique for any A and B (Winston & Kolter, 2020). Training pushes eigenvalues of W far below −1.
# The cell is of one point.


# %%
class Cell(eqx.Module):
    a: jax.Array
    b: jax.Array
    inward: eqx.nn.Linear

    def recurrent(self):
        return 0.9 * jnp.eye(width) - self.a.T @ self.a + self.b - self.b.T

    def __call__(self, z, x):
        return jnp.tanh(self.recurrent() @ z + self.inward(x))


class Model(eqx.Module):
    layer: nks.ImplicitLayer
    outward: eqx.nn.Linear

    def __call__(self, x):
        z, info = self.layer(x)
        return jax.vmap(self.outward)(z)[:, 0], info


def make_model(adjoint, *, key):
    w_key, u_key, out_key = jax.random.split(key, 3)
    a, b = 0.5 * jax.random.normal(w_key, (2, width, width)) / width**0.5
    cell = Cell(a, b, eqx.nn.Linear(2, width, key=u_key))
    solver = nks.NewtonKrylov(rtol=1e-4, atol=1e-4, linear_solver=nks.GMRES(restart=20))
    zeros = lambda x: jnp.zeros(width)
    layer = nks.ImplicitLayer(cell, solver, adjoint, nks.Joint(), guess=zeros)
    return Model(layer, eqx.nn.Linear(width, 1, key=out_key))


def spirals(*, key):
    """Points on two arms, half a turn apart, and the arm of each."""
    t_key, noise_key = jax.random.split(key)
    t = jnp.sqrt(jax.random.uniform(t_key, (count,), minval=0.02))
    arm = jnp.arange(count) % 2
    angle = jnp.pi * (2 * turns * t + arm)
    x = 2 * t[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return x + 0.02 * jax.random.normal(noise_key, x.shape), arm


# %% [markdown]
# With K Newton steps and no rejected trial the cell is evaluated K + 1 times in a training step,
# forward and backward: neither a matvec nor the gradient evaluates it. The gradient is one solve
# with the transpose, whose report tells its matvecs (two of them made the report).

# %%
data_key, test_key, model_key = jax.random.split(jax.random.key(0), 3)
x, arm = spirals(key=data_key)
x_test, arm_test = spirals(key=test_key)
optimiser = optax.adam(optax.cosine_decay_schedule(2e-2, steps))
fresh = lambda model: optimiser.init(eqx.filter(model, eqx.is_inexact_array))
backward = []


@eqx.filter_value_and_grad(has_aux=True)
def loss_and_gradient(model):
    logit, info = model(x)
    loss = jnp.mean(optax.sigmoid_binary_cross_entropy(logit, arm))
    counts = [info.stats[name] for name in ("num_steps", "num_fn_evals", "num_matvecs")]
    return loss, [loss, jnp.mean((logit > 0) == arm), *counts]


@eqx.filter_jit
def train_step(model, state):
    (_, row), gradient = loss_and_gradient(model)
    updates, state = optimiser.update(gradient, state)
    return eqx.apply_updates(model, updates), state, row, gradient


def train(model):
    state, rows = fresh(model), []
    for _ in range(steps):
        model, state, row, _ = train_step(model, state)
        rows.append([float(value) for value in row])
    jax.effects_barrier()  # the reports have arrived
    return model, np.array(rows)


exact = nks.KrylovAdjoint(report=lambda report: backward.append(report.num_matvecs))
start = make_model(exact, key=model_key)
model, rows = train(start)
rows = np.column_stack([rows, backward])
print(" step     loss  accuracy Newton  evals  forward backward")
for i in sorted({*range(0, steps, steps // 8), steps - 1}):
    print("{:5d} {:8.4f} {:9.3f} {:6.0f} {:6.0f} {:8.0f} {:8.0f}".format(i, *rows[i]))

# %%
# New points, and a grid for the picture, in one solve.
side = jnp.linspace(-2.4, 2.4, grid)
nodes = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)
logit, info = eqx.filter_jit(model)(jnp.concatenate([x_test, nodes]))
accuracy = float(jnp.mean((logit[:count] > 0) == arm_test))
lowest = np.linalg.eigvals(np.asarray(model.layer.cell.recurrent())).real.min()
print(f"\naccuracy on {count} new points {accuracy:.3f}; eigenvalues of W down to {lowest:.1f}")
assert accuracy >= stated
assert bool(jnp.all(info.success))

# %%
# `OneStep` does without the solve: it takes J⁻¹ for −I, as if the cell contracted strongly.
one_step = lambda model: eqx.tree_at(lambda m: m.layer.adjoint, model, nks.OneStep())
print("\nthe gradient of OneStep against the exact one")
for name, m in {"before training": start, "after training": model}.items():
    g, rough = (ravel_pytree(train_step(n, fresh(n))[3])[0] for n in (m, one_step(m)))
    ratio = jnp.linalg.norm(rough) / jnp.linalg.norm(g)
    print(f"{name:16} cosine {g @ rough / (g @ g) / ratio:.2f}, ratio of lengths {ratio:.2f}")
rough_loss = train(one_step(start))[1][-1, 0]
print(f"loss after training: OneStep {rough_loss:.4f}, exact {rows[-1, 0]:.4f}")

# %%
figure = new_figure(2)
left, right = figure.axes
probability = jax.nn.sigmoid(logit[count:]).reshape(grid, grid)
left.contourf(side, side, probability, levels=np.linspace(0, 1, 11), cmap="RdBu", alpha=0.7)
left.contour(side, side, probability, levels=[0.5], colors="k", linewidths=1)
left.scatter(*x_test.T, c=np.asarray(arm_test), cmap="RdBu", s=8, edgecolors="k", linewidths=0.3)
left.set(aspect="equal", title=f"{accuracy:.1%} of {count} new points", xlabel="x₁", ylabel="x₂")
for column, name in ((4, "matvecs forward"), (5, "matvecs backward"), (3, "cell evaluations")):
    right.plot(rows[:, column], label=name)
right.set(xlabel="training step", ylabel="count, all points as one system", ylim=(0, None))
right.legend(frameon=False)
figure.savefig("deq_spirals.png")
print("\nwrote deq_spirals.png")

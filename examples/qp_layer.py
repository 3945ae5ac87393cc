# %% [markdown]
# # A layer that is a quadratic programme
#
# Generators share a demand d at the least cost: minimise ½ xᵀQx + (q + c)ᵀx subject to Σx = d and
# 0 ≤ x ≤ h. The layer returns the dispatch x(q, d) with its multipliers, the root of the optimality
# conditions. The costs c, which nobody tells, are learned from dispatches: inverse optimisation.

# %%
import os

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)

import equinox as eqx
import numpy as np
import optax
from scipy.optimize import minimize

import nksolve as nks
from nksolve.plot import new_figure, plot_history

SMALL = os.environ.get("NKSOLVE_EXAMPLES_SMALL") == "1"
n, days, steps = (4, 32, 120) if SMALL else (6, 128, 300)
stated = 2e-2 if SMALL else 2e-3  # the largest error of a learned cost; costs are of order 1

# %% [markdown]
# The data: SciPy's SLSQP, which knows nothing of the layer's equations, minimises for each day.

# %%
rng = np.random.default_rng(0)
factor = rng.normal(size=(n, n))
Q = 0.2 * factor @ factor.T / n + np.diag(rng.uniform(0.5, 1.5, n))
capacity = rng.uniform(0.5, 1.5, n)
true_cost = rng.normal(size=n)
true_cost -= true_cost.mean()  # a constant more for all changes no dispatch
prices = rng.uniform(0.0, 2.0, (days, n))
demands = rng.uniform(0.3, 0.8, (days, 1)) * capacity.sum()


def dispatch(q, demand):
    """The minimiser of one day."""
    return minimize(
        lambda x: 0.5 * x @ Q @ x + (q + true_cost) @ x,
        np.full(n, demand[0] / n),
        jac=lambda x: Q @ x + q + true_cost,
        bounds=[(0, h) for h in capacity],
        constraints={"type": "eq", "fun": lambda x: x.sum() - demand[0], "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 200},
    ).x


observed = jnp.array([dispatch(*day) for day in zip(prices, demands, strict=True)])
inputs = (jnp.array(prices), jnp.array(demands))

# %% [markdown]
# An inequality s = h − Gx ≥ 0 with multiplier λ ≥ 0 and λs = 0 becomes one smooth equation, the
# Fischer–Burmeister function λ + s − √(λ² + s² + 2ε²) = 0, whose roots have λ, s > 0 and λs = ε².

# %%
epsilon = 1e-4
G = jnp.concatenate([jnp.eye(n), -jnp.eye(n)])
h = jnp.concatenate([jnp.array(capacity), jnp.zeros(n)])


class Conditions(eqx.Module):
    """Zero at the optimum z = (x, ν, λ) of one day; Q and h are known, the cost is learned."""

    cost: jax.Array

    def __call__(self, z, day):
        x, nu, lam = z
        q, demand = day
        slack = h - G @ x
        stationary = Q @ x + q + self.cost + nu + G.T @ lam
        balance = jnp.sum(x, keepdims=True) - demand
        return stationary, balance, lam + slack - jnp.sqrt(lam**2 + slack**2 + 2 * epsilon**2)


def start(day):
    _, demand = day
    return jnp.full(n, demand[0] / n), jnp.zeros(1), jnp.full(2 * n, 0.1)


def make_layer(cost):
    """Each day its own system of 3n + 1 unknowns, with its own steps and tolerance."""
    krylov = nks.GMRES(restart=3 * n + 1)
    solver = nks.NewtonKrylov(rtol=0, atol=1e-9, linear_solver=krylov, history_length=30)
    return nks.ResidualLayer(Conditions(cost), solver, batch=nks.PerSample(), guess=start)


@eqx.filter_jit
@eqx.filter_value_and_grad(has_aux=True)
def value_and_grad(layer):
    (x, _, _), info = layer(inputs)
    return jnp.mean((x - observed) ** 2), (x, info)


# %% [markdown]
# With the true costs the layer finds SLSQP's minimisers but for the smoothing. With others,
# its gradient is what differences say.

# %%
_, (x, info) = value_and_grad(make_layer(jnp.array(true_cost)))[0]
counts = {name: np.asarray(info.stats[name]) for name in ("num_steps", "num_matvecs")}
shown = ", ".join(f"{name} {v.min()} to {v.max()}" for name, v in counts.items())
print(f"{days} programmes of {3 * n + 1} unknowns: {shown}")
print(f"largest difference from SLSQP {jnp.max(jnp.abs(x - observed)):.1e}")
assert bool(jnp.all(info.success))
assert bool(jnp.allclose(x, observed, atol=1e-4))

first = jnp.zeros(n)
direction, delta = jnp.linspace(1.0, 2.0, n), 1e-5
gradient = value_and_grad(make_layer(first))[1].cell.cost
values = [value_and_grad(make_layer(first + d * direction))[0][0] for d in (delta, -delta)]
slope, difference = gradient @ direction, (values[0] - values[1]) / (2 * delta)
print(f"slope of the loss: by the adjoint {slope:.9e}, by differences {difference:.9e}")
assert abs(slope - difference) < 1e-5 * abs(difference)

# %%
layer = make_layer(first)
optimiser = optax.adam(optax.cosine_decay_schedule(5e-2, steps))
state = optimiser.init(eqx.filter(layer, eqx.is_inexact_array))
errors = []
print(f"\n{'step':>5} {'loss':>9} {'largest error of c':>19}")
for step in range(steps):
    (loss, _), gradient = value_and_grad(layer)
    updates, state = optimiser.update(gradient, state)
    layer = eqx.apply_updates(layer, updates)
    cost = layer.cell.cost - jnp.mean(layer.cell.cost)
    errors.append(np.abs(np.asarray(cost) - true_cost))
    if step % (steps // 5) == 0 or step == steps - 1:
        print(f"{step:5d} {loss:9.2e} {errors[-1].max():19.2e}")
assert errors[-1].max() < stated

# %%
figure = new_figure(2)
left, right = figure.axes
left.semilogy(np.array(errors), linewidth=1.2)
left.set(xlabel="training step", ylabel="error of each cost")
left.grid(alpha=0.3)
for day in range(6):
    history = jax.tree.map(lambda leaf, day=day: leaf[day], info.stats["history"])
    plot_history(history, right, label=f"day {day}")
right.set_title("optimality conditions, Newton–Krylov", fontsize=10)
figure.savefig("qp_layer.png")
print("\nwrote qp_layer.png")

# %% [markdown]
# # A physics layer: the conductivity of an Allen–Cahn equation from a few solutions
#
# −ε² ∇·(a ∇u) + u³ − u = s on the unit square, u = 0 on its boundary. The layer maps a source s to
# a steady state u. Its weights are the 16 cosine coefficients of log a, learned from four observed
# states with 1 % noise. For the first source there are two: the equation has several roots, and a
# warm start keeps each sample on its own.

# %%
import os

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)

import equinox as eqx
import numpy as np
import optax

import nksolve as nks
from nksolve.plot import new_figure, plot_field

SMALL = os.environ.get("NKSOLVE_EXAMPLES_SMALL") == "1"
n, steps = (15, 80) if SMALL else (63, 150)
wanted_error = 0.03 if SMALL else 0.01  # of a, relative, in the 2-norm
h, eps2, modes, noise = 1 / (n + 1), 0.02, 4, 0.01
nodes, faces = h * jnp.arange(1, n + 1), h * (jnp.arange(n + 1) + 0.5)

# %% [markdown]
# The cell is the residual of one sample, in finite volumes: a is needed on the faces of cells.


# %%
class AllenCahn(eqx.Module):
    theta: jax.Array

    def a(self, x1, x2):
        cosines = lambda x: jnp.cos(jnp.pi * jnp.arange(modes) * x[:, None])
        return jnp.exp(cosines(x1) @ self.theta @ cosines(x2).T)

    def __call__(self, u, source):
        p = jnp.pad(u, 1)
        flux_1 = self.a(faces, nodes) * jnp.diff(p[:, 1:-1], axis=0)
        flux_2 = self.a(nodes, faces) * jnp.diff(p[1:-1, :], axis=1)
        divergence = jnp.diff(flux_1, axis=0) + jnp.diff(flux_2, axis=1)
        return -eps2 / h**2 * divergence + u**3 - u - source


# %% [markdown]
# The preconditioner is the same equation with the mean of a, and of the reaction 3u² − 1 where this
# is positive: fast sine transforms invert it. Adjoint solves use its transpose. A preconditioner is
# no function of the weights to be differentiated: `stop_gradient` takes them out.

# %%
reports = []  # on the solves for gradients


def layer(theta):
    cell = AllenCahn(jax.lax.stop_gradient(theta))
    preconditioner = nks.Spectral(
        diffusion=eps2 * jnp.mean(cell.a(nodes, nodes)),
        shift=lambda u, _: jnp.maximum(jnp.mean(3 * u**2 - 1), 0.0),
        spacing=h,
    )
    krylov = nks.GMRES(restart=30, preconditioner=preconditioner)
    solver = nks.NewtonKrylov(rtol=0.0, atol=1e-6, linear_solver=krylov)
    adjoint = nks.KrylovAdjoint(rtol=1e-6, report=reports.append)
    return nks.ResidualLayer(AllenCahn(theta), solver, adjoint, nks.PerSample(), max_steps=30)


@eqx.filter_jit
def evaluate(theta, u0, observed):
    """((loss, (u, info)), gradient); u0 starts the solves."""

    def loss_fn(theta):
        u, info = layer(theta)(sources, u0)
        return jnp.mean((u - observed) ** 2), (u, info)

    return eqx.filter_value_and_grad(loss_fn, has_aux=True)(theta)


# %% [markdown]
# Data, on the layer's own grid: a weak source with a state near 1 and one near −1; two strong ones.

# %%
x1, x2 = jnp.meshgrid(nodes, nodes, indexing="ij")
wave = lambda i, j: jnp.sin(i * jnp.pi * x1) * jnp.sin(j * jnp.pi * x2)
sources = jnp.stack([0.3 * wave(2, 2), 0.3 * wave(2, 2), 2 * wave(3, 2), 2 * wave(1, 3)])
above = jnp.ones((n, n))
near = jnp.stack([above, -above, *0.5 * jnp.sign(sources[2:])])
size = 0.7 / (1 + jnp.arange(modes)[:, None] + jnp.arange(modes))
true = size * jax.random.normal(jax.random.key(0), (modes, modes))
(_, (u_true, info)), _ = evaluate(true, near, near)
assert info.success.all()
observed = u_true + noise * jax.random.normal(jax.random.key(1), u_true.shape)

# %% [markdown]
# Training starts from a = 1, its solves from the observations. First the gradient, by the adjoint
# and by differences along a direction.

# %%
theta = jnp.zeros((modes, modes))
direction, delta = jax.random.normal(jax.random.key(3), theta.shape), 1e-4
(_, (u, _)), gradient = evaluate(theta, observed, observed)
displaced = (theta + t * direction for t in (delta, -delta))
ahead, behind = (evaluate(t, observed, observed)[0][0] for t in displaced)
slope, difference = jnp.vdot(gradient, direction), (ahead - behind) / (2 * delta)
print(f"slope of the loss   by the adjoint {slope:.8f}   by differences {difference:.8f}\n")
assert abs(slope - difference) < 1e-3 * abs(difference)

optimiser = optax.adam(optax.cosine_decay_schedule(0.05, steps, alpha=0.01))
state, update = optimiser.init(theta), jax.jit(optimiser.update)
a_true, a_error = AllenCahn(true).a(nodes, nodes), jnp.inf
print("step      loss   error of a   Newton steps   matvecs   (most of the four samples)")
for step in range(steps):
    (loss, (u, info)), gradient = evaluate(theta, u, observed)
    assert info.success.all()
    if step % (steps // 10) == 0 or step == steps - 1:
        a = AllenCahn(theta).a(nodes, nodes)
        a_error = jnp.linalg.norm(a - a_true) / jnp.linalg.norm(a_true)
        newton, matvecs = (max(info.stats[k].tolist()) for k in ("num_steps", "num_matvecs"))
        print(f"{step:4d} {loss:9.2e} {a_error:12.4f} {newton:14d} {matvecs:9d}")
    updates, state = update(gradient, state)
    theta = eqx.apply_updates(theta, updates)

jax.effects_barrier()
print(f"\nof an adjoint solve, 2 of them for this report: {reports[-1].num_matvecs} matvecs")
assert a_error < wanted_error

# %% [markdown]
# What a start from zero finds at the learned coefficients: for the first source a third state,
# twice. Trained from such starts, both observations would be fitted by the wrong root.

# %%
_, (u_cold, info) = evaluate(theta, jnp.zeros_like(u), observed)[0]
warm, cold = (np.abs(np.asarray(v - observed)).max(axis=(1, 2)) for v in (u, u_cold))
print(f"largest |u − observed|, warm:      {np.round(warm, 2)}")
print(f"largest |u − observed|, from zero: {np.round(cold, 2)}")
assert max(warm) < 0.1 < 1 < min(cold[:2])

# %%
fields = {"a": a_true, "a, learned": a, "u": u[0], "u, of the same source": u[1]}
figure = new_figure(len(fields))
for axes, (label, field) in zip(list(figure.axes), fields.items(), strict=True):
    plot_field(field, axes, label=label)
figure.suptitle(f"Allen–Cahn layer, {n} × {n} nodes: a learned to {100 * float(a_error):.1f} %")
figure.savefig("allen_cahn_layer.png")
print("wrote allen_cahn_layer.png")

# %% [markdown]
# # When Newton's method fails: what it says, and what to do
#
# A problem in which line searches end away from the root, a steady state with several solutions of
# which one is stable, and the other solutions by deflation.

# %%
import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)

import math

import nksolve as nks
from nksolve.plot import new_figure, plot_field, plot_history

# %% [markdown]
# ## A line search that ends elsewhere
#
# Freudenstein and Roth's two equations have one root, (5, 4), and a local minimum of ‖F‖ at
# (11.41, −0.90). J is singular on the line b = −0.90, and line searches from (0.5, −2) end there.
# The solver says so and returns the best point. `nks.Robust` goes on: its attempts differ in what
# they allow ‖F‖ to do.


# %%
def freudenstein_roth(y, args):
    a, b = y
    return jnp.stack([a + ((5 - b) * b - 2) * b - 13, a + ((b + 1) * b - 14) * b - 29])


y0 = jnp.array([0.5, -2.0])
newton = nks.NewtonKrylov(rtol=0, atol=1e-10, history_length=256)
stuck = nks.root_find(freudenstein_roth, newton, y0, max_steps=256, throw=False)
print(f"NewtonKrylov: {nks.reason_name(stuck.stats['reason'])} at {stuck.value}")
assert nks.reason_name(stuck.stats["reason"]) == "line_search_failed"

robust = nks.Robust(rtol=0, atol=1e-10, history_length=256)
found = nks.root_find(freudenstein_roth, robust, y0, max_steps=256)
attempts = int(found.stats["num_attempts"])
print(f"Robust: {found.value}")
for attempt, why in zip(robust.attempts, found.stats["attempt_reasons"][:attempts], strict=False):
    print(f"  {type(attempt.globalisation).__name__:16s} {nks.reason_name(why)}")
assert jnp.allclose(found.value, jnp.array([5.0, 4.0]))

# %% [markdown]
# ## The stable one of several solutions
#
# A beam under a load λ = 20 buckles to either side: −u″ = 20 sin u, u = 0 at both ends, has the
# solutions ±u and the unstable 0. Newton's method from a small bump falls back to 0.
# Pseudo-transient continuation follows u̇ = u″ + 20 sin u, which leaves it.

# %%
n = 63
x = jnp.arange(1, n + 1) / (n + 1)


def beam(u, load):
    p = jnp.pad(u, 1)
    return (n + 1) ** 2 * (2 * u - p[2:] - p[:-2]) - load * jnp.sin(u)


s = x * (1 - x) * (2 - x)
bump = s * jnp.exp(-10 * s)
krylov = nks.GMRES(restart=n)


def solve(globalisation):
    solver = nks.NewtonKrylov(
        rtol=0,
        atol=1e-7,
        linear_solver=krylov,
        forcing=nks.ConstantForcing(1e-4),
        globalisation=globalisation,
        history_length=64,
    )
    return nks.root_find(beam, solver, bump, 20.0, max_steps=64)


straight, buckled = solve(nks.Backtracking()), solve(nks.PseudoTransient(0.01))
for name, solution in (("Backtracking", straight), ("PseudoTransient", buckled)):
    print(f"{name:16s} max |u| = {jnp.max(jnp.abs(solution.value)):.4f}")
assert 2.1 < jnp.max(buckled.value) < 2.3  # on the branch u > 0; 2.191 for n = 63

# %% [markdown]
# ## The others, by deflation
#
# `nks.Deflated` multiplies F by a factor that is infinite at the roots that are known, and takes
# steps with the same linear solves. A known root is a pole, which full steps jump over.

# %%
deflated = nks.NewtonKrylov(
    rtol=0,
    atol=1e-7,
    linear_solver=krylov,
    forcing=nks.ConstantForcing(1e-8),
    globalisation=nks.Backtracking(growth=math.inf),
)
roots = [buckled.value]
for _ in range(2):
    solver = nks.Deflated(deflated, roots, scale=math.sqrt(n))
    other = nks.root_find(beam, solver, bump, 20.0, max_steps=200)
    roots.append(other.value)
    print(f"another one: u in [{other.value.min():.4f}, {other.value.max():.4f}]")
for k, root in enumerate(roots):
    assert jnp.linalg.norm(beam(root, 20.0)) < 1e-5
    assert all(jnp.linalg.norm(root - other) > 1 for other in roots[:k])

# %%
figure = new_figure(2)
for root in roots:
    plot_field(root, figure.axes[0], label="u")
plot_history(found.stats["history"], figure.axes[1])
figure.axes[1].set_title("Robust on Freudenstein and Roth")
figure.savefig("hard_problems.png")
print("wrote hard_problems.png")

"""What a layer's gradient holds: no n × n value, and nothing that grows with the iterations."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import nksolve as nks
from tests.helpers import AS_SHIPPED, square_tensors, square_values

N, BATCH = 67, 3
SOLVERS = {
    "newton": nks.NewtonKrylov(1e-10, 0.0),
    "anderson": nks.Anderson(1e-10, 0.0),
    "broyden": nks.Broyden(1e-10, 0.0),
    "switching": nks.Switching(1e-10, 0.0),
}
BATCHES = {"joint": nks.Joint(), "per-sample": nks.PerSample(), "compacted": nks.Compacted((1,))}


class Neighbours(eqx.Module):
    """A cell without matrices."""

    weight: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(0.5 * jnp.roll(z, 1) * self.weight + x)


CELL = Neighbours(jnp.cos(jnp.linspace(0.0, 3.0, N)))
X = jnp.sin(jnp.arange(BATCH * N, dtype=CELL.weight.dtype)).reshape(BATCH, N)


def gradient(solver, batch, max_steps=50):
    def loss(cell, x):
        layer = nks.ImplicitLayer(
            cell, solver, batch=batch, guess=jnp.zeros_like, max_steps=max_steps
        )
        return jnp.sum(jnp.sin(layer(x)[0]))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


@pytest.mark.parametrize(
    ("solver", "batch"),
    [*((solver, "joint") for solver in SOLVERS), ("newton", "per-sample"), ("newton", "compacted")],
)
def test_no_square_value_in_the_gradient(solver, batch):
    traced = gradient(SOLVERS[solver], BATCHES[batch]).trace(CELL, X)
    assert square_values(traced.jaxpr, N) == []
    assert square_tensors(traced.lower().as_text(), N) == []


@pytest.mark.parametrize("solver", ["newton", "anderson"])
def test_the_memory_of_a_gradient_does_not_grow_with_the_iterations(solver):
    def held(max_steps):
        lowered = gradient(SOLVERS[solver], nks.Joint(), max_steps).lower(CELL, X)
        return lowered.compile(AS_SHIPPED).memory_analysis().temp_size_in_bytes

    few, many = held(2), held(2000)
    assert many == few > 0


def test_the_memory_of_an_unrolled_gradient_grows():
    """What the test above would see otherwise."""

    def held(steps):
        def loss(cell):
            z = jnp.zeros_like(X)
            for _ in range(steps):
                z = jax.vmap(cell)(z, X)
            return jnp.sum(z)

        compiled = jax.jit(jax.grad(loss)).lower(CELL).compile(AS_SHIPPED)
        return compiled.memory_analysis().temp_size_in_bytes

    assert held(40) > held(4)

"""A solve and its gradient over several devices, with automatic axes: the partitioner's program.

The answer is the same; no vector of the problem's size is gathered; an Arnoldi step costs few
reductions; a stencil exchanges halos only.
"""

import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import nksolve as nks
from tests.helpers import AS_SHIPPED, collectives

N = 1024
RESTART = 30
SOLVER = nks.NewtonKrylov(rtol=1e-10, atol=1e-10, linear_solver=nks.GMRES(restart=RESTART))
OF_FN = 1  # all-reduces in one evaluation of `coupled`, of its tangent map and of the transpose


def coupled(y, args):
    """One reduction; eigenvalues spread enough for a dozen Krylov iterations."""
    return args["d"] * y + jnp.tanh(y) + 2.0 * jnp.mean(y) - args["b"]


ARGS = {"d": 1.0 + jnp.linspace(0.0, 9.0, N), "b": jnp.cos(jnp.linspace(0.0, 50.0, N))}


def solve(args):
    return nks.root_find(coupled, SOLVER, jnp.zeros_like(args["b"]), args).value


def gradient(args):
    return jax.grad(lambda a: jnp.sum(jnp.sin(solve(a)) * a["d"]))(args)


TRANSFORMS = {"solve": solve, "grad": gradient}


@ft.cache
def reference(name):
    return jax.jit(TRANSFORMS[name])(ARGS)


def _mesh(devices):
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} devices")
    return Mesh(np.array(jax.devices()[:devices]), ("x",))


def _placed(inputs, devices, spec):
    return jax.device_put(inputs, NamedSharding(_mesh(devices), spec))


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_coupled_over_devices(name, devices):
    placed = _placed(ARGS, devices, P("x"))
    compiled = jax.jit(TRANSFORMS[name]).lower(placed).compile(AS_SHIPPED)
    out = jax.tree.leaves(compiled(placed))
    for leaf, alone in zip(out, jax.tree.leaves(reference(name)), strict=True):
        np.testing.assert_allclose(np.asarray(leaf), alone, rtol=1e-8, atol=1e-10)
        assert not leaf.sharding.is_fully_replicated
        assert leaf.sharding.shard_shape(leaf.shape) == (N // devices,)

    found = collectives(compiled.as_text())
    for one in found:
        assert one.kind == "all-reduce" or not one.in_loop, one
        assert one.kind != "all-gather", one
        # nothing of a vector's size travels, whole or by shards
        assert sum(math.prod(t.shape) for t in one.shapes) < N // 8, one
    bodies = _arnoldi_bodies(found)
    assert len(bodies) == (1 if name == "solve" else 2)  # Newton's, and the adjoint's
    for reductions in bodies.values():
        assert 2 <= reductions - OF_FN <= 3


def _arnoldi_bodies(found):
    """Computations in loops with both inner products of an Arnoldi step, and their all-reduces."""
    products, total = {}, {}
    for one in found:
        if one.in_loop:
            total[one.computation] = total.get(one.computation, 0) + 1
            sizes = [t.shape for t in one.shapes]
            if (RESTART + 1,) in sizes:
                products[one.computation] = products.get(one.computation, 0) + 1
    return {name: total[name] for name, number in products.items() if number >= 2}


# --- a two-dimensional stencil --------------------------------------------------------------

GRID = (64, 64)
GRID_SOLVER = nks.NewtonKrylov(rtol=1e-8, atol=1e-8)


def stencil(y, args):
    """(I − ¼ Δ_h) y + y³ − b with zero values beyond the edge."""
    up, down = (jnp.pad(x, ((a, b), (0, 0))) for x, a, b in ((y[:-1], 1, 0), (y[1:], 0, 1)))
    left, right = (
        jnp.pad(x, ((0, 0), (a, b))) for x, a, b in ((y[:, :-1], 1, 0), (y[:, 1:], 0, 1))
    )
    return y - 0.25 * (up + down + left + right - 4.0 * y) + y**3 - args


def grid_solve(b):
    return nks.root_find(stencil, GRID_SOLVER, jnp.zeros_like(b), b).value


def grid_gradient(b):
    return jax.grad(lambda b: jnp.sum(jnp.sin(grid_solve(b)) * b))(b)


@pytest.mark.parametrize("transform", [grid_solve, grid_gradient], ids=["solve", "grad"])
def test_stencil_exchanges_halos(transform):
    i, j = jnp.meshgrid(*(jnp.linspace(0.0, 3.0, n) for n in GRID), indexing="ij")
    b = jnp.sin(i * 2.0) * jnp.cos(j)
    alone = jax.jit(transform)(b)
    placed = _placed(b, 8, P("x", None))
    compiled = jax.jit(transform).lower(placed).compile(AS_SHIPPED)
    out = compiled(placed)
    np.testing.assert_allclose(np.asarray(out), alone, rtol=1e-7, atol=1e-9)
    assert out.sharding.shard_shape(out.shape) == (GRID[0] // 8, GRID[1])
    found = collectives(compiled.as_text())
    kinds = {one.kind for one in found}
    assert kinds == {"all-reduce", "collective-permute"}
    for one in found:
        # halos of one row; sums of no more than a column of the Hessenberg matrix
        assert sum(math.prod(t.shape) for t in one.shapes) <= GRID[1], one

"""What each policy of `nks.linearise` stores, and what a matvec costs.

    python -m benchmarks.linearisation [--repeats 30]

Prints the tables of docs/theory/linearisation.md. Float32, one process, whatever device JAX picks.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from nksolve.linearise.layers import checkpoint_layers
from nksolve.linearise.linearisation import linearise
from nksolve.linearise.policies import (
    Checkpointed,
    FiniteDifference,
    Linearise,
    Recompute,
    Transposed,
)

BATCH = 64


class Block(eqx.Module):
    """x + W₂ gelu(W₁ norm(x)), the block of a transformer without attention."""

    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width: int, key: jax.Array):
        up, down = jr.split(key)
        self.norm = eqx.nn.LayerNorm(width)
        self.up = eqx.nn.Linear(width, 4 * width, key=up)
        self.down = eqx.nn.Linear(4 * width, width, key=down)

    def __call__(self, x: jax.Array, *, key: Any = None) -> jax.Array:
        return x + 0.3 * self.down(jax.nn.gelu(self.up(self.norm(x))))


def networks() -> dict[str, tuple[Any, jax.Array]]:
    """Name → (network, input)."""
    mlp = eqx.nn.MLP(512, 512, 512, 4, activation=jnp.tanh, key=jr.key(0))
    stack = eqx.nn.Sequential([Block(256, key) for key in jr.split(jr.key(1), 8)])
    return {
        "MLP, 5 linear layers of width 512, tanh": (mlp, jr.normal(jr.key(2), (BATCH, 512))),
        "8 residual blocks 256→1024→256, layer norm, gelu": (
            stack,
            jr.normal(jr.key(3), (BATCH, 256)),
        ),
    }


def residual(y: jax.Array, network: Any) -> jax.Array:
    return y - jax.vmap(network)(y)


def mebibytes(arrays: list[Any]) -> float:
    return sum(x.nbytes for x in arrays) / 2**20


def stored(operator: Any, network: Any) -> tuple[float, float]:
    """MiB kept in the operator: (weights, everything else). Arrays shared by two leaves count once.

    A weight is told by its shape, so that a transposed or copied weight counts as one.
    """
    shapes = {x.shape for x in jtu.tree_leaves(eqx.filter(network, eqx.is_array))}
    shapes |= {shape[::-1] for shape in shapes}
    arrays = {id(x): x for x in jtu.tree_leaves(operator) if eqx.is_array(x)}.values()
    weights = [x for x in arrays if x.shape in shapes]
    return mebibytes(weights), mebibytes([x for x in arrays if x.shape not in shapes])


def temporaries(fn: Callable[..., Any], *args: Any) -> float:
    """MiB of scratch space that XLA plans for one call."""
    lowered = eqx.filter_jit(fn).lower(*args)
    return lowered.compile().compiled.memory_analysis().temp_size_in_bytes / 2**20


def rounds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, taken in turns so that a busy machine hurts all alike."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def measure(network: Any, y: jax.Array, repeats: int) -> list[str]:
    """The rows of a table."""
    marked = checkpoint_layers(network)
    v = jr.normal(jr.key(9), y.shape)
    cases = {
        "`nks.Linearise()`": (Linearise(), network),
        "`nks.Checkpointed()`, marked layers": (Checkpointed(), marked),
        "`nks.Recompute()`": (Recompute(), network),
        "`nks.Transposed()`": (Transposed(), network),
        "`nks.FiniteDifference()`": (FiniteDifference(), network),
    }
    make = eqx.filter_jit(lambda y, net, policy: linearise(residual, y, net, policy=policy))
    apply = eqx.filter_jit(lambda operator, v: operator.mv(v))
    transposed = eqx.filter_jit(lambda operator, v: operator.transpose().mv(v))
    fresh = eqx.filter_jit(
        lambda y, net, v: eqx.filter_jvp(lambda y: residual(y, net), (y,), (v,))[1]
    )
    alone = eqx.filter_jit(residual)
    operators = {name: make(y, net, policy).operator for name, (policy, net) in cases.items()}
    forward = {name: lambda o=o: apply(o, v) for name, o in operators.items()}
    forward["`eqx.filter_jvp` per direction"] = lambda: fresh(y, network, v)
    forward["`residual` alone"] = lambda: alone(y, network)
    reverse = {
        name: lambda o=o: transposed(o, v)
        for name, o in operators.items()
        if "Difference" not in name
    }
    ms, ms_transposed = rounds(forward, repeats), rounds(reverse, repeats)
    exact = fresh(y, network, v)
    rows = []
    for name, operator in operators.items():
        policy = cases[name][0]
        weights, rest = stored(operator, network)
        scratch = temporaries(lambda o, v: o.mv(v), operator, v)
        error = jnp.linalg.norm(apply(operator, v) - exact) / jnp.linalg.norm(exact)
        back = f"{ms_transposed[name]:.2f}" if name in reverse else "none"
        rows.append(
            f"| {name} | {weights:.2f} | {rest:.2f} | {scratch:.2f} | {ms[name]:.2f} | {back} "
            f"| {policy.evals_per_matvec} | {float(error):.0e} |"
        )
    name = "`eqx.filter_jvp` per direction"
    scratch = temporaries(lambda y, net, v: fresh(y, net, v), y, network, v)
    kept = mebibytes(jtu.tree_leaves(eqx.filter(network, eqx.is_array)))
    rows.append(
        f"| {name} | {kept:.2f} | {mebibytes([y]):.2f} | {scratch:.2f} | {ms[name]:.2f} "
        "| – | 1 | – |"
    )
    name = "`residual` alone"
    rows.append(f"| {name} | – | – | – | {ms[name]:.2f} | – | – | – |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "equinox"))
    device = jax.devices()[0].device_kind
    print(f"{platform.machine()}, {os.cpu_count()} cores, device {device}, {versions}, float32")
    for title, (network, y) in networks().items():
        print(f"\n**{title}**, batch {BATCH}\n")
        print(
            "| | weights, MiB | kept besides, MiB | scratch, MiB | J v, ms | Jᵀw, ms "
            "| evaluations per matvec | error of J v |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for row in measure(network, y, repeats):
            print(row)


if __name__ == "__main__":
    main()

"""The pictures of docs/implicit-layers.md: `python -m benchmarks.layer_pictures`.

What goes wrong with implicit layers: cells that do not contract, several roots, the floor of
float32, approximate gradients.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import nksolve as nks

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"
SIZE = 64


class Tanh(eqx.Module):
    """g(z, x) = tanh(W z + x)."""

    weight: jax.Array

    def __call__(self, z: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.weight @ z + x)


def cell_of(low: float, high: float, dtype: Any = jnp.float64) -> Tanh:
    """A symmetric W with eigenvalues spread evenly over [low, high]; J at the root 0 for x = 0."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((SIZE, SIZE)))[0]
    eigenvalues = np.linspace(low, high, SIZE)
    return Tanh(jnp.asarray((basis * eigenvalues) @ basis.T, dtype))


def records(cell: Tanh, solver: Any, dtype: Any = jnp.float64) -> tuple[np.ndarray, np.ndarray]:
    """(cost, ‖f‖) at each trial; the cost counts evaluations and matvecs."""
    x = jnp.asarray(0.05 * np.random.default_rng(1).standard_normal(SIZE), dtype)
    solution = nks.fixed_point(cell, solver, jnp.ones(SIZE, dtype), x, throw=False, max_steps=398)
    history = solution.stats["history"]
    norm = np.asarray(history.norm)
    seen = np.isfinite(norm)
    # The matvecs of a row are spent on the way to the next.
    matvecs = np.concatenate([[0], np.cumsum(np.asarray(history.num_matvecs))[:-1]])
    return (np.arange(1, len(norm) + 1) + matvecs)[seen], norm[seen]


def solvers(tolerance: float) -> dict[str, Any]:
    """By name."""
    common = {"rtol": 0.0, "atol": tolerance, "history_length": 400}
    patient = nks.ResidualTest(patience=200)
    return {
        "Picard": nks.Picard(**common, convergence=patient),
        "Anderson": nks.Anderson(**common, convergence=patient),
        "NewtonKrylov": nks.NewtonKrylov(**common),
    }


def contraction() -> None:
    """Residual against cost for four spectra."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), sharey=True)
    spectra = [(-0.5, 0.5), (-0.9, 0.9), (-0.99, 0.99), (-1.5, 0.5)]
    for axis, (low, high) in zip(axes, spectra, strict=True):
        for name, solver in solvers(1e-10).items():
            axis.semilogy(*records(cell_of(low, high), solver), label=name)
        axis.set(title=f"eigenvalues of J in [{low}, {high}]", xlabel="evaluations + matvecs")
        axis.set(xlim=(0, 150), ylim=(1e-11, 1e2))
    axes[0].set_ylabel("‖g(z) − z‖")
    axes[0].legend()
    _saved(figure, "layers-contraction.png")


def several_roots() -> None:
    """z = tanh(2 z + x) has three roots for small x: where solvers end, from 0 and started warm."""
    inputs = jnp.linspace(-1.0, 1.0, 201)

    def g(z, x):
        return jnp.tanh(2.0 * z + x)

    def found(solver, x, z):
        solution = nks.fixed_point(g, solver, z, x, throw=False)
        return solution.value, solution.stats["residual_norm"] < 1e-6

    newton = nks.NewtonKrylov(1e-10, 1e-12)
    picard = nks.Picard(1e-10, 1e-12)
    figure, axis = plt.subplots(figsize=(8, 4))
    z = np.linspace(-0.999, 0.999, 2001)
    axis.plot(np.arctanh(z) - 2.0 * z, z, color="0.8", lw=5, label="all roots")
    cold, _ = jax.jit(jax.vmap(lambda x: found(picard, x, jnp.zeros(()))))(inputs)
    axis.plot(inputs, cold, "C0-", lw=1, label="Picard from z₀ = 0")
    cold, good = jax.jit(jax.vmap(lambda x: found(newton, x, jnp.zeros(()))))(inputs)
    axis.plot(inputs[good], cold[good], "C2.", ms=4, label="NewtonKrylov from z₀ = 0")
    axis.plot(inputs[~good], cold[~good], "kx", ms=3, label="the same, reported as failed")
    one = jax.jit(lambda x, z: found(newton, x, z))
    path, point = [], cold[0]
    for x in inputs:
        point, sound = one(x, point)
        path.append(float(point) if sound else np.nan)
    axis.plot(inputs, path, "C3--", lw=1.5, label="NewtonKrylov, x rising, started warm")
    axis.set(xlabel="x", ylabel="z", xlim=(-1, 1), title="z = tanh(2 z + x)")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _saved(figure, "layers-roots.png")


def float32_floor() -> None:
    """Residuals in float32 under a tolerance that it cannot reach."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for name, solver in solvers(1e-9).items():
        cell = cell_of(-0.99, 0.99, jnp.float32)
        axis.semilogy(*records(cell, solver, jnp.float32), label=name)
    axis.axhline(float(jnp.finfo(jnp.float32).eps) * SIZE**0.5, color="0.6", ls=":")
    axis.set(xlabel="evaluations + matvecs", ylabel="‖g(z) − z‖, float32", xlim=(0, 200))
    axis.set(title="tolerance 1e-9, eigenvalues of J in [−0.99, 0.99]")
    axis.legend()
    _saved(figure, "layers-float32.png")


def approximate_gradients() -> None:
    """The error of truncated gradients against the number of terms."""
    figure, axis = plt.subplots(figsize=(6, 4))
    solver = nks.NewtonKrylov(0.0, 1e-12)
    start = jnp.ones(SIZE)

    def gradient(rho: float, adjoint: Any) -> jax.Array:
        def loss(cell):
            x = jnp.full(SIZE, 0.01)
            z = nks.fixed_point(_at, solver, start, (cell, x), adjoint=adjoint).value
            return jnp.sum(jnp.cos(3.0 * jnp.arange(SIZE)) * z)

        return eqx.filter_grad(loss)(cell_of(-rho, rho)).weight

    terms = [1, 2, 4, 8, 16, 32]
    for i, rho in enumerate([0.5, 0.9, 0.99]):
        exact = gradient(rho, nks.KrylovAdjoint(rtol=1e-12))
        errors = [_error(gradient(rho, nks.Neumann(k)), exact) for k in terms]
        axis.loglog(terms, errors, f"C{i}o-", label=f"Neumann, ρ = {rho}")
        axis.axhline(_error(gradient(rho, nks.OneStep()), exact), color=f"C{i}", ls=":")
    axis.set(xlabel="terms", ylabel="relative error of the gradient (dotted: OneStep)")
    axis.set(ylim=(1e-10, 2.0))
    axis.legend()
    _saved(figure, "layers-gradients.png")


def _at(z: jax.Array, args: tuple[Callable, jax.Array]) -> jax.Array:
    cell, x = args
    return cell(z, x)


def _error(approximate: jax.Array, exact: jax.Array) -> float:
    return float(jnp.linalg.norm(approximate - exact) / jnp.linalg.norm(exact))


def _saved(figure: Any, name: str) -> None:
    figure.tight_layout()
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / name, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    contraction()
    several_roots()
    float32_floor()
    approximate_gradients()

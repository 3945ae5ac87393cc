"""Implicit layers: values, derivatives, batches, states, warm starts."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import nksolve as nks
from tests.helpers import Counter
from tests.helpers.cells import inputs, tanh_cell

SIZE, RHO = 7, 0.6
CASE = tanh_cell("near_symmetric", SIZE, RHO)
X, ROOTS = inputs(CASE, [0.2, 0.4, 0.5, 0.6])
COUNTER = Counter()

SOLVERS = {
    "newton": nks.NewtonKrylov(1e-13, 1e-14),
    "picard": nks.Picard(1e-13, 1e-14),
    "anderson": nks.Anderson(1e-13, 1e-14),
    "ngmres": nks.NGMRES(1e-13, 1e-14),
    "broyden": nks.Broyden(1e-13, 1e-14),
    "bad broyden": nks.BadBroyden(1e-13, 1e-14),
    "switching": nks.Switching(1e-13, 1e-14),
}
# Every solver, every batch mode, both structures, each with several of the others.
COMBINED = [
    ("newton", "joint", "array"), ("newton", "per-sample", "tree"),
    ("newton", "compacted", "array"), ("picard", "joint", "tree"),
    ("picard", "per-sample", "array"), ("picard", "compacted", "tree"),
    ("anderson", "joint", "array"), ("anderson", "per-sample", "tree"),
    ("ngmres", "per-sample", "array"), ("ngmres", "joint", "tree"),
    ("broyden", "joint", "array"), ("broyden", "per-sample", "tree"),
    ("bad broyden", "per-sample", "array"), ("switching", "joint", "tree"),
    ("switching", "per-sample", "array"),
]  # fmt: skip
REST = [
    case
    for case in itertools.product(SOLVERS, ("joint", "per-sample", "compacted"), ("array", "tree"))
    if case not in COMBINED
]
BATCHES = {"joint": nks.Joint(), "per-sample": nks.PerSample()}
COMPACTED = nks.Compacted((1, 1 / 2))


class TreeCell(eqx.Module):
    """A cell of two leaves, one of them a matrix: z = (a, b)."""

    inner: eqx.Module

    def __call__(self, z, x):
        flat = self.inner(jnp.concatenate([z["a"].ravel(), z["b"]]), x["x"])
        return {"a": flat[:4].reshape(2, 2), "b": flat[4:]}


def tree_of(flat):
    return {"a": flat[..., :4].reshape(*flat.shape[:-1], 2, 2), "b": flat[..., 4:]}


def flat_of(z):
    if not isinstance(z, dict):
        return z
    return jnp.concatenate([z["a"].reshape(*z["a"].shape[:-2], 4), z["b"]], axis=-1)


def zeros(x):
    return jnp.zeros(SIZE, X.dtype)


def layer_of(solver, batch, cell=CASE.cell, **keywords):
    return nks.ImplicitLayer(cell, solver, batch=batch, guess=zeros, max_steps=400, **keywords)


def loss_of(z):
    return jnp.sum(jnp.sin(flat_of(z)) @ jnp.arange(1.0, SIZE + 1))


@functools.cache
def dense():
    """The gradient of the loss in (cell, X) by dense solves at the roots, and the loss."""
    cell = CASE.cell

    def one(x, z):
        jac = jax.jacfwd(cell, argnums=0)(z, x)
        multiplier = jnp.linalg.solve((jnp.eye(SIZE) - jac).T, jax.grad(loss_of)(z))
        return jax.vjp(lambda cell, x: cell(z, x), cell, x)[1](multiplier)

    weights, own = jax.vmap(one)(X, ROOTS)
    return jtu.tree_map(lambda g: g.sum(0), weights), own


@pytest.mark.parametrize(
    ("solver", "batch", "structure"),
    [*COMBINED, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_roots_and_gradients_agree_with_dense_ones(solver, batch, structure):
    mode = {**BATCHES, "compacted": COMPACTED}[batch]

    @eqx.filter_jit
    def run(cell, x):
        if structure == "tree":
            guess = lambda x: tree_of(zeros(x))
            layer = nks.ImplicitLayer(
                TreeCell(cell), SOLVERS[solver], batch=mode, guess=guess, max_steps=400
            )
            z, info = layer({"x": x})
        else:
            z, info = layer_of(SOLVERS[solver], mode, cell)(x)
        return loss_of(z), (z, info)

    (_, (z, info)), (g_cell, g_x) = eqx.filter_value_and_grad(
        lambda both: run(*both), has_aux=True
    )((CASE.cell, X))
    np.testing.assert_allclose(flat_of(z), ROOTS, atol=1e-11)
    assert info.success.shape == info.residual_norm.shape == (4,) and info.success.all()
    assert info.residual_norm.max() < 1e-12
    expected = ravel_pytree(dense()[0])[0]
    np.testing.assert_allclose(ravel_pytree(g_cell)[0], expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(g_x, dense()[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", BATCHES)
def test_jvp_and_second_derivative_against_differences(batch):
    layer = layer_of(SOLVERS["newton"], BATCHES[batch])

    @jax.jit
    def along(t):
        return loss_of(layer(X + t * jnp.cos(X))[0])

    slope, curvature = jax.grad(along), jax.grad(jax.grad(along))
    at, h = jnp.asarray(0.1), 1e-5
    tangent = jax.jvp(along, (at,), (jnp.ones(()),))[1]
    difference = (along(at + h) - along(at - h)) / (2 * h)
    np.testing.assert_allclose(slope(at), difference, rtol=1e-6)
    np.testing.assert_allclose(tangent, slope(at), rtol=1e-9)
    second = (slope(at + h) - slope(at - h)) / (2 * h)
    np.testing.assert_allclose(curvature(at), second, rtol=1e-6)


class Counted(eqx.Module):
    inner: eqx.Module

    def __call__(self, z, x):
        return self.inner(COUNTER.tick(z), x)


def test_a_training_step_evaluates_the_cell_once_more_than_there_are_steps():
    solver = nks.NewtonKrylov(1e-10, 0.0, globalisation=nks.FullStep())

    @eqx.filter_jit
    def step(cell, x):
        def loss(cell):
            z, info = layer_of(solver, nks.Single(), Counted(cell))(x)
            return loss_of(z), info

        return eqx.filter_value_and_grad(loss, has_aux=True)(cell)

    (_, info), _ = step(CASE.cell, X[3])
    jax.block_until_ready(info.residual_norm)
    with COUNTER.measure() as count:
        (_, info), grad = step(CASE.cell, X[3])
        jax.block_until_ready((info, grad))
    assert bool(info.success)
    assert count.primal == int(info.stats["num_steps"]) + 1


@pytest.mark.parametrize("solver", ["newton", "picard"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("where", ["x", "z0"])
def test_a_sample_with_nan_harms_no_other(solver, batch, where):
    bad = X.at[1].set(jnp.nan) if where == "x" else X
    z0 = jnp.zeros((4, SIZE))
    z0 = z0.at[1, 2].set(jnp.inf) if where == "z0" else z0

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def step(cell, x, z0, keep):
        z, info = layer_of(SOLVERS[solver], BATCHES[batch], cell)(x, z0)
        return loss_of(jnp.where(keep[:, None], z, 0)), (z, info)

    keep = jnp.array([True, False, True, True])
    (_, (z, info)), grad = step(CASE.cell, bad, z0, keep)
    (_, (sound, _)), expected = step(CASE.cell, X, jnp.zeros_like(z0), keep)
    others = np.array([0, 2, 3])
    assert info.success.tolist() == [True, False, True, True]
    reason = jtu.tree_map(lambda code: code[1], info.stats["reason"])
    assert nks.reason_name(reason) == "nonfinite"
    np.testing.assert_allclose(z[others], sound[others], atol=1e-11)
    np.testing.assert_array_equal(z[1], z0[1])
    np.testing.assert_allclose(
        ravel_pytree(grad)[0], ravel_pytree(expected)[0], rtol=1e-8, atol=1e-9
    )


def test_the_best_iterate_is_returned_where_the_budget_is_too_small():
    layer = layer_of(nks.Picard(1e-12, 0.0), nks.PerSample(), inference_max_steps=50)
    layer = eqx.tree_at(lambda m: m.inference, layer, False)
    short = nks.ImplicitLayer(
        CASE.cell, layer.solver, batch=nks.PerSample(), guess=zeros, max_steps=3,
        inference_max_steps=200,
    )  # fmt: skip
    z, info = short(X)
    assert not info.success.any() and (info.stats["num_steps"] == 3).all()
    np.testing.assert_allclose(
        jnp.linalg.norm(jax.vmap(CASE.cell)(z, X) - z, axis=1), info.residual_norm, rtol=1e-12
    )
    z, info = eqx.nn.inference_mode(short)(X)
    assert info.success.all()


class Dropped(eqx.Module):
    """A cell with dropout: its mask must be the same in every evaluation."""

    inner: eqx.Module
    dropout: eqx.nn.Dropout

    def __call__(self, z, x, key):
        return self.inner(self.dropout(z, key=key), x)


def test_a_dropout_mask_is_frozen_and_differs_between_samples():
    cell = Dropped(CASE.cell, eqx.nn.Dropout(0.5))
    x = jnp.stack([X[0], X[0]])
    layer = layer_of(nks.NewtonKrylov(1e-12, 0.0), nks.PerSample(), cell)
    z, info = layer(x, key=jax.random.key(1))
    assert info.success.all() and not np.allclose(z[0], z[1])
    again, _ = layer(x, key=jax.random.key(1))
    np.testing.assert_array_equal(z, again)


class Normalised(eqx.Module):
    """A cell with Equinox's spectral normalisation, which carries a state."""

    linear: eqx.nn.SpectralNorm

    def __init__(self, key):
        linear_key, norm_key = jax.random.split(key)
        linear = eqx.nn.Linear(SIZE, SIZE, key=linear_key)
        self.linear = eqx.nn.SpectralNorm(linear, "weight", num_power_iterations=1, key=norm_key)

    def __call__(self, z, x, state):
        y, state = self.linear(z, state)
        return jnp.tanh(0.5 * y + x), state


@pytest.mark.parametrize("batch", [nks.Single(), *BATCHES.values()])
def test_a_state_is_frozen_during_a_solve_and_updated_once(batch):
    cell, state = eqx.nn.make_with_state(Normalised)(jax.random.key(0))
    layer = layer_of(nks.NewtonKrylov(1e-12, 0.0), batch, cell)
    x = X[0] if isinstance(batch, nks.Single) else X
    z, info = layer(x, state=state)
    assert jnp.all(info.success)
    one_z, one_x = (z, x) if isinstance(batch, nks.Single) else (z[0], x[0])
    applied, updated = cell(one_z, one_x, state)
    np.testing.assert_allclose(applied, one_z, atol=1e-11)
    for got, wanted in zip(*map(jtu.tree_leaves, (info.state, updated)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_iterates_carry_the_derivative_of_one_application():
    layer = layer_of(nks.Picard(1e-12, 0.0), nks.PerSample(), iterates=(1, 3))
    z, info = layer(X)
    path = [jnp.zeros_like(z)]
    for _ in range(4):
        path.append(jax.vmap(CASE.cell)(path[-1], X))
    np.testing.assert_allclose(info.iterates[:, 0], path[2], rtol=1e-12)
    np.testing.assert_allclose(info.iterates[:, 1], path[4], rtol=1e-12)
    joint = layer_of(nks.Picard(1e-12, 0.0), nks.Joint(), iterates=(1, 3))(X)[1].iterates
    np.testing.assert_allclose(joint, info.iterates, rtol=1e-12)

    def loss(cell):
        out = nks.ImplicitLayer(cell, layer.solver, batch=nks.PerSample(), iterates=(1, 3))
        return jnp.sum(out(X, jnp.zeros((4, SIZE)))[1].iterates[:, 0])

    grad = eqx.filter_grad(loss)(CASE.cell)
    expected = eqx.filter_grad(lambda cell: jnp.sum(jax.vmap(cell)(path[1], X)))(CASE.cell)
    np.testing.assert_allclose(grad.weight, expected.weight, rtol=1e-10)


def test_the_guess_learns_from_its_own_error_only():
    guess = eqx.nn.Linear(SIZE, SIZE, key=jax.random.key(0), dtype=jnp.float64)

    def loss(guess):
        layer = nks.ImplicitLayer(
            CASE.cell, nks.NewtonKrylov(1e-12, 0.0), batch=nks.Joint(), guess=guess
        )
        z, info = layer(X)
        return jnp.sum(z), info.guess_error

    assert not jnp.any(jax.grad(lambda g: loss(g)[0])(guess).weight)
    error, grad = eqx.filter_value_and_grad(lambda g: loss(g)[1])(guess)
    np.testing.assert_allclose(error, jnp.mean((jax.vmap(guess)(X) - ROOTS) ** 2), rtol=1e-9)
    expected = jax.grad(lambda g: jnp.mean((jax.vmap(g)(X) - ROOTS) ** 2))(guess)
    np.testing.assert_allclose(grad.weight, expected.weight, rtol=1e-8)


def test_a_warm_start_takes_fewer_matvecs():
    solver = nks.NewtonKrylov(
        0.0, 1e-10, linear_solver=nks.GCRODR(restart=6, recycle=3), globalisation=nks.FullStep()
    )
    layer = layer_of(solver, nks.Joint())
    z, cold = layer(X)
    assert "recycled" in cold.memory
    _, warm = layer(X + 1e-6, z, memory=cold.memory)
    _, started = layer(X + 1e-6, z)
    assert warm.success.all()
    counts = [int(info.stats["num_matvecs"]) for info in (cold, started, warm)]
    assert counts[1] < counts[0] and counts[2] <= counts[1] + 3  # 3: the images of the space


def test_a_residual_layer_solves_its_equation():
    def cell(z, x):
        return z**3 + z - x

    layer = nks.ResidualLayer(
        cell, nks.NewtonKrylov(1e-12, 1e-13), batch=nks.PerSample(), guess=jnp.zeros_like
    )
    x = jnp.linspace(-3.0, 3.0, 5)[:, None]
    z, info = layer(x)
    np.testing.assert_allclose(z**3 + z, x, atol=1e-11)
    slope = jax.grad(lambda x: jnp.sum(layer(x)[0]))(x)
    np.testing.assert_allclose(slope, 1 / (3 * z**2 + 1), rtol=1e-9)
    assert info.success.all()


def test_float32_stays_float32_and_reaches_its_tolerance():
    case = tanh_cell("near_symmetric", 64, 0.99, dtype=np.float32)
    layer = nks.ImplicitLayer(case.cell, nks.NewtonKrylov(0.0, 1e-6))
    z, info = layer(case.x, jnp.zeros(64, jnp.float32))
    assert z.dtype == jnp.float32 and bool(info.success)
    residual = np.asarray(case.cell(z, case.x), np.float64) - np.asarray(z, np.float64)
    np.testing.assert_allclose(np.linalg.norm(residual), info.residual_norm, rtol=0.2)


def test_the_contraction_is_that_of_the_root():
    case = tanh_cell("near_symmetric", 32, 0.9)
    tight = nks.NewtonKrylov(1e-10, 0.0, forcing=nks.ConstantForcing(1e-5))
    layer = nks.ImplicitLayer(case.cell, tight, guess=jnp.zeros_like)
    estimate = layer(case.x)[1].contraction()
    assert estimate.within(0.1) and abs(estimate.value - 0.9) < 0.1 * 0.9
    x, _ = inputs(case, [0.5, 0.9])
    layer = nks.ImplicitLayer(
        case.cell, nks.Picard(1e-8, 0.0, history_length=300), batch=nks.PerSample(),
        guess=jnp.zeros_like, max_steps=300,
    )  # fmt: skip
    np.testing.assert_allclose(layer(x)[1].contraction().value, [0.5, 0.9], rtol=0.02)
    preconditioned = nks.NewtonKrylov(
        1e-8, 0.0, linear_solver=nks.GMRES(preconditioner=nks.Jacobi(probes=nks.Hutchinson(4)))
    )
    _, info = nks.ImplicitLayer(case.cell, preconditioned, guess=jnp.zeros_like)(case.x)
    assert jnp.isnan(info.contraction().value)


def test_bad_arguments_are_refused():
    layer = nks.ImplicitLayer(CASE.cell)
    with pytest.raises(ValueError, match="guess"):
        layer(X[0])
    with pytest.raises(TypeError):
        nks.ImplicitLayer(CASE.cell, tolerance=1e-3)  # pyright: ignore
    with pytest.raises(ValueError, match="its own space"):
        nks.ImplicitLayer(lambda z, x: z[:-1])(X[0], jnp.zeros(SIZE))
    with pytest.raises(ValueError, match="leading axis"):
        layer_of(SOLVERS["newton"], nks.Joint())(X, jnp.zeros((3, SIZE)))
    with pytest.raises(ValueError, match="increasing"):
        layer_of(SOLVERS["newton"], nks.Single(), iterates=(3, 1))(X[0])

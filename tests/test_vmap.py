"""Lanes of a batch are solved as if alone, and nothing selects over a Krylov basis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from tests.helpers import selects_at_least

N = 11
MAX_STEPS = 12
LENGTH = MAX_STEPS + 2


def residual(y, args):
    """Coupled arctangents; `bend` adds a hump that has no root, `b` may be NaN."""
    left = jnp.roll(y, 1)
    smooth = jnp.arctan(args["scale"] * (y - 0.2 * left)) - args["b"]
    return smooth + args["bend"] * (1.0 + y**2)


SOLVER = nks.NewtonKrylov(rtol=1e-9, atol=1e-9, history_length=LENGTH)


def _lanes():
    near, far = jnp.linspace(-0.1, 0.1, N), jnp.linspace(6.0, 9.0, N)
    b = jnp.linspace(-0.3, 0.3, N)
    lanes = {
        "near": (near, 1.0, 0.0, b),
        "further": (0.1 * far, 1.0, 0.0, b),
        "rejections": (far, 1.0, 0.0, b),
        "nan": (near, 1.0, 0.0, b.at[2].set(jnp.nan)),
        "no root": (near, 1.0, 3.0, b),
        "many": (60.0 * far, 1.0, 0.0, b),
        "at the root": (jnp.zeros(N), 2.0, 0.0, jnp.zeros(N)),
        "steep": (0.5 * far, 3.0, 0.0, -b),
    }
    starts = jnp.stack([y0 for y0, *_ in lanes.values()])
    args = {
        "scale": jnp.array([scale for _, scale, _, _ in lanes.values()]),
        "bend": jnp.array([bend for _, _, bend, _ in lanes.values()]),
        "b": jnp.stack([b for *_, b in lanes.values()]),
    }
    return list(lanes), starts, args


@jax.jit
def _alone(y0, args):
    solution = nks.root_find(residual, SOLVER, y0, args, max_steps=MAX_STEPS, throw=False)
    stats = dict(solution.stats)
    reason, history = stats.pop("reason"), stats.pop("history")
    return solution.value, solution.result._value, reason._value, stats, history


_together = jax.jit(jax.vmap(_alone))
NORMS = ("residual_norm", "initial_residual_norm")


def test_lanes_are_as_if_alone():
    names, starts, args = _lanes()
    values, results, reasons, stats, history = _together(starts, args)
    seen = {}
    for i, name in enumerate(names):
        own = _alone(starts[i], jax.tree.map(lambda x, i=i: x[i], args))
        value, result, reason, own_stats, own_history = own
        assert int(results[i]) == int(result), name
        assert int(reasons[i]) == int(reason), name
        np.testing.assert_allclose(values[i], value, rtol=1e-9, atol=1e-10, err_msg=name)
        for key, counter in own_stats.items():
            if key in NORMS:
                np.testing.assert_allclose(stats[key][i], counter, rtol=1e-3, atol=1e-13)
            elif key not in ("max_steps", "arnoldi"):
                assert int(stats[key][i]) == int(counter), (name, key)
        for key in ("accepted", "reason", "num_matvecs"):
            lane, alone = getattr(history, key)[i], getattr(own_history, key)
            np.testing.assert_array_equal(lane, alone, err_msg=f"{name} {key}")
        for key in ("norm", "eta", "step_length"):
            lane, alone = getattr(history, key)[i], getattr(own_history, key)
            np.testing.assert_allclose(lane, alone, rtol=1e-3, atol=1e-12, err_msg=name)
        seen[name] = (nks.reason_name(int(reason)), own_stats)
    # The batch holds what it is meant to hold.
    assert seen["nan"][0] == "nonfinite"
    assert {seen[name][0] for name in ("near", "further", "rejections", "steep")} <= {
        "residual_rtol",
        "residual_atol",
    }
    assert seen["at the root"][0] == "residual_atol"
    assert int(seen["at the root"][1]["num_fn_evals"]) == 1
    assert "max_steps" in {reason for reason, _ in seen.values()}
    assert int(seen["rejections"][1]["num_rejected_steps"]) > 0
    assert len({int(own["num_fn_evals"]) for _, own in seen.values()}) >= 5


def test_a_failed_lane_returns_its_best_finite_point():
    names, starts, args = _lanes()
    values, *_, stats, history = _together(starts, args)
    for name in ("no root", "many"):
        i = names.index(name)
        assert np.all(np.isfinite(values[i]))
        rows = np.asarray(history.norm[i])
        assert float(stats["residual_norm"][i]) == np.nanmin(rows)


def test_nested_vmap():
    _, starts, args = _lanes()
    pick = jnp.array([[0, 1, 2], [6, 7, 3]])
    grid = jax.tree.map(lambda x: x[pick], (starts, args))
    nested = jax.jit(jax.vmap(jax.vmap(_alone)))(*grid)
    flat = _together(starts, args)
    for path, (inner, outer) in enumerate(
        zip(jax.tree.leaves(nested[:3]), jax.tree.leaves(flat[:3]), strict=True)
    ):
        np.testing.assert_allclose(inner, outer[pick], rtol=1e-9, atol=1e-10, err_msg=str(path))
    for key in ("num_fn_evals", "num_matvecs", "num_steps", "num_rejected_steps"):
        np.testing.assert_array_equal(nested[3][key], flat[3][key][pick])


def test_a_failed_lane_leaves_the_gradients_of_the_others_alone():
    names, starts, args = _lanes()

    def loss(args, y0):
        solution = nks.root_find(residual, SOLVER, y0, args, max_steps=MAX_STEPS, throw=False)
        return jnp.sum(jnp.sin(solution.value))

    gradients = jax.jit(jax.vmap(jax.grad(loss)))(args, starts)
    for name in ("near", "rejections", "steep"):
        i = names.index(name)
        lane = jax.tree.map(lambda x, i=i: x[i], args)
        y = _alone(starts[i], lane)[0]
        by_y = jax.jacfwd(residual)(y, lane)
        (expected,) = jax.vjp(lambda a, y=y: residual(y, a), lane)[1](
            -jnp.linalg.solve(by_y.T, jnp.cos(y))
        )
        for key, leaf in expected.items():
            np.testing.assert_allclose(gradients[key][i], leaf, rtol=1e-6, atol=1e-8)


# --- the lowered program --------------------------------------------------------------------


def _stencil(y, args):
    left = jnp.concatenate([jnp.zeros(1), y[:-1]])
    return 3.0 * y - 2.0 * left + y**3 - args


@pytest.mark.parametrize("transform", [lambda f: f, jax.grad], ids=["solve", "grad"])
def test_no_select_over_a_basis(transform):
    batch, n, restart = 5, 67, 30
    krylov = nks.GMRES(restart=restart)
    solver = nks.NewtonKrylov(rtol=1e-9, atol=1e-9, linear_solver=krylov)

    def loss(b):
        return jnp.sum(nks.root_find(_stencil, solver, jnp.zeros(n), b, throw=False).value)

    text = jax.jit(jax.vmap(transform(loss))).lower(jnp.ones((batch, n))).as_text()
    assert f"{restart + 1}x{n}x" in text  # the basis is there …
    assert selects_at_least(text, batch * n)  # … selects of vectors are seen …
    # … and none is of a basis, of one lane or of all (Hessenberg matrices are no larger than that)
    assert selects_at_least(text, batch * (restart + 1) * n) == []
    shapes = [t.shape for t in selects_at_least(text, (restart + 1) * n)]
    assert [shape for shape in shapes if n in shape and restart + 1 in shape] == []

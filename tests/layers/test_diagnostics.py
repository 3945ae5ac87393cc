"""Estimates of the contraction of a fixed-point map, against dense eigenvalues."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.accelerate.picard import Picard
from nksolve.krylov.ritz import ArnoldiRecord
from nksolve.layers.diagnostics import history_contraction, krylov_contraction, spectral_radius
from nksolve.linearise.tags import holomorphic_tag
from nksolve.verbs.fixed_point import fixed_point
from tests.helpers import Counter
from tests.helpers.cells import CONTRACTIVE, SPECTRA, inputs, tanh_cell

D = 64
CASES = [(s, r) for s in CONTRACTIVE for r in (0.5, 0.9, 0.99)]
CASES += [("ginibre", 0.5), ("monotone", 1.5)]


def dense_radius(fn, z, x):
    return float(np.max(np.abs(np.linalg.eigvals(np.asarray(jax.jacfwd(fn)(z, x))))))


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_cells_are_what_they_say(spectrum):
    rhos = {"ginibre": [0.5, 0.64], "monotone": [0.9, 1.5]}.get(spectrum, [0.5, 0.9, 0.99])
    for size in (1, 2, 9, 64):
        for rho in rhos:
            case = tanh_cell(spectrum, size, rho)
            np.testing.assert_allclose(case.cell(case.root, case.x), case.root, atol=1e-14)
            assert abs(dense_radius(case.cell, case.root, case.x) / rho - 1) < 1e-6
            weight = np.asarray(case.cell.weight)
            if spectrum in CONTRACTIVE:
                assert np.linalg.norm(weight, 2) < 1
            assert np.linalg.eigvalsh(weight + weight.T)[-1] < 2
    x, roots = inputs(case, [rhos[0], rhos[-1]])
    for a, z, rho in zip(x, roots, (rhos[0], rhos[-1]), strict=True):
        np.testing.assert_allclose(case.cell(z, a), z, atol=1e-14)
        assert abs(dense_radius(case.cell, z, a) / rho - 1) < 1e-6
    with pytest.raises(ValueError, match=r"ρ"):
        inputs(case, [case.omega])


@ft.cache
def _measured(matvecs):
    return eqx.filter_jit(
        lambda cell, z, x, key: spectral_radius(cell, z, x, key=key, num_matvecs=matvecs)
    )


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("spectrum", "rho"), CASES)
def test_twenty_matvecs_find_the_radius(spectrum, rho, dtype):
    case = tanh_cell(spectrum, D, rho, dtype=dtype)
    for seed in range(3):
        out = _measured(20)(case.cell, case.root, case.x, jax.random.key(seed))
        assert out.value.dtype == dtype and int(out.num_matvecs) == 20
        off = abs(float(out.value) - rho)
        assert off < (0.2 if spectrum == "ginibre" else 0.07) * rho
        assert off < 2 * float(out.error) + 1e-4 * rho
        if spectrum in ("near_symmetric", "outliers", "symmetric", "monotone"):
            assert off < 0.01 * rho
        if spectrum == "outliers":
            assert bool(out.within(1e-3))


def test_as_many_matvecs_as_unknowns_are_exact():
    case = tanh_cell("disc", 9, 0.9)
    out = _measured(20)(case.cell, case.root, case.x, jax.random.key(0))
    assert int(out.num_matvecs) == 9  # its rim is a conjugate pair
    np.testing.assert_allclose(out.value, 0.9, rtol=1e-10)
    assert float(out.error) < 1e-10


def _rotated(z, args):
    """z ↦ a z + b z̄: eigenvalues of the real map are known, those of the complex one with b = 0."""
    a, b = args
    return a * z + b * z.conj()


def test_complex_unknowns_count_as_real_pairs_unless_holomorphic():
    a, b = jnp.asarray([0.3 + 0.4j, 0.1 + 0.2j]), jnp.asarray([0.6 + 0j, 0.0 + 0j])
    z = jnp.ones(2, complex)
    # a z + b z̄: λ = Re a ± √(|b|² − (Im a)²)
    out = spectral_radius(_rotated, z, (a, b), key=jax.random.key(0))
    assert int(out.num_matvecs) == 4
    np.testing.assert_allclose(out.value, 0.3 + np.sqrt(0.36 - 0.16), rtol=1e-12)
    nothing = jnp.zeros_like(b)
    tags = frozenset({holomorphic_tag})
    out = spectral_radius(_rotated, z, (a, nothing), key=jax.random.key(0), tags=tags)
    assert int(out.num_matvecs) == 2
    np.testing.assert_allclose(out.value, 0.5, rtol=1e-12)


def test_trees_and_edges():
    tree = {"u": jnp.ones(3), "v": jnp.ones((2, 2), np.float32)}

    def halved(z, args):
        return jax.tree.map(lambda x, c: jnp.asarray(c, x.dtype) * x, z, args)

    key = jax.random.key(1)
    out = spectral_radius(halved, tree, {"u": -0.75, "v": 0.5}, key=key)
    np.testing.assert_allclose(out.value, 0.75, rtol=1e-5)
    one = spectral_radius(lambda z, _: -3 * z, jnp.ones(1), key=key)
    assert (float(one.value), int(one.num_matvecs)) == (3.0, 1) and float(one.error) < 1e-14
    zero = spectral_radius(lambda z, _: 0 * z, jnp.ones(4), key=key)
    assert (float(zero.value), float(zero.error)) == (0, 0)
    bad = spectral_radius(lambda z, _: jnp.nan * z, jnp.ones(4), key=key)
    assert np.isnan(bad.value) and np.isinf(bad.error) and not bool(bad.within(0.5))
    empty = spectral_radius(lambda z, _: z, (), key=key)
    assert (float(empty.value), int(empty.num_matvecs)) == (0, 0)
    with pytest.raises(ValueError, match="num_matvecs"):
        spectral_radius(halved, tree, 0.5, key=key, num_matvecs=0)
    with pytest.raises(ValueError, match="into its own space"):
        spectral_radius(lambda z, _: z[:1], jnp.ones(2), key=key)


def test_a_nilpotent_map_shows_its_transient():
    """ρ = 0, but sixty steps go by before anything shrinks below 0.9ᵏ: the documented exception."""
    shift = 0.9 * jnp.eye(D, k=1)
    out = spectral_radius(lambda z, _: shift @ z, jnp.ones(D), key=jax.random.key(0))
    assert 0.8 < float(out.value) < 0.9


@ft.cache
def _solve(tol):
    solver = nks.NewtonKrylov(tol, 0.0)
    return eqx.filter_jit(lambda cell, x, z0: fixed_point(cell, solver, z0, x, throw=False))


@pytest.mark.parametrize(("spectrum", "rho"), CASES)
def test_ritz_values_of_the_solve_are_free_and_say_when_they_are_good(spectrum, rho):
    estimates = []
    for seed in range(3):
        case = tanh_cell(spectrum, D, rho, seed)
        for tol in (1e-4, 1e-8):
            record = _solve(tol)(case.cell, case.x, case.z0).stats["arnoldi"]
            out = krylov_contraction(record)
            assert int(out.num_matvecs) == 0
            if int(record.columns) < 6:
                assert np.isinf(out.error)
            if bool(out.within(0.1)):
                estimates.append(float(out.value) / rho - 1)
    if estimates:
        assert max(abs(e) for e in estimates) < 0.13
        assert np.median(np.abs(estimates)) < 0.08
    if rho == 0.99:
        assert len(estimates) >= 3


def test_a_loose_solve_is_not_trusted():
    case = tanh_cell("outliers", D, 0.99)
    record = _solve(0.5)(case.cell, case.x, case.z0).stats["arnoldi"]
    assert not bool(krylov_contraction(record).within(0.1))
    unsolved = ArnoldiRecord.allocate(case.z0, 20, real=True)
    out = krylov_contraction(unsolved)
    assert np.isnan(out.value) and np.isinf(out.error)


def test_matvecs_are_spent_only_where_the_record_is_not_good_enough():
    case, counter = tanh_cell("near_symmetric", D, 0.99), Counter()
    record = _solve(1e-4)(case.cell, case.x, case.z0).stats["arnoldi"]
    unsolved = ArnoldiRecord(jnp.zeros_like(record.matrix), jnp.zeros_like(record.columns))
    cell = lambda z, x: case.cell(counter.tick(z), x)

    @jax.jit
    def estimate(record):
        return spectral_radius(
            cell, case.root, case.x, key=jax.random.key(0), num_matvecs=25, record=record
        )

    with counter.measure() as count:
        out = estimate(record)
    assert (count.primal, count.tangent, int(out.num_matvecs)) == (0, 0, 0)
    np.testing.assert_array_equal(out.value, krylov_contraction(record).value)
    with counter.measure() as count:
        out = estimate(unsolved)
    assert (count.primal, count.tangent, int(out.num_matvecs)) == (1, 25, 25)
    np.testing.assert_allclose(out.value, 0.99, rtol=0.01)


def test_lanes_are_as_if_alone_and_nothing_is_differentiated():
    case = tanh_cell("near_symmetric", D, 0.99)
    x, z = inputs(case, [0.5, 0.99, 0.9])
    both = jax.vmap(lambda x, z0: _solve(1e-4)(case.cell, x, z0))(x, jnp.zeros_like(z))
    record = both.stats["arnoldi"]
    record = eqx.tree_at(lambda r: r.columns, record, record.columns.at[2].set(0))

    def estimate(z, x, record):
        return spectral_radius(case.cell, z, x, key=jax.random.key(3), record=record)

    together = jax.jit(jax.vmap(estimate))(z, x, record)
    trusted = np.asarray(jax.vmap(krylov_contraction)(record).within(0.1))
    assert trusted[1] and not trusted[2]
    np.testing.assert_array_equal(together.num_matvecs, np.where(trusted, 0, 20))
    np.testing.assert_allclose(together.value, [0.5, 0.99, 0.9], rtol=0.1)
    for i in range(3):
        alone = estimate(z[i], x[i], jax.tree.map(lambda a, i=i: a[i], record))
        np.testing.assert_allclose(together.value[i], alone.value, rtol=1e-6)

    def loss(z):
        return spectral_radius(case.cell, z, x[0], key=jax.random.key(3)).value

    np.testing.assert_array_equal(jax.grad(loss)(z[0]), jnp.zeros(D))


@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_a_history_of_picard_gives_its_rate(damping):
    case = tanh_cell("outliers", D, 0.9)
    solver = Picard(1e-9, 0.0, damping=damping, history_length=700)
    sol = fixed_point(case.cell, solver, case.z0, case.x, max_steps=700)
    out = history_contraction(sol.stats["history"].norm)
    rate = 1 - damping + damping * 0.9  # the eigenvalue 0.9 is the slowest with either
    assert abs(float(out.value) - rate) < 0.01
    assert float(out.error) < 0.01


def test_histories_at_the_edge():
    exact = 2.0 * 0.5 ** jnp.arange(10.0)
    out = history_contraction(exact)
    np.testing.assert_allclose([out.value, out.error], [0.5, 0.0], atol=1e-14)
    padded = history_contraction(jnp.concatenate([exact[:4], jnp.full(7, jnp.nan)]))
    np.testing.assert_allclose([padded.value, padded.error], [0.5, 0.0], atol=1e-14)
    single = history_contraction(exact[:1])
    assert np.isnan(single.value) and np.isinf(single.error)
    pair = history_contraction(exact[:2])
    assert float(pair.value) == pytest.approx(0.5) and np.isinf(pair.error)
    changing = history_contraction(jnp.asarray([1.0, 0.1, 0.01, 0.005, 0.0025]))
    assert float(changing.error) == pytest.approx(0.4)
    solved = history_contraction(jnp.asarray([1.0, 0.1, 0.0]))
    assert np.isfinite(solved.value) and float(solved.value) < 1e-10
    with pytest.raises(ValueError, match="window"):
        history_contraction(exact, window=1)

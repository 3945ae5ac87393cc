"""IDR(s) against dense solves, a textbook in NumPy, and the counts of its neighbours."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.krylov.bicgstab import BiCGStab
from nksolve.krylov.idr import IDR
from nksolve.krylov.shadow import random_like
from tests.helpers import GALLERY
from tests.helpers.gallery import N
from tests.krylov import nonsymmetric as common
from tests.krylov.nonsymmetric import A, B

ONE = ft.partial(IDR, s=1)
COMPLEX = A + 1j * np.diag(np.linspace(-1, 1, N)), B * (1 + 0.5j) + 0.1j


@pytest.mark.parametrize("name", list(GALLERY))
@pytest.mark.parametrize(
    ("s", "dtype"), [(4, np.float64), (4, np.float32), (2, np.complex128), (1, np.float64)]
)
def test_gallery(name, s, dtype):
    ok, _ = common.check_gallery(name, IDR(s=s), dtype)
    assert ok == GALLERY[name].consistent or name == "ill_conditioned"


def _rows(basis):
    return np.stack([np.asarray(basis.row(jnp.int32(i))) for i in range(basis.size)])


def _textbook(matrix, rhs, p, steps):
    """van Gijzen & Sonneveld (2011), algorithm 2; rows of `p` are the shadow vectors."""
    s, kappa = len(p), 0.7
    x, r, omega = np.zeros_like(rhs), rhs.copy(), 1.0
    g, u = np.zeros((2, s, len(rhs)), rhs.dtype)
    m = np.eye(s, dtype=rhs.dtype)
    made = 0
    while True:
        f = p.conj() @ r
        for k in range(s):
            c = np.linalg.solve(m[k:, k:], f[k:])
            v = r - c @ g[k:]
            u[k] = omega * v + c @ u[k:]
            g[k] = matrix @ u[k]
            for i in range(k):
                alpha = np.vdot(p[i], g[k]) / m[i, i]
                g[k], u[k] = g[k] - alpha * g[i], u[k] - alpha * u[i]
            m[k:, k] = p[k:].conj() @ g[k]
            beta = f[k] / m[k, k]
            x, r = x + beta * u[k], r - beta * g[k]
            f[k + 1 :] -= beta * m[k + 1 :, k]
            made += 1
            if made == steps:
                return x
        t = matrix @ r
        cosine = abs(np.vdot(t, r)) / np.linalg.norm(t) / np.linalg.norm(r)
        omega = np.vdot(t, r) / np.vdot(t, t) * max(1.0, kappa / cosine)
        x, r = x + omega * r, r - omega * t
        made += 1
        if made == steps:
            return x


@pytest.mark.parametrize(("matrix", "rhs"), [(A, B), COMPLEX], ids=["real", "complex"])
def test_iterates_are_those_of_the_textbook(matrix, rhs):
    p = _rows(IDR(s=3).workspace(jnp.asarray(rhs), real=not np.iscomplexobj(rhs)))
    for steps in (4, 7, 10):
        x, out = common.after(steps, IDR, matrix, rhs, s=3)
        y = 0.25 * _textbook(0.25 * matrix, rhs, p, steps)
        np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-11)
        image = matrix @ x
        np.testing.assert_allclose(out.residual_norm, np.linalg.norm(rhs - image), rtol=1e-8)
        np.testing.assert_allclose(out.descent, np.vdot(rhs, image).real, rtol=1e-8)
        assert int(out.num_matvecs) == int(out.num_preconditioner_applications) == steps


def test_shadow_space():
    for dtype, real in ((np.float64, True), (np.float32, True), (np.complex128, False)):
        vector = {"a": jnp.zeros((3, 5), dtype), "b": jnp.zeros(4, dtype)}
        basis = jax.jit(lambda v: IDR(s=6).workspace(v, real=real))(vector)
        rows = np.stack([common.join(basis.row(jnp.int32(i))) for i in range(6)])
        np.testing.assert_allclose(rows @ rows.conj().T, np.eye(6), atol=20 * np.finfo(dtype).eps)
    # ℂⁿ as ℝ²ⁿ has twice as many dimensions.
    two = jnp.zeros(2, np.complex128)
    sizes = [IDR(s=9).workspace(two, real=real).size for real in (True, False)]
    assert sizes == [4, 2]


def test_random_vectors_are_uniform_and_independent():
    draws = np.stack([random_like(jnp.zeros(4000), i) for i in range(4)])
    assert np.all(np.abs(draws) <= 1)
    np.testing.assert_allclose(draws.mean(1), 0, atol=0.04)
    np.testing.assert_allclose((draws**2).mean(1), 1 / 3, rtol=0.05)
    gram = draws @ draws.T / 4000 * 3
    np.testing.assert_allclose(gram, np.eye(4), atol=0.06)
    half = random_like(jnp.zeros(4000, np.float16), 0)
    assert half.dtype == np.float16 and bool(jnp.all(jnp.isfinite(half)))
    both = random_like(jnp.zeros(4000, np.complex64), 0)
    assert abs(np.corrcoef(both.real, both.imag)[0, 1]) < 0.06


def test_one_does_what_bicgstab_does():
    for preconditioned in (True, False):
        ours = int(common.kelley(ONE, preconditioned)["num_matvecs"])
        theirs = int(common.kelley(BiCGStab, preconditioned)["num_matvecs"])
        assert 0.7 * theirs <= ours <= 1.4 * theirs


def test_four_needs_little_more_than_gmres():
    """Kelley's convection–diffusion problem, without a preconditioner, against full GMRES."""
    full = int(common.kelley(ft.partial(nks.GMRES, restart=200), False)["num_matvecs"])
    assert int(common.kelley(IDR, False)["num_matvecs"]) <= 1.3 * full


def test_ends_within_n_plus_n_over_s_matvecs():
    """A well-conditioned matrix of which only the dimension counts: n + n/s + 1 at most."""
    rng = np.random.default_rng(8)
    n = 20
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    _, result, stats = common.solve(q + 0.2 * np.eye(n), np.ones(n), IDR(rtol=1e-6, s=4))
    assert common.is_(result, "successful") and int(stats["num_steps"]) <= n + n // 4 + 1


@pytest.mark.parametrize("make", [IDR, ONE], ids=["4", "1"])
def test_exits(make):
    common.check_exits(make(rtol=1e-8))


def test_units():
    common.check_units(IDR(rtol=1e-4))


def test_counters():
    common.check_counters(IDR)


def test_lanes():
    common.check_lanes(IDR())


def test_derivatives():
    common.check_derivatives(IDR(rtol=1e-11, preconditioner=common.SCALED))


def test_complex_derivatives():
    common.check_derivatives(IDR(rtol=1e-11), np.complex128)


def test_in_newton():
    common.check_newton(IDR)


def test_max_steps():
    x, result, stats = common.solve(A, B, IDR(rtol=1e-12, max_steps=7))
    assert common.is_(result, "max_steps_reached") and common.counts(stats) == (7, 8, 0)
    assert np.linalg.norm(B - A @ x) < np.linalg.norm(B)


def test_refused():
    for keywords in ({"rtol": -1.0}, {"atol": -1.0}, {"max_steps": -1}, {"s": 0}):
        with pytest.raises(ValueError, match=next(iter(keywords))):
            IDR(**keywords)

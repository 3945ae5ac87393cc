"""BiCGStab and BiCGstab(ℓ) against dense solves, SciPy's iterates and published counts."""

import functools as ft

import numpy as np
import pytest
import scipy.sparse.linalg as spla

from nksolve.krylov.bicgstab import BiCGStab
from tests.helpers import GALLERY
from tests.helpers.gallery import N
from tests.krylov import nonsymmetric as common
from tests.krylov.nonsymmetric import A, B

TWO = ft.partial(BiCGStab, ell=2)
HARD = {"ill_conditioned", "singular_inconsistent"}
COMPLEX = A + 1j * np.diag(np.linspace(-1, 1, N)), B * (1 + 0.5j) + 0.1j


@pytest.mark.parametrize("name", list(GALLERY))
@pytest.mark.parametrize(
    ("ell", "dtype"), [(1, np.float64), (1, np.float32), (2, np.complex128), (4, np.float64)]
)
def test_gallery(name, ell, dtype):
    """The shift is the textbook's worst: a solver may fail on it, but says so."""
    ok, _ = common.check_gallery(name, BiCGStab(ell=ell), dtype)
    assert name == "cyclic_shift" or ok == (name not in HARD)


@pytest.mark.parametrize(("matrix", "rhs"), [(A, B), COMPLEX], ids=["real", "complex"])
def test_iterates_are_those_of_scipy(matrix, rhs):
    for steps in (1, 2, 5):
        x, out = common.after(steps, BiCGStab, matrix, rhs)
        y, _ = spla.bicgstab(matrix, rhs, rtol=0.0, atol=0.0, maxiter=steps, M=0.25 * np.eye(N))
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
        image = matrix @ x
        np.testing.assert_allclose(out.residual_norm, np.linalg.norm(rhs - image), rtol=1e-9)
        np.testing.assert_allclose(out.descent, np.vdot(rhs, image).real, rtol=1e-9)
        assert int(out.num_matvecs) == int(out.num_preconditioner_applications) == 2 * steps


def _textbook(matrix, rhs, ell, cycles):
    """Sleijpen & Fokkema (1993): BiCG by its bi-orthogonality, least squares by `lstsq`."""
    x, r, shadow = np.zeros_like(rhs), rhs.copy(), rhs.copy()
    u, rho, alpha, omega = np.zeros_like(rhs), 1.0, 0.0, 1.0
    for _ in range(cycles):
        rs, us, rho = [r], [u], -omega * rho
        for j in range(ell):
            new = np.vdot(shadow, rs[j])
            beta, rho = alpha * new / rho, new
            us = [a - beta * b for a, b in zip(rs, us, strict=True)]
            us.append(matrix @ us[j])
            alpha = rho / np.vdot(shadow, us[j + 1])
            rs = [a - alpha * b for a, b in zip(rs, us[1:], strict=True)]
            rs.append(matrix @ rs[j])
            x = x + alpha * us[0]
        gamma = np.linalg.lstsq(np.stack(rs[1:], 1), rs[0])[0]
        omega = gamma[-1]
        x = x + np.stack(rs[:-1], 1) @ gamma
        r = rs[0] - np.stack(rs[1:], 1) @ gamma
        u = us[0] - np.stack(us[1:], 1) @ gamma
    return x


@pytest.mark.parametrize(("matrix", "rhs"), [(A, B), COMPLEX], ids=["real", "complex"])
@pytest.mark.parametrize("ell", [2, 3])
def test_iterates_are_those_of_the_textbook(ell, matrix, rhs):
    x, out = common.after(2 * ell, BiCGStab, matrix, rhs, ell=ell)
    y = 0.25 * _textbook(0.25 * matrix, rhs, ell, 2)
    np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-11)
    true = np.linalg.norm(rhs - matrix @ x)
    np.testing.assert_allclose(out.residual_norm, true, rtol=1e-7)
    assert int(out.num_matvecs) == int(out.num_preconditioner_applications) == 4 * ell


@pytest.mark.parametrize(
    ("preconditioned", "history"), [(True, 8), (False, 37)], ids=["poisson", "plain"]
)
def test_kelleys_history_lengths(preconditioned, history):
    stats = common.kelley(BiCGStab, preconditioned)
    assert int(stats["num_steps"]) + 1 == history
    assert int(stats["num_restarts"]) == 0


def test_leaves_at_the_half_step():
    """A = I: the first half of the first step finds the solution."""
    x, result, stats = common.solve(2 * np.eye(N), B, BiCGStab(rtol=1e-10))
    assert common.is_(result, "successful") and common.counts(stats) == (1, 2, 0)
    np.testing.assert_allclose(x, B / 2, rtol=1e-14)


def test_eigenvalues_near_the_imaginary_axis():
    """Where a real polynomial of degree one stands still, one of degree two does not."""
    rng = np.random.default_rng(3)
    m = rng.standard_normal((N - 1, N - 1))
    matrix, rhs = m - m.T + 0.3 * np.eye(N - 1), rng.standard_normal(N - 1)
    _, one, _ = common.solve(matrix, rhs, BiCGStab(rtol=1e-7))
    x, two, stats = common.solve(matrix, rhs, TWO(rtol=1e-7))
    assert not common.is_(one, "successful") and common.is_(two, "successful")
    assert np.linalg.norm(rhs - matrix @ x) <= 1e-7 * np.linalg.norm(rhs) * (1 + 1e-6)
    assert int(stats["num_matvecs"]) <= 4 * N


def test_renewed_shadow_gets_over_a_breakdown():
    """⟨r, A r⟩ = 0 for skew-symmetric A: r̃ = r fails at once, a random r̃ solves."""
    rng = np.random.default_rng(3)
    m = rng.standard_normal((N - 1, N - 1))
    skew, rhs = m - m.T, rng.standard_normal(N - 1)
    x, result, stats = common.solve(skew, rhs, TWO(rtol=1e-7))
    assert common.is_(result, "successful") and int(stats["num_restarts"]) >= 1
    assert np.linalg.norm(rhs - skew @ x) <= 1e-7 * np.linalg.norm(rhs) * (1 + 1e-6)
    # One real polynomial of degree one gains nothing here, whatever r̃: reported as what it is.
    x, result, stats = common.solve(skew, rhs, BiCGStab(rtol=1e-7))
    assert common.is_(result, "breakdown", "stagnation", "max_steps_reached")
    assert np.linalg.norm(rhs - skew @ x) <= np.linalg.norm(rhs) * (1 + 1e-12)


@pytest.mark.parametrize("make", [BiCGStab, TWO], ids=["1", "2"])
def test_exits(make):
    common.check_exits(make(rtol=1e-8))


def test_units():
    common.check_units(BiCGStab(rtol=1e-4))


@pytest.mark.parametrize("make", [BiCGStab, TWO], ids=["1", "2"])
def test_counters(make):
    common.check_counters(make)


@pytest.mark.parametrize("make", [BiCGStab, TWO], ids=["1", "2"])
def test_lanes(make):
    common.check_lanes(make())


def test_derivatives():
    common.check_derivatives(BiCGStab(rtol=1e-11, preconditioner=common.SCALED))


def test_complex_derivatives():
    common.check_derivatives(TWO(rtol=1e-11), np.complex128)


def test_in_newton():
    common.check_newton(BiCGStab)


def test_max_steps():
    x, result, stats = common.solve(A, B, BiCGStab(rtol=1e-12, max_steps=3))
    assert common.is_(result, "max_steps_reached") and common.counts(stats) == (3, 7, 0)
    assert np.linalg.norm(B - A @ x) < np.linalg.norm(B)


def test_refused():
    for keywords in ({"rtol": -1.0}, {"atol": -1.0}, {"max_steps": -1}, {"ell": 0}):
        with pytest.raises(ValueError, match=next(iter(keywords))):
            BiCGStab(**keywords)

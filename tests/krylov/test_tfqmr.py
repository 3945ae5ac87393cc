"""TFQMR against dense solves, SciPy's iterates, and what every such method is held to."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg as spla

from nksolve.krylov.tfqmr import TFQMR
from tests.helpers import GALLERY
from tests.helpers.gallery import N
from tests.krylov import nonsymmetric as common
from tests.krylov.nonsymmetric import A, B

HARD = {"ill_conditioned", "singular_inconsistent"}


@pytest.mark.parametrize("name", list(GALLERY))
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex128])
def test_gallery(name, dtype):
    ok, _ = common.check_gallery(name, TFQMR(), dtype)
    if dtype != np.float32:
        assert ok == (name not in HARD)
    else:
        assert ok or name in HARD | {"cyclic_shift"}


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_iterates_are_those_of_scipy(dtype):
    """SciPy's TFQMR counts half-steps too, and recurs on no residual."""
    matrix, rhs = A.astype(dtype), B.astype(dtype)
    if dtype == np.complex128:
        matrix, rhs = matrix + 1j * np.diag(np.linspace(-1, 1, N)), rhs * (1 + 0.5j) + 0.1j
    for steps in (1, 2, 7):
        x, out = common.after(steps, TFQMR, matrix, rhs)
        y, _ = spla.tfqmr(matrix, rhs, rtol=0.0, atol=0.0, maxiter=steps, M=0.25 * np.eye(N))
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)
        # The residual that is carried along is the true one, and so is the descent.
        image = matrix @ x
        np.testing.assert_allclose(out.residual_norm, np.linalg.norm(rhs - image), rtol=1e-9)
        np.testing.assert_allclose(out.descent, np.vdot(rhs, image).real, rtol=1e-9)


def test_exits():
    common.check_exits(TFQMR(rtol=1e-8))


def test_units():
    common.check_units(TFQMR(rtol=1e-4))


def test_counters():
    common.check_counters(TFQMR)


def test_lanes():
    common.check_lanes(TFQMR())


def test_derivatives():
    common.check_derivatives(TFQMR(rtol=1e-11, preconditioner=common.SCALED))


def test_complex_derivatives():
    common.check_derivatives(TFQMR(rtol=1e-11), np.complex128)


def test_in_newton():
    common.check_newton(TFQMR)


def test_renewed_shadow_gets_over_a_breakdown():
    """⟨r, A r⟩ = 0 for skew-symmetric A: r̃ = r fails at once, a random r̃ solves."""
    rng = np.random.default_rng(3)
    m = rng.standard_normal((N - 1, N - 1))
    skew, rhs = m - m.T, rng.standard_normal(N - 1)
    x, result, stats = common.solve(skew, rhs, TFQMR(rtol=1e-7, max_steps=2000))
    assert common.is_(result, "successful") and int(stats["num_restarts"]) >= 1
    assert np.linalg.norm(rhs - skew @ x) <= 1e-7 * np.linalg.norm(rhs) * (1 + 1e-6)


def test_max_steps():
    x, result, stats = common.solve(A, B, TFQMR(rtol=1e-12, max_steps=5))
    assert common.is_(result, "max_steps_reached") and common.counts(stats) == (5, 6, 0)
    assert np.linalg.norm(B - A @ x) < np.linalg.norm(B)


def test_refused():
    for keywords in ({"rtol": -1.0}, {"atol": -1.0}, {"max_steps": -1}):
        with pytest.raises(ValueError, match=next(iter(keywords))):
            TFQMR(**keywords)


def test_kelley():
    """As many matvecs as BiCGStab with the Poisson solver."""
    stats = common.kelley(TFQMR, True)
    assert int(stats["num_steps"]) <= 14 and jnp.isfinite(stats["residual_norm"])

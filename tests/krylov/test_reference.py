"""The textbook GMRES of these tests is itself right."""

import numpy as np
import pytest

from tests.helpers import GALLERY
from tests.krylov.reference import contraction, gmres

_REGULAR = [name for name, case in GALLERY.items() if not case.singular and name != "zero_rhs"]


@pytest.mark.parametrize("name", _REGULAR)
def test_minimises_over_the_krylov_space(name):
    """‖r_j‖ is the distance of b from A K_j, found here by an orthonormal basis of that space."""
    matrix, rhs = GALLERY[name].matrix, GALLERY[name].rhs
    run = gmres(matrix, rhs, 1e-12 * np.linalg.norm(rhs))
    true = np.linalg.norm(rhs - matrix @ run.value)
    assert true <= run.residuals[-1] + 1e-12 * np.linalg.norm(rhs)
    space = np.zeros((len(rhs), 0))
    v = rhs / np.linalg.norm(rhs)
    for j in range(5):
        image = np.linalg.qr(np.column_stack([space, v]))[0]
        space, v = image, matrix @ image[:, -1]
        basis = np.linalg.qr(matrix @ space)[0]
        distance = np.linalg.norm(rhs - basis @ (basis.T @ rhs))
        np.testing.assert_allclose(run.residuals[j + 1], distance, rtol=1e-6, atol=1e-10)


def test_zero_and_complex():
    case = GALLERY["zero_rhs"]
    assert len(gmres(case.matrix, case.rhs, 0.0).residuals) == 1
    rng = np.random.default_rng(3)
    matrix = np.eye(9) * 3 + rng.standard_normal((9, 9)) + 1j * rng.standard_normal((9, 9))
    rhs = rng.standard_normal(9) + 1j * rng.standard_normal(9)
    run = gmres(matrix, rhs, 1e-11)
    np.testing.assert_allclose(run.value, np.linalg.solve(matrix, rhs), rtol=1e-9)
    assert np.all(np.diff(run.residuals) <= 1e-14)


def test_contraction_has_the_spectral_radius_asked_for():
    matrix = contraction(np.random.default_rng(0), 50, 0.5)
    radius = np.max(np.abs(np.linalg.eigvals(np.eye(50) - matrix)))
    np.testing.assert_allclose(radius, 0.5, rtol=1e-12)

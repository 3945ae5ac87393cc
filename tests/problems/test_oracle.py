"""The oracle itself, on an equation whose iterates are known by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from nksolve.problems import Problem

from .oracle import newton


def square_root_of_two(y, args):
    return y**2 - 2.0


def heron():
    return Problem(name="heron", title="", source="", fn=square_root_of_two, y0=jnp.ones((1,)))


def test_newton_is_herons_method():
    y, norms = newton(heron(), atol=1e-4)
    np.testing.assert_allclose(
        norms, [1.0, 0.25, (17 / 12) ** 2 - 2, (577 / 408) ** 2 - 2], rtol=1e-9
    )
    np.testing.assert_allclose(y, [577 / 408], rtol=1e-15)


def test_damping_shortens_the_first_steps():
    _, norms = newton(heron(), atol=1e-9, damping=(0.5,))
    np.testing.assert_allclose(norms[1], abs(1.25**2 - 2), rtol=1e-12)


def test_a_failure_is_not_silent():
    with pytest.raises(AssertionError, match="heron"):
        newton(heron(), atol=1e-9, max_steps=2)

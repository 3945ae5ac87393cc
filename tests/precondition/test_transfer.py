"""Transfer operators: adjoint to one another, exact for the polynomials they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nksolve.precondition.transfer import (
    CellConstant,
    CellDirichlet,
    CellNeumann,
    CellPeriodic,
    VertexDirichlet,
    VertexNatural,
    VertexNeumann,
    VertexPeriodic,
    coarse_shape,
    over_axes,
)

VERTEX = {"interior": VertexDirichlet(), "closed": VertexNeumann(), "natural": VertexNatural()}
PERIODIC = {"vertex-periodic": VertexPeriodic(), "cell-periodic": CellPeriodic()}
CELLS = {"cell-dirichlet": CellDirichlet(), "cell-neumann": CellNeumann(), "mean": CellConstant()}
ALL = {**VERTEX, **PERIODIC, **CELLS}
COARSE = {"interior": 7, "closed": 9, "natural": 9}


def sizes(name):
    """(coarse, fine) nodes of a small axis."""
    coarse = COARSE.get(name, 8)
    return coarse, {"interior": 2 * coarse + 1, "closed": 17, "natural": 17}.get(name, 2 * coarse)


def nodes(name, n):
    """Where the n nodes of an axis of length one lie."""
    if name == "interior":
        return np.arange(1, n + 1) / (n + 1)
    if name in ("closed", "natural"):
        return np.arange(n) / (n - 1)
    return np.arange(n) / n if name == "vertex-periodic" else (np.arange(n) + 0.5) / n


def matrix(method, n):
    return np.asarray(jax.vmap(lambda e: method(e, 0), out_axes=1)(jnp.eye(n)))


@pytest.mark.parametrize("name", ALL)
def test_transposes_are_exact(name):
    transfer, (coarse, fine) = ALL[name], sizes(name)
    assert transfer.coarse(fine) == coarse
    prolong, restrict = matrix(transfer.prolong, coarse), matrix(transfer.restrict, fine)
    assert prolong.shape == (fine, coarse) and restrict.shape == (coarse, fine)
    np.testing.assert_array_equal(matrix(transfer.prolong_transpose, fine), prolong.T)
    np.testing.assert_array_equal(matrix(transfer.restrict_transpose, coarse), restrict.T)
    if name != "closed":
        np.testing.assert_array_equal(restrict, prolong.T / 2)


def test_rows_of_the_textbook():
    """Full weighting, its mirrored form at an end, and linear interpolation between cell centres
    (Trottenberg, Oosterlee & Schüller, sections 2.3.3, 2.8.4)."""
    restrict = matrix(VERTEX["interior"].restrict, 7)
    np.testing.assert_array_equal(restrict[1], [0, 0, 0.25, 0.5, 0.25, 0, 0])
    restrict = matrix(VERTEX["closed"].restrict, 5)
    wanted = [[0.5, 0.5, 0, 0, 0], [0, 0.25, 0.5, 0.25, 0], [0, 0, 0, 0.5, 0.5]]
    np.testing.assert_array_equal(restrict, wanted)
    prolong = matrix(CELLS["cell-neumann"].prolong, 3)
    np.testing.assert_array_equal(prolong[:3], [[1, 0, 0], [0.75, 0.25, 0], [0.25, 0.75, 0]])
    prolong = matrix(CELLS["cell-dirichlet"].prolong, 3)
    np.testing.assert_array_equal(prolong[[0, 5]], [[0.5, 0, 0], [0, 0, 0.5]])
    prolong = matrix(PERIODIC["vertex-periodic"].prolong, 4)
    np.testing.assert_array_equal(prolong[-1], [0.5, 0, 0, 0.5])


@pytest.mark.parametrize("name", ALL)
def test_corrections_reproduce_linear_functions_inside(name):
    transfer, (coarse, fine) = ALL[name], sizes(name)
    line = lambda n: 1 + (0 if name == "mean" else 3) * nodes(name, n)
    got = np.asarray(transfer.prolong(jnp.asarray(line(coarse)), 0))
    inside = slice(None) if name in ("closed", "natural") else slice(2, -2)
    np.testing.assert_allclose(got[inside], line(fine)[inside], rtol=1e-14)
    dirichlet = name in ("interior", "cell-dirichlet")
    ones = np.asarray(transfer.prolong(jnp.ones(coarse), 0))
    np.testing.assert_array_equal(ones[1 if dirichlet else 0 : fine - dirichlet], 1)
    if dirichlet:
        assert ones[0] == ones[-1] == 0.5


@pytest.mark.parametrize("name", ALL)
def test_residuals_keep_their_scale(name):
    """A constant residual stays what it is, away from the boundary; where the flux is prescribed or
    the axis is periodic, everywhere."""
    transfer, (_, fine) = ALL[name], sizes(name)
    got = np.asarray(transfer.restrict(jnp.ones(fine), 0))
    inside = slice(1, -1) if name in ("natural", "cell-dirichlet") else slice(None)
    np.testing.assert_array_equal(got[inside], 1)


@pytest.mark.parametrize("name", [*VERTEX, *CELLS])
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_the_unknown_is_interpolated_cubically(name, degree):
    transfer, (coarse, fine) = ALL[name], sizes(name)
    power = lambda n: (nodes(name, n) - 0.3) ** degree
    got = transfer.interpolate(jnp.asarray(power(coarse)), 0)
    np.testing.assert_allclose(got, power(fine), atol=2e-14)


@pytest.mark.parametrize("name", PERIODIC)
def test_a_periodic_unknown_is_interpolated_to_fourth_order(name):
    errors = []
    for coarse in (16, 32):
        wave = lambda n: np.sin(2 * np.pi * nodes(name, n) + 0.4)
        got = PERIODIC[name].interpolate(jnp.asarray(wave(coarse)), 0)
        errors.append(np.abs(got - wave(2 * coarse)).max())
    assert 14 < errors[0] / errors[1] < 18


@pytest.mark.parametrize("name", ALL)
def test_sampling(name):
    """Vertices keep their values; a cell of the coarse grid takes the mean of its halves."""
    transfer, (coarse, fine) = ALL[name], sizes(name)
    line = lambda n: 2 + 5 * nodes(name, n)
    got = transfer.sample(jnp.asarray(line(fine)), 0)
    np.testing.assert_allclose(got, line(coarse), rtol=1e-14)


@pytest.mark.parametrize("coarse", [1, 2, 3])
def test_few_nodes(coarse):
    """Interpolation through n < 4 nodes is exact for degree n − 1."""
    for name in ("interior", "closed", "cell-neumann"):
        if (name, coarse) == ("closed", 1):
            continue
        fine = {"interior": 2 * coarse + 1, "closed": 2 * coarse - 1}.get(name, 2 * coarse)
        power = lambda n, name=name: (nodes(name, n) - 0.3) ** (coarse - 1)
        got = ALL[name].interpolate(jnp.asarray(power(coarse)), 0)
        np.testing.assert_allclose(got, power(fine), atol=1e-14)
    assert CellPeriodic().interpolate(jnp.ones(coarse), 0).shape == (2 * coarse,)


def test_tensor_products_leave_components_alone():
    grid = (VertexDirichlet(), CellPeriodic(), VertexNeumann())
    fine = jnp.asarray(np.random.default_rng(0).standard_normal((7, 8, 5, 2)))
    assert coarse_shape(grid, fine.shape) == (3, 4, 3, 2)
    got = over_axes(grid, lambda t, x, axis: t.restrict(x, axis), {"a": fine})["a"]
    rows = [matrix(t.restrict, n) for t, n in zip(grid, fine.shape, strict=False)]
    wanted = np.einsum("ai,bj,ck,ijkp->abcp", *rows, fine)
    np.testing.assert_allclose(got, wanted, atol=1e-14)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
def test_dtypes_are_kept(name, dtype):
    transfer, (coarse, fine) = ALL[name], sizes(name)
    u, v = jnp.ones((2, coarse), dtype), jnp.ones((2, fine), dtype)
    for out in (transfer.prolong(u, 1), transfer.restrict_transpose(u, 1)):
        assert (out.shape, out.dtype) == (v.shape, v.dtype)
    assert transfer.interpolate(u, 1).dtype == transfer.sample(v, 1).dtype == dtype


def test_sizes_that_do_not_halve():
    refused = {"interior": [1, 2, 8], "closed": [1, 4, 8], "natural": [1, 4]}
    for name, transfer in ALL.items():
        for n in refused.get(name, [1, 3, 7]):
            assert transfer.coarse(n) is None
    assert coarse_shape((VertexDirichlet(),) * 2, (7, 8)) is None

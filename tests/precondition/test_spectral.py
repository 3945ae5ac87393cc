"""Spectral: the exact inverse of discrete operators, dense and dotted; published iterations."""

import functools as ft
import itertools as it

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.fft

import nksolve as nks
from nksolve.precondition.spectral import Dirichlet, NeumannCells, NeumannNodes, Periodic, Spectral
from nksolve.problems import get

_BOUNDARIES = [Dirichlet(), NeumannNodes(), NeumannCells(), Periodic()]


def second(boundary, n, h):
    """−∂² as a dense matrix, from its stencil."""
    a = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    if isinstance(boundary, NeumannNodes):
        a[0, 1], a[-1, -2] = -2, -2
    if isinstance(boundary, NeumannCells):
        a[0, 0], a[-1, -1] = 1, 1
    if isinstance(boundary, Periodic):
        a[0, -1], a[-1, 0] = -1, -1
    return a / h**2


def first(n, h):
    """∂, centred, periodic."""
    a = np.eye(n, k=1) - np.eye(n, k=-1)
    a[0, -1], a[-1, 0] = -1, 1
    return a / (2 * h)


def along(matrix, axis, shape):
    """A matrix that acts on one axis of a grid, on its ravelled entries."""
    parts = [np.eye(n) for n in shape]
    parts[axis] = matrix
    return ft.reduce(np.kron, parts)


def dense(boundaries, shape, diffusion, shift, spacing, convection=None):
    a = shift * np.eye(int(np.prod(shape)), dtype=np.result_type(shift, float))
    for i, (boundary, n) in enumerate(zip(boundaries, shape, strict=True)):
        a = a + diffusion[i] * along(second(boundary, n, spacing[i]), i, shape)
        if convection is not None:
            a = a + convection[i] * along(first(n, spacing[i]), i, shape)
    return a


def identity(shape, dtype=jnp.float64):
    """An operator of that structure."""
    return nks.linearise(lambda y, _: 2 * y, jnp.zeros(shape, dtype)).operator


def inverse_of(preconditioner, shape, dtype=jnp.float64):
    return preconditioner.as_operator(preconditioner.init(identity(shape, dtype), None, None))


def matrices(operators):
    """M⁻¹ and M⁻ᵀ of each operator, column by column, by one program."""

    def both(operators):
        out = []
        for operator in operators:
            structure = operator.in_structure()
            size = int(np.prod(structure.shape))
            eye = jnp.eye(size, dtype=structure.dtype).reshape((size, *structure.shape))
            columns = jax.vmap(lambda e: (operator.mv(e), operator.transpose().mv(e)))(eye)
            out.append([c.reshape(size, size).T for c in columns])
        return out

    return [[np.asarray(m) for m in pair] for pair in jax.jit(both)(operators)]


def test_transforms_are_those_of_scipy():
    x = np.random.default_rng(0).standard_normal((6, 7))

    @ft.partial(jax.jit, static_argnums=1)
    def all_there_and_back(x, axis):
        there = [boundary.forward(x, axis) for boundary in _BOUNDARIES]
        pairs = zip(_BOUNDARIES, there, strict=True)
        return there, [boundary.backward(image, axis) for boundary, image in pairs]

    for axis in range(2):
        n = x.shape[axis]
        (sine, nodes, cells, _), back = all_there_and_back(jnp.asarray(x), axis)
        expected = scipy.fft.dst(x, type=1, axis=axis) / 2
        np.testing.assert_allclose(sine, expected, atol=1e-13)
        expected = scipy.fft.dct(x, type=1, axis=axis)
        np.testing.assert_allclose(nodes, expected, atol=1e-13)
        expected = scipy.fft.dct(x, type=2, axis=axis, norm="ortho")
        np.testing.assert_allclose(cells, expected, atol=1e-13)
        for boundary, again in zip(_BOUNDARIES, back, strict=True):
            np.testing.assert_allclose(again, x, atol=1e-13)
            assert boundary.angles(n).shape == (n,)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.complex128])
def test_exact_inverse_in_one_dimension(dtype):
    shift = 0.7 + (0.3j if dtype == jnp.complex128 else 0)
    tol = 1e-4 if dtype == jnp.float32 else 1e-11
    cases = [(boundary, n) for boundary in _BOUNDARIES for n in (4, 5)]
    cases += [(Dirichlet(), 1), (Dirichlet(), 2)]

    @eqx.filter_jit
    def inverses():
        return [inverse_of(Spectral(b, 1.5, shift, spacing=0.3), (n,), dtype) for b, n in cases]

    found = matrices(inverses())
    for (boundary, n), (m, mt) in zip(cases, found, strict=True):
        a = dense([boundary], (n,), [1.5], shift, [0.3])
        assert m.dtype == dtype
        np.testing.assert_allclose(m, np.linalg.inv(a), rtol=tol, atol=tol)
        np.testing.assert_allclose(mt, np.linalg.inv(a).T, rtol=tol, atol=tol)


def test_exact_inverse_in_two_dimensions():
    shape, diffusion, spacing = (5, 4), (1.5, 0.4), (0.5, 0.25)
    pairs = list(it.combinations_with_replacement(_BOUNDARIES, 2))

    @eqx.filter_jit
    def all_inverses():
        return [
            inverse_of(Spectral(pair, diffusion, 0.2, spacing=spacing), shape) for pair in pairs
        ]

    inverses = all_inverses()
    for pair, inverse, (m, mt) in zip(pairs, inverses, matrices(inverses), strict=True):
        a = np.linalg.inv(dense(pair, shape, diffusion, 0.2, spacing))
        np.testing.assert_allclose(m, a, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(mt, a.T, rtol=1e-10, atol=1e-11)
        assert lx.is_symmetric(inverse) == bool(np.allclose(a, a.T))


def test_exact_inverse_in_three_dimensions_with_components():
    """Two components with coefficients of their own, behind three axes of the grid."""
    boundaries, shape = (Dirichlet(), Periodic(), NeumannNodes()), (3, 4, 5)
    shift, diffusion = jnp.array([0.5, 2.0]), (jnp.array([1.0, 3.0]), 0.5, 2.0)
    inverse = inverse_of(Spectral(boundaries, diffusion, shift), (*shape, 2))
    ((m, mt),) = matrices([inverse])
    exact = np.zeros((60, 2, 60, 2))
    for c in range(2):
        per_axis = [float(np.broadcast_to(d, (2,))[c]) for d in diffusion]
        a = dense(boundaries, shape, per_axis, float(shift[c]), (1, 1, 1))
        exact[:, c, :, c] = np.linalg.inv(a)
    np.testing.assert_allclose(m, exact.reshape(120, 120), rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(mt, exact.reshape(120, 120).T, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex128])
def test_convection_on_periodic_axes(dtype):
    boundaries, shape, b = (Periodic(), Periodic()), (5, 6), (2.0, -1.5)
    shift = 0.8 + (0.5j if dtype == jnp.complex128 else 0)
    preconditioner = Spectral(boundaries, 0.3, shift, convection=b, spacing=0.5)
    ((m, mt),) = matrices([inverse_of(preconditioner, shape, dtype)])
    a = np.linalg.inv(dense(boundaries, shape, (0.3, 0.3), shift, (0.5, 0.5), b))
    np.testing.assert_allclose(m, a, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(mt, a.T, rtol=1e-10, atol=1e-11)
    assert np.max(np.abs(a - a.T)) > 0.01


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_the_singular_mode_is_projected_out(dtype):
    """The weighted pseudo-inverse: A M⁻¹ A = A, and constants go to zero."""
    shape, tol = (6, 5), 1e-4 if dtype == jnp.float32 else 1e-12
    inverses = [inverse_of(Spectral(boundary), shape, dtype) for boundary in _BOUNDARIES[1:]]
    for boundary, (m, _) in zip(_BOUNDARIES[1:], matrices(inverses), strict=True):
        a = dense([boundary] * 2, shape, (1, 1), 0.0, (1, 1))
        np.testing.assert_allclose(a @ m @ a, a, atol=tol)
        np.testing.assert_allclose(m @ np.ones(30), 0, atol=tol)


@ft.cache
def _bratu(shifted):
    """A jitted Newton solve of Bratu's problem, λ → (value, stats)."""
    problem = get("bratu", n=63)
    mean_reaction = lambda u, lam: -lam * jnp.mean(jnp.exp(u)) / 64**2
    preconditioner = Spectral(shift=mean_reaction) if shifted else Spectral()
    krylov = nks.GMRES(restart=60, preconditioner=preconditioner)
    solver = nks.NewtonKrylov(rtol=1e-8, atol=1e-12, linear_solver=krylov)

    def solve(lam):
        solution = nks.root_find(problem.fn, solver, problem.y0, lam)
        return solution.value, solution.stats

    return jax.jit(solve)


def test_bratu_in_eleven_matvecs():
    """402 without a preconditioner, as the docs measure."""
    value, stats = _bratu(False)(jnp.array(6.0))
    assert int(stats["num_matvecs"]) == 11
    assert int(stats["num_steps"]) == 5
    assert int(stats["num_preconditioner_updates"]) == 5
    assert int(stats["num_probes"]) == 0
    residual = get("bratu", n=63).fn(value, jnp.array(6.0))
    assert float(jnp.linalg.norm(residual)) <= 1e-8 * 0.1
    # and the mean of the reaction as a shift, a traced function of (y, args)
    again, stats = _bratu(True)(jnp.array(6.0))
    np.testing.assert_allclose(again, value, atol=1e-6)
    assert int(stats["num_matvecs"]) == 7
    assert int(stats["num_steps"]) == 4


def test_published_histories_of_convection_diffusion():
    """Kelley 1995, pages 54–55: lengths of residual histories, one more than iterations."""
    problem = get("convection-diffusion-linear", n=31)
    published = problem.published["history_lengths"]

    @jax.jit
    def lengths(y, args):
        lin = nks.linearise(problem.fn, y, args)
        b, found = -lin.value, {}
        for name, restart, side in (
            ("gmres-right", 60, "right"),
            ("gmres-left", 60, "left"),
            ("gmres4-right", 4, "right"),
            ("gmres4-left", 4, "left"),
        ):
            solver = nks.GMRES(restart=restart, side=side, preconditioner=Spectral(spacing=1 / 32))
            out = solver.solve(
                solver.prepare(lin.operator, y, args).system(True),
                b,
                tolerance=9.8e-4 * jnp.linalg.norm(b),
                workspace=solver.workspace(b, real=True),
            )
            found[name] = out.num_steps + 1
        return found

    found = lengths(problem.y0, problem.args)
    assert {k: int(v) for k, v in found.items()} == {k: published[k] for k in found}


def test_gradient_through_newton():
    """0 = J u' − h²eᵘ, solved densely."""
    n = 9
    problem = get("bratu", n=n)
    krylov = nks.GMRES(preconditioner=Spectral())
    solver = nks.NewtonKrylov(rtol=1e-11, atol=1e-13, linear_solver=krylov)

    def loss(lam):
        value = nks.root_find(problem.fn, solver, problem.y0, lam).value
        return jnp.sum(value), value

    slope, u = jax.jit(jax.grad(loss, has_aux=True))(jnp.array(5.0))
    reaction = np.exp(np.asarray(u).ravel()) / (n + 1) ** 2
    j = dense([Dirichlet()] * 2, (n, n), (1, 1), 0.0, (1, 1)) - np.diag(5.0 * reaction)
    np.testing.assert_allclose(slope, np.linalg.solve(j, reaction).sum(), rtol=1e-8)


def test_lanes_are_as_if_alone():
    lams = jnp.array([1.0, 6.0])
    values, stats = jax.jit(jax.vmap(_bratu(False)))(lams)
    for lane in range(2):
        alone, own = _bratu(False)(lams[lane])
        np.testing.assert_allclose(values[lane], alone, atol=1e-9)
        assert int(stats["num_matvecs"][lane]) == int(own["num_matvecs"])
    assert len(set(stats["num_matvecs"].tolist())) == 2


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="Dirichlet"):
        Spectral("dirichlet")  # pyright: ignore
    with pytest.raises(ValueError, match="FieldSplit"):
        inverse_of(Spectral((Periodic(), Periodic())), (4,))
    with pytest.raises(ValueError, match="component axes"):
        inverse_of(Spectral(shift=jnp.ones(2)), (4, 2))
    with pytest.raises(ValueError, match="periodic"):
        inverse_of(Spectral(convection=1.0), (4,))
    with pytest.raises(ValueError, match="entries"):
        inverse_of(Spectral(diffusion=(1.0, 2.0, 3.0)), (4, 4))
    with pytest.raises(ValueError, match="complex"):
        inverse_of(Spectral(shift=1j), (4,))

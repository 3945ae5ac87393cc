"""Linear problems with structured Jacobians, and what must hold of a preconditioner's inverse."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import nksolve as nks


def draw(rng, structure):
    def leaf(s):
        x = rng.standard_normal(s.shape)
        if np.issubdtype(s.dtype, np.complexfloating):
            x = x + 1j * rng.standard_normal(s.shape)
        return jnp.asarray(x.astype(s.dtype))

    return jax.tree.map(leaf, structure)


def matrix_operator(matrix, like):
    """The matrix as the Jacobian of a residual on vectors like `like`, leaf after leaf."""

    def residual(y, a):
        rows = jnp.einsum("ij,j->i", a, jnp.concatenate([x.ravel() for x in jax.tree.leaves(y)]))
        leaves, treedef = jax.tree.flatten(y)
        parts = jnp.split(rows, np.cumsum([x.size for x in leaves])[:-1])
        shaped = [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(treedef, shaped)

    return nks.linearise(residual, like, jnp.asarray(matrix)).operator


@eqx.filter_jit
def apply(preconditioner, matrix, v, w, y=None, args=None):
    """(M⁻¹v, M⁻ᵀw) for J = matrix, in one program."""
    operator = matrix_operator(matrix, v)
    inverse = preconditioner.as_operator(preconditioner.init(operator, y, args))
    assert inverse.in_structure() == inverse.out_structure() == operator.in_structure()
    return inverse.mv(v), inverse.transpose().mv(w)


def flat(vector):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(vector)])


def assert_inverts(preconditioner, matrix, like, rtol, *, part=None, args=None, seed=3):
    """M⁻¹ = part⁻¹ and M⁻ᵀ = part⁻ᵀ, and so ⟨M⁻¹v, w⟩ = ⟨v, M⁻ᵀw⟩, against dense solves.

    `part` is what M is to be; by default the whole of J, the matrix.
    """
    rng = np.random.default_rng(seed)
    v, w = (draw(rng, jax.eval_shape(lambda: like)) for _ in range(2))
    x, z = (flat(out) for out in apply(preconditioner, jnp.asarray(matrix), v, w, args=args))
    part = matrix if part is None else part
    part = np.asarray(part, np.result_type(part.dtype, np.float64))
    for got, wanted in (
        (x, np.linalg.solve(part, flat(v))),
        (z, np.linalg.solve(part.T, flat(w))),
    ):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=rtol * np.abs(wanted).max())
    size = np.linalg.norm(x) * np.linalg.norm(flat(w))
    assert abs(np.sum(x * flat(w)) - np.sum(flat(v) * z)) <= rtol * size


def banded(n, lower, upper, dtype=np.float64, seed=0):
    """A random matrix of that band, diagonally dominant."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((n, n)) + (lower + upper + 4) * np.eye(n)
    if np.issubdtype(dtype, np.complexfloating):
        a = a + 1j * rng.standard_normal((n, n))
    return np.tril(np.triu(a, -lower), upper).astype(dtype)


def block_tridiagonal(m, b, dtype=np.float64, seed=0):
    """A random block tridiagonal matrix, diagonally dominant by blocks."""
    node = np.arange(m * b) // b
    a = banded(m * b, m * b, m * b, dtype, seed)
    near = np.abs(node[:, None] - node[None, :]) <= 1
    return np.where(near, a, 0) + 3 * b * np.eye(m * b, dtype=dtype)

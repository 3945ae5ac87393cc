"""A dense Newton's method in NumPy: the oracle that the published answers are checked with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnums=0)
def _value_and_jacobian(fn, y, args):
    return fn(y, args), jax.jacfwd(fn)(y, args)


def residual(problem, y):
    """The residual at y, flattened."""
    return np.asarray(jax.jit(problem.fn)(jnp.asarray(y), problem.args)).ravel()


def dense(problem, y):
    """The residual and the Jacobian at y, flattened."""
    f, jacobian = _value_and_jacobian(problem.fn, jnp.asarray(y), problem.args)
    return np.asarray(f).ravel(), np.asarray(jacobian).reshape(f.size, f.size)


def newton(problem, *, atol, max_steps=40, ord=2, damping=()):
    """Newton's method from the start; `damping` scales the first steps. Returns (y, norms of f)."""
    y = np.asarray(problem.y0)
    norms = []
    for step in range(max_steps + 1):
        f, jacobian = dense(problem, y)
        norms.append(np.linalg.norm(f, ord))
        if norms[-1] <= atol:
            return y, norms
        length = damping[step] if step < len(damping) else 1.0
        y = y - length * np.linalg.solve(jacobian, f).reshape(y.shape)
    raise AssertionError(f"no root of {problem.name} in {max_steps} steps: {norms}")

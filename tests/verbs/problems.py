"""A residual with dense parameters, and the same root with dense derivatives by plain AD."""

from collections.abc import Callable

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np

import nksolve as nks

N = 7
_RNG = np.random.default_rng(20)
ARGS = {
    "W": jnp.asarray(_RNG.standard_normal((N, N)) / np.sqrt(N)),
    "b": jnp.asarray(_RNG.standard_normal(N)),
}
DIRECTION = {
    "W": jnp.asarray(_RNG.standard_normal((N, N))),
    "b": jnp.asarray(_RNG.standard_normal(N)),
}
COTANGENT = jnp.asarray(_RNG.standard_normal(N))
SOLVER = nks.NewtonKrylov(rtol=1e-13, atol=1e-13)


def layer(y, args):
    """0.6 W tanh(y) + b − y (1 + b²) − 0.1 y³: nonlinear in y and in b, nonsymmetric."""
    return 0.6 * args["W"] @ jnp.tanh(y) + args["b"] - y * (1.0 + args["b"] ** 2) - 0.1 * y**3


def root(args):
    """By nksolve; `throw` off, whose host callback would keep it out of the compilation cache."""
    return nks.root_find(layer, SOLVER, jnp.zeros(N), args, throw=False).value


def dense_root(args, fn: Callable = layer, y=None, steps: int = 2):
    """The root as a function of args whose derivatives are exact, by dense linear algebra.

    From a root that is held fixed, each differentiable Newton step squares the error in the
    parameters: one gives the first derivative, two the first three.
    """
    y = lax.stop_gradient(root(args) if y is None else y)
    for _ in range(steps):
        y = y - jnp.linalg.solve(jax.jacfwd(fn)(y, args), fn(y, args))
    return y

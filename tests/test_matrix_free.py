"""Never n × n: no value of a solve or of its derivatives has two axes of the problem's size.

Two readers: the jaxpr, which shows where a value is made, and the lowered program, which shows
what primitives keep to themselves. n is prime, and longer than the Krylov basis.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from tests.helpers import square_tensors, square_values, walk

N = 67
SOLVER = nks.NewtonKrylov(rtol=1e-10, atol=1e-10)
ARGS = {"diffusion": jnp.asarray(0.3), "source": jnp.linspace(0.0, 1.0, N)}


def stencil(y, args):
    """A reaction–diffusion stencil, which makes no n × n value itself."""
    left = jnp.concatenate([jnp.zeros(1), y[:-1]])
    right = jnp.concatenate([y[1:], jnp.zeros(1)])
    return y + y**3 - args["diffusion"] * (left - 2.0 * y + right) - args["source"]


def low_rank(y, args):
    """y + u (vᵀ tanh y) − b, with u and v the parameters."""
    return y + args["u"] * jnp.sum(args["v"] * jnp.tanh(y)) - args["b"]


LOW_RANK_ARGS = {name: jnp.cos(k + jnp.linspace(0.0, 3.0, N)) / 8 for k, name in enumerate("uvb")}
PROBLEMS = {"stencil": (stencil, ARGS), "low_rank": (low_rank, LOW_RANK_ARGS)}


def _solve(fn, solver=SOLVER, **kwargs):
    return lambda args: nks.root_find(fn, solver, jnp.zeros(N), args, **kwargs).value


def _loss(fn, **kwargs):
    return lambda args: jnp.sum(jnp.sin(_solve(fn, **kwargs)(args)))


def _grad(fn):
    return jax.grad(_loss(fn))


def _jvp(fn):
    return lambda args: jax.jvp(_solve(fn), (args,), (args,))


def _hvp(fn):
    return lambda args: jax.jvp(_grad(fn), (args,), (args,))


@pytest.mark.parametrize("transform", [_solve, _jvp, _grad, _hvp])
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_no_square_value(name, transform):
    fn, args = PROBLEMS[name]
    traced = jax.jit(transform(fn)).trace(args)
    assert square_values(traced.jaxpr, N) == []
    assert square_tensors(traced.lower().as_text(), N) == []


def test_the_readers_see_a_dense_adjoint():
    """The same gradient by Optimistix's default adjoint is dense, and seen."""
    gradient = jax.grad(_loss(stencil, adjoint=optx.ImplicitAdjoint()))
    assert square_tensors(jax.jit(gradient).lower(ARGS).as_text(), N)
    dense = lambda args: jax.jacfwd(lambda y: stencil(y, args))(jnp.zeros(N))
    assert square_values(jax.make_jaxpr(dense)(ARGS), N)


# --- a residual whose parameters are n × n --------------------------------------------------

WEIGHTS = {
    "W": jnp.asarray(np.random.default_rng(5).standard_normal((N, N)) / (2 * N**0.5)),
    "b": jnp.linspace(-1.0, 1.0, N),
}


def dense_layer(y, args):
    return jnp.tanh(args["W"] @ y + args["b"]) - y


# What may have W's shape: W as an operand, handed into calls and loops as a constant; its
# transpose; and, in a gradient, the cotangent of W, an outer product and the sums of such.
_CALLS = {"jit", "pjit", "custom_jvp_call", "custom_vjp_call", "closed_call"}
_OF_W = {"transpose", "copy", "copy_p", "stop_gradient"}
_COTANGENT = {"dot_general", "mul", "add_any", "broadcast_in_dim", "neg", "zeros_like"}


def _makers(jaxpr):
    return {s.eqn.primitive.name for s in square_values(jaxpr, N) if s.eqn is not None} - _CALLS


def _square_carries(jaxpr):
    """Values with two axes of size n that a loop carries from one trip to the next."""
    found = []
    for eqn in walk(jaxpr):
        if eqn.primitive.name == "while":
            first = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
            carry = eqn.invars[first:]
        elif eqn.primitive.name == "scan":
            first = eqn.params["num_consts"]
            carry = eqn.invars[first : first + eqn.params["num_carry"]]
        else:
            continue
        found += [v.aval for v in carry if sum(d == N for d in v.aval.shape) >= 2]
    return found


def test_the_solve_uses_weights_as_they_are():
    jaxpr = jax.make_jaxpr(_solve(dense_layer))(WEIGHTS)
    assert _makers(jaxpr) <= _OF_W
    assert _square_carries(jaxpr) == []


@pytest.mark.parametrize("transform", [_grad, _hvp])
def test_the_gradient_makes_the_cotangent_of_weights_only(transform):
    jaxpr = jax.make_jaxpr(transform(dense_layer))(WEIGHTS)
    assert _makers(jaxpr) <= _OF_W | _COTANGENT
    assert _square_carries(jaxpr) == []
    # Nothing with W's axes and a third one: no batch of matrices, no stack of cotangents.
    large = [s.aval.shape for s in square_values(jaxpr, N) if s.aval.ndim > 2]
    assert large == []


def test_each_matvec_reads_the_weights_once():
    """No n² work in a loop beyond W v: one product with W at the trial, one in each matvec."""

    def products(body):
        shapes = [
            [v.aval.shape for v in eqn.invars]
            for eqn in walk(body)
            if eqn.primitive.name == "dot_general"
        ]
        return sum((N, N) in shape for shape in shapes)

    jaxpr = jax.make_jaxpr(_solve(dense_layer))(WEIGHTS)
    loops = [eqn.params["body_jaxpr"] for eqn in walk(jaxpr) if eqn.primitive.name == "while"]
    # back substitution; Newton loop ⊃ restart cycles ⊃ Arnoldi steps
    assert sorted(map(products, loops)) == [0, 1, 1, 2]

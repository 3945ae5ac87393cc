"""Derivatives of a solve: against dense linear algebra, against differences, and composed."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import nksolve as nks
from nksolve import tree
from tests.helpers import Counter
from tests.verbs.problems import ARGS, COTANGENT, DIRECTION, SOLVER, N, dense_root, layer, root


def close(actual, desired, rtol, atol=0.0):
    """Leaf by leaf, relative to the largest entry of each leaf."""
    actual, desired = jtu.tree_leaves(actual), jtu.tree_leaves(desired)
    assert len(actual) == len(desired) > 0
    for a, d in zip(actual, desired, strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, d, rtol=0, atol=atol + rtol * float(np.max(np.abs(d))))


def loss(solve):
    return lambda args: jnp.sum(COTANGENT * jnp.sin(solve(args)))


def along(fn):
    """The derivative of a function of args in one direction."""
    return lambda args: jax.jvp(fn, (args,), (DIRECTION,))[1]


# --- against dense linear algebra -----------------------------------------------------------

BATCH = jtu.tree_map(lambda a, d: jnp.stack([a, a + 0.1 * d, a - 0.2 * d]), ARGS, DIRECTION)
TRANSFORMS = {
    "jvp": lambda f: along(f)(ARGS),
    "vjp": lambda f: jax.vjp(f, ARGS)[1](COTANGENT),
    "vmap grad": lambda f: jax.vmap(jax.grad(loss(f)))(BATCH),
    "jacfwd": lambda f: jax.jacfwd(f)(ARGS),
    "jacrev": lambda f: jax.jacrev(f)(ARGS),
    "hessian": lambda f: jax.hessian(loss(f))(ARGS),
    "grad of grad": lambda f: jax.grad(lambda a: tree.vdot(jax.grad(loss(f))(a), DIRECTION))(ARGS),
    "third order": lambda f: jax.grad(along(along(loss(f))))(ARGS),
}


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_derivatives_are_those_of_the_dense_formula(name):
    transform = TRANSFORMS[name]
    close(jax.jit(lambda: transform(root))(), jax.jit(lambda: transform(dense_root))(), 1e-9)


def test_mixed_second_derivatives():
    """∂/∂b of a derivative along W: parameters that the first linearisation did not perturb."""

    def mixed(solve):
        def along_w(b):
            value = lambda w: loss(solve)({"W": w, "b": b})
            return jax.jvp(value, (ARGS["W"],), (DIRECTION["W"],))[1]

        return jax.grad(along_w)

    close(jax.jit(mixed(root))(ARGS["b"]), jax.jit(mixed(dense_root))(ARGS["b"]), 1e-9)


# --- against differences --------------------------------------------------------------------


def _difference(fn, h=1e-4):
    """Fourth-order central difference of a jitted fn along the direction."""
    at = lambda t: fn(tree.axpy(t, DIRECTION, ARGS))
    combine = lambda a, b, c, d: (8.0 * (b - c) - (a - d)) / (12.0 * h)
    return jtu.tree_map(combine, at(2 * h), at(h), at(-h), at(-2 * h))


def test_gradient_and_hessian_against_differences():
    value = jax.jit(loss(root))
    gradient = jax.jit(jax.grad(loss(root)))
    slope = tree.vdot(gradient(ARGS), DIRECTION)
    close(slope, _difference(value), 1e-6)
    product = jax.jit(along(jax.grad(loss(root))))(ARGS)
    close(product, _difference(gradient), 1e-6)


# --- what may stand in args, and where parameters may hide ----------------------------------


class _Cell(eqx.Module):
    linear: eqx.nn.Linear
    activation: object
    scale: jax.Array
    depth: int = eqx.field(static=True)
    order: jax.Array  # integers


def _cell():
    linear = eqx.nn.Linear(4, 4, key=jax.random.key(3))
    linear = jtu.tree_map(lambda x: 0.5 * x if eqx.is_inexact_array(x) else x, linear)
    return _Cell(linear, jnp.tanh, jnp.asarray(0.7), 2, jnp.array([2, 0, 3, 1]))


def _cell_residual(y, args):
    cell, x, kind = args["cell"], args["x"], args["kind"]
    assert kind == "static"
    z = y["z"]
    for _ in range(cell.depth):
        z = cell.activation(cell.linear(z) + x)
    gain = y["gain"]
    return {"z": z[cell.order] - y["z"], "gain": gain + 0.1 * jnp.sum(y["z"]) - cell.scale}


def test_modules_integers_and_static_leaves_in_args():
    args = {"cell": _cell(), "x": jnp.linspace(-1.0, 1.0, 4), "kind": "static"}
    y0 = {"z": jnp.zeros(4), "gain": jnp.asarray(0.0)}

    def value(args):
        y = nks.root_find(_cell_residual, SOLVER, y0, args).value
        return jnp.sum(y["z"] ** 2) * y["gain"]

    derivative = eqx.filter_jit(eqx.filter_grad(value))(args)
    assert derivative["cell"].order is None and derivative["kind"] is None
    arrays, static = eqx.partition(args, eqx.is_inexact_array)
    h = 1e-4
    direction = jtu.tree_map(lambda x: jnp.cos(3.0 + x), arrays)
    run = eqx.filter_jit(lambda t: value(eqx.combine(tree.axpy(t, direction, arrays), static)))
    a, b, c, d = (run(jnp.asarray(t)) for t in (2 * h, h, -h, -2 * h))
    close(tree.vdot(derivative, direction), (8.0 * (b - c) - (a - d)) / (12.0 * h), 1e-6)


def test_closed_over_parameters_are_differentiated():
    def closing(args):
        # W by closure, b both by closure and by args
        def fn(y, b):
            return layer(y, {"W": args["W"], "b": 0.5 * (b + args["b"])})

        return nks.root_find(fn, SOLVER, jnp.zeros(N), args["b"]).value

    expected = jax.jit(jax.grad(loss(dense_root)))(ARGS)
    close(jax.jit(jax.grad(loss(closing)))(ARGS), expected, 1e-9)
    close(jax.grad(loss(closing))(ARGS), expected, 1e-9)
    close(jax.jit(along(closing))(ARGS), jax.jit(along(dense_root))(ARGS), 1e-9)


def test_aux_is_differentiated():
    def with_aux(y, args):
        aux = {"energy": jnp.sum(y**2 * args["b"]), "name": "static", "code": jnp.array(3)}
        return layer(y, args), aux

    def energy(args):
        solution = nks.root_find(with_aux, SOLVER, jnp.zeros(N), args, has_aux=True)
        assert solution.aux["name"] == "static"
        return solution.aux["energy"], solution.aux["code"]

    dense = lambda args: jnp.sum(dense_root(args) ** 2 * args["b"])
    (value, code), gradient = jax.jit(jax.value_and_grad(energy, has_aux=True))(ARGS)
    assert int(code) == 3
    close(value, dense(ARGS), 1e-10)
    close(gradient, jax.jit(jax.grad(dense))(ARGS), 1e-9)
    close(along(lambda a: energy(a)[0])(ARGS), along(dense)(ARGS), 1e-9)


def test_the_start_and_the_solver_have_no_gradient():
    def value(y0, tolerance):
        solver = nks.NewtonKrylov(rtol=tolerance, atol=tolerance)
        return jnp.sum(nks.root_find(layer, solver, y0, ARGS).value)

    by_start, by_tolerance = jax.grad(value, argnums=(0, 1))(jnp.ones(N), jnp.asarray(1e-10))
    np.testing.assert_array_equal(by_start, jnp.zeros(N))
    assert float(by_tolerance) == 0.0


# --- composed -------------------------------------------------------------------------------


def test_a_root_inside_a_residual():
    """outer: z − 0.3 sin(y(z)) − b = 0 where y(z) solves the layer with b = z."""

    def inner(z, w):
        return nks.root_find(layer, SOLVER, jnp.zeros(N), {"W": w, "b": z}).value

    def outer(z, args):
        return z - 0.3 * jnp.sin(inner(z, args["W"])) - args["b"]

    def dense_outer(z, args):
        start = inner(lax.stop_gradient(z), lax.stop_gradient(args["W"]))
        y = dense_root({"W": args["W"], "b": z}, y=start)
        return z - 0.3 * jnp.sin(y) - args["b"]

    solver = nks.NewtonKrylov(rtol=1e-12, atol=1e-12)
    nested = lambda args: nks.root_find(outer, solver, ARGS["b"], args).value
    z, gradient = jax.jit(lambda a: (nested(a), jax.grad(loss(nested))(a)))(ARGS)
    close(outer(z, ARGS), jnp.zeros(N), 0.0, atol=1e-11)
    dense = lambda args: dense_root(args, dense_outer, z, steps=1)
    close(gradient, jax.jit(jax.grad(loss(dense)))(ARGS), 1e-9)


def test_inside_a_scan():
    """Implicit Euler, differentiated through its steps."""

    def step(y, _, solve, args):
        fn = lambda z, old: z - old - 0.2 * layer(z, args)
        y = solve(fn, y)
        return y, jnp.sum(y)

    def by_nksolve(fn, y):
        return nks.root_find(fn, SOLVER, y, y).value

    def by_hand(fn, y):
        z = y
        for _ in range(6):
            z = z - jnp.linalg.solve(jax.jacfwd(fn)(z, y), fn(z, y))
        return z

    def path(solve):
        def run(args):
            _, sums = lax.scan(lambda y, t: step(y, t, solve, args), args["b"], None, length=4)
            return jnp.sum(jnp.sin(sums))

        return run

    close(jax.jit(path(by_nksolve))(ARGS), jax.jit(path(by_hand))(ARGS), 1e-10)
    close(jax.jit(jax.grad(path(by_nksolve)))(ARGS), jax.jit(jax.grad(path(by_hand)))(ARGS), 1e-9)


# --- dtypes ---------------------------------------------------------------------------------


def test_float32():
    args = jtu.tree_map(lambda x: x.astype(jnp.float32), ARGS)
    solver = nks.NewtonKrylov(rtol=1e-5, atol=1e-5)
    f32_loss = lambda y: jnp.sum(COTANGENT.astype(jnp.float32) * jnp.sin(y))
    value = lambda a: f32_loss(nks.root_find(layer, solver, jnp.zeros(N, jnp.float32), a).value)
    gradient = jax.jit(jax.grad(value))(args)
    assert all(leaf.dtype == jnp.float32 for leaf in jtu.tree_leaves(gradient))
    close(gradient, jax.jit(jax.grad(loss(dense_root)))(ARGS), 1e-4)


def _conjugating(y, args):
    return args["W"] @ y * 0.3 + 0.2 * jnp.conj(y) ** 2 - (2.0 + 0.5j) * y + args["b"]


def _analytic(y, args):
    return args["W"] @ y * 0.3 + 0.2 * y**2 - (2.0 + 0.5j) * y + args["b"]


@pytest.mark.parametrize(
    ("fn", "tags"),
    [
        (_conjugating, frozenset()),
        (_analytic, frozenset()),
        (_analytic, frozenset({nks.holomorphic_tag})),
    ],
    ids=["real-linear", "holomorphic untagged", "holomorphic"],
)
def test_complex_gradient_is_that_of_the_real_formulation(fn, tags):
    args = jtu.tree_map(lambda a, d: lax.complex(a, 0.2 * d), ARGS, DIRECTION)
    real_loss = lambda y: jnp.sum(COTANGENT * jnp.abs(y) ** 2 + jnp.sin(y.real) * y.imag)

    def value(args):
        y0 = jnp.zeros(N, complex)
        return real_loss(nks.root_find(fn, SOLVER, y0, args, tags=tags).value)

    join = lambda pair: jtu.tree_map(lax.complex, *pair)
    split = lambda z: (jtu.tree_map(jnp.real, z), jtu.tree_map(jnp.imag, z))

    def split_fn(pair, args):
        out = fn(lax.complex(pair[:N], pair[N:]), join(args))
        return jnp.concatenate([out.real, out.imag])

    y = jax.jit(lambda a: nks.root_find(fn, SOLVER, jnp.zeros(N, complex), a, tags=tags).value)(
        args
    )
    close(fn(y, args), jnp.zeros(N, complex), 0.0, atol=1e-11)

    def split_value(pair):
        both = dense_root(pair, split_fn, jnp.concatenate([y.real, y.imag]), steps=1)
        return real_loss(lax.complex(both[:N], both[N:]))

    by_real, by_imag = jax.jit(jax.grad(split_value))(split(args))
    # JAX's convention: for a real loss, grad = ∂/∂Re − i ∂/∂Im
    expected = jtu.tree_map(lambda r, i: lax.complex(r, -i), by_real, by_imag)
    close(jax.jit(jax.grad(value))(args), expected, 1e-9)


# --- the adjoint solve ----------------------------------------------------------------------

SIZE = 40


def _convection(y, args):
    """Strongly upwinded, with a mild nonlinearity: far from symmetric."""
    left = jnp.concatenate([jnp.zeros(1), y[:-1]])
    right = jnp.concatenate([y[1:], jnp.zeros(1)])
    return 2.2 * y - 1.9 * left - 0.4 * right + 0.001 * y**3 - args


def _inverse(operator, y, args):
    """The inverse of the linear part, nonsymmetric."""
    del operator, y, args
    matrix = 2.2 * np.eye(SIZE) - 1.9 * np.eye(SIZE, k=-1) - 0.4 * np.eye(SIZE, k=1)
    inverse = jnp.asarray(np.linalg.inv(matrix))
    return lambda v: inverse @ v


def test_the_adjoint_solve_is_preconditioned_by_the_transpose():
    counter, applied = Counter(), Counter()
    fn = lambda y, args: _convection(*counter.tick((y, args)))

    def build(*inputs):
        inverse = _inverse(*inputs)
        return lambda v: inverse(applied.tick(v))

    def gradient(preconditioner):
        krylov = nks.GMRES(restart=SIZE, preconditioner=preconditioner)
        solver = nks.NewtonKrylov(rtol=1e-10, atol=1e-10, linear_solver=krylov)
        value = lambda a: jnp.sum(jnp.sin(nks.root_find(fn, solver, jnp.zeros(SIZE), a).value))
        with counter.measure() as count, applied.measure() as applications:
            out = jax.jit(jax.grad(value))(jnp.linspace(0.0, 0.1, SIZE))
        return out, count, applications

    plain, without, _ = gradient(nks.Identity())
    preconditioned, count, applications = gradient(nks.UserPreconditioner(build))
    close(preconditioned, plain, 1e-7)
    assert without.transposed >= 30  # plain GMRES needs nearly the dimension
    assert count.transposed <= 10  # M⁻¹ in place of M⁻ᵀ would not do
    # psolve ticks by its own role: M⁻ᵀ is the transpose of what was ticked as a primal
    assert 1 <= applications.transposed <= 10


POLICIES = [nks.Checkpointed(), nks.Recompute(), nks.Transposed()]


@jax.custom_vjp
def _reverse_only(y):
    return jnp.tanh(y)


_reverse_only.defvjp(lambda y: (jnp.tanh(y), jnp.tanh(y)), lambda t, ct: ((1.0 - t**2) * ct,))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_policies_give_the_same_gradient(policy):
    squash = _reverse_only if isinstance(policy, nks.Transposed) else jnp.tanh

    def fn(y, args):
        y3 = 0.1 * y**3
        return 0.6 * args["W"] @ squash(y) + args["b"] - y * (1.0 + args["b"] ** 2) - y3

    solver = nks.NewtonKrylov(rtol=1e-13, atol=1e-13, policy=policy)
    solve = lambda args: nks.root_find(fn, solver, jnp.zeros(N), args).value
    gradient = jax.jit(jax.grad(loss(solve)))(ARGS)
    close(gradient, jax.jit(jax.grad(loss(dense_root)))(ARGS), 1e-9)


def test_finite_differences_refuse_a_gradient():
    solver = nks.NewtonKrylov(rtol=1e-6, atol=1e-6, policy=nks.FiniteDifference())
    value = lambda args: jnp.sum(nks.root_find(layer, solver, jnp.zeros(N), args).value)
    assert np.isfinite(value(ARGS))
    for transformed in (jax.grad(value), along(value)):
        with pytest.raises(
            NotImplementedError, match=r"FiniteDifference.*cannot be differentiated"
        ):
            transformed(ARGS)


# --- failures -------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [jax.grad, along], ids=["grad", "jvp"])
def test_a_failed_adjoint_solve_raises_or_is_nan(transform):
    adjoint = nks.KrylovAdjoint(linear_solver=nks.GMRES(max_steps=1))

    def value(throw):
        find = lambda a: nks.root_find(layer, SOLVER, jnp.zeros(N), a, adjoint=adjoint, throw=throw)
        return lambda args: loss(lambda a: find(a).value)(args)

    silent = jax.jit(transform(value(False)))(ARGS)
    assert all(np.all(np.isnan(leaf)) for leaf in jtu.tree_leaves(silent))
    with pytest.raises(eqx.EquinoxRuntimeError, match="linear solve for a derivative"):
        jax.block_until_ready(eqx.filter_jit(transform(value(True)))(ARGS))


def test_after_a_failed_forward_solve_the_formula_holds_where_it_stopped():
    """ẏ = −J⁻¹ F_θ θ̇ at the returned point, whether or not it is a root."""

    def stopped(args):
        solution = nks.root_find(layer, SOLVER, jnp.full(N, 2.0), args, max_steps=2, throw=False)
        return solution.value, solution.stats["residual_norm"]

    @jax.jit
    def run(args):
        pull, (y, norm) = jax.vjp(lambda a: stopped(a)[0], args)[1], stopped(args)
        return y, norm, pull(COTANGENT)[0]

    y, norm, cotangent = run(ARGS)
    assert 1e-8 < float(norm) < 10.0
    by_y, by_args = jax.jacfwd(layer)(y, ARGS), jax.vjp(lambda a: layer(y, a), ARGS)[1]
    (expected,) = by_args(-jnp.linalg.solve(by_y.T, COTANGENT))
    close(cotangent, expected, 1e-9)

"""The helpers are tested too: a counter that cannot count proves nothing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from tests.helpers import (
    AS_SHIPPED,
    GALLERY,
    Counter,
    collectives,
    count_primitive,
    selects_at_least,
    square_tensors,
    square_values,
    walk,
)
from tests.helpers.counting import weighted

N = 7


@pytest.fixture
def counter():
    return Counter()


@pytest.fixture
def fn(counter):
    return lambda y: jnp.sin(counter.tick(y)) * 2.0


def counts(count):
    return count.primal, count.tangent, count.transposed


# --- counting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_one_evaluation_is_one_primal(counter, fn, wrap):
    call = wrap(fn)
    for _ in range(2):  # the second call is served from the cache of compiled programs
        with counter.measure() as count:
            call(jnp.arange(float(N)))
        assert counts(count) == (1, 0, 0)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_linearise_once_then_matvecs(counter, fn, wrap):
    @wrap
    def run(y):
        _, lin = jax.linearize(fn, y)
        v = y
        for _ in range(5):
            v = lin(v)
        return v

    with counter.measure() as count:
        run(jnp.arange(float(N)))
    assert counts(count) == (1, 5, 0)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_gradient_is_one_evaluation_and_one_transposed(counter, fn, wrap):
    with counter.measure() as count:
        wrap(jax.grad(lambda y: jnp.sum(fn(y))))(jnp.arange(float(N)))
    assert counts(count) == (1, 0, 1)


def test_jvp_and_transposed_of_transposed(counter, fn):
    y = jnp.arange(float(N))
    with counter.measure() as count:
        jax.jit(lambda y: jax.jvp(fn, (y,), (y,)))(y)
    assert counts(count) == (1, 1, 0)

    _, lin = jax.linearize(fn, y)
    back = lambda w: jax.linear_transpose(lin, y)(w)[0]
    forth = lambda v: jax.linear_transpose(back, y)(v)[0]
    with counter.measure() as count:
        jax.jit(back)(y)
        jax.jit(forth)(y)
    assert counts(count) == (0, 1, 1)
    with counter.measure() as count:  # the derivative of a linear map is that map
        jax.jit(lambda w: jax.jvp(back, (w,), (w,)))(y)
    assert counts(count) == (0, 0, 2)


def test_second_order(counter, fn):
    y = jnp.arange(float(N))
    grad = jax.grad(lambda y: jnp.sum(fn(y) ** 2))
    with counter.measure() as count:
        out = jax.jit(lambda y, v: jax.jvp(grad, (y,), (v,))[1])(y, y)
    assert count.primal == 1
    expected = jax.jvp(jax.grad(lambda y: jnp.sum((2.0 * jnp.sin(y)) ** 2)), (y,), (y,))[1]
    np.testing.assert_allclose(out, expected, rtol=1e-14)


def test_dynamic_while_loop(counter, fn):
    @jax.jit
    def run(y, trips):
        body = lambda carry: (carry[0] + 1, fn(carry[1]))
        return jax.lax.while_loop(lambda carry: carry[0] < trips, body, (jnp.array(0), y))

    for trips in (0, 1, 6):
        with counter.measure() as count:
            run(jnp.arange(float(N)), jnp.array(trips))
        assert counts(count) == (trips, 0, 0)


def test_linear_map_in_a_while_loop(counter, fn):
    @jax.jit
    def run(y, trips):
        _, lin = jax.linearize(fn, y)
        body = lambda carry: (carry[0] + 1, lin(carry[1]))
        return jax.lax.while_loop(lambda carry: carry[0] < trips, body, (jnp.array(0), y))

    with counter.measure() as count:
        run(jnp.arange(float(N)), jnp.array(11))
    assert counts(count) == (1, 11, 0)


def test_what_a_loop_repeats_is_counted_each_time(counter, fn):
    # XLA could move both out of the loop, for y does not change; the program asks for it anew.
    @jax.jit
    def run(y, v, trips):
        body = lambda carry: (carry[0] + 1, jax.jvp(fn, (y,), (carry[1],))[1])
        return jax.lax.while_loop(lambda carry: carry[0] < trips, body, (jnp.array(0), v))

    with counter.measure() as count:
        run(jnp.ones(N), jnp.ones(N), jnp.array(4))
    assert counts(count) == (4, 4, 0)


def test_equal_evaluations_are_not_merged(counter, fn):
    with counter.measure() as count:
        jax.jit(lambda y: fn(y) + jax.linearize(fn, y)[1](y))(jnp.ones(N))
    assert counts(count) == (2, 1, 0)


def test_a_linearisation_carried_through_a_loop(counter, fn):
    @jax.jit
    def run(y, trips):
        def body(carry):
            k, y = carry
            f, lin = jax.linearize(fn, y)
            return k + 1, f + 0.1 * lin(y)

        return jax.lax.while_loop(lambda carry: carry[0] < trips, body, (jnp.array(0), y))

    with counter.measure() as count:
        run(jnp.zeros(N), jnp.array(4))
    assert counts(count) == (4, 4, 0)


def test_scan_forward_and_reverse(counter, fn):
    def run(y):
        return jnp.sum(jax.lax.scan(lambda y, _: (fn(y), None), y, length=5)[0])

    with counter.measure() as count:
        jax.jit(run)(jnp.arange(float(N)))
    assert counts(count) == (5, 0, 0)
    with counter.measure() as count:
        jax.jit(jax.grad(run))(jnp.arange(float(N)))
    assert counts(count) == (5, 0, 5)


def test_checkpoint_evaluates_again(counter, fn):
    # An evaluation that only the reverse pass needs: the rematerialised one is executed and seen.
    run = jax.checkpoint(lambda y: jnp.sum(jnp.sin(fn(y))))
    with counter.measure() as count:
        jax.jit(jax.value_and_grad(run))(jnp.arange(float(N)))
    assert counts(count) == (2, 0, 1)


def test_cond_counts_the_branch_that_runs(counter, fn):
    run = jax.jit(lambda p, y: jax.lax.cond(p, fn, lambda y: y, y))
    for taken in (True, False):
        with counter.measure() as count:
            run(jnp.array(taken), jnp.arange(float(N)))
        assert count.primal == taken


def test_dead_code_is_not_counted(counter, fn):
    @jax.jit
    def run(y):
        fn(y)
        return jax.jvp(lambda y: 3.0 * counter.tick(y), (y,), (y,))[1]

    with counter.measure() as count:
        run(jnp.arange(float(N)))
    assert counts(count) == (0, 1, 0)


def test_vmap_counts_once_and_records_lanes(counter, fn):
    y = jnp.ones((4, N))
    with counter.measure() as count:
        jax.jit(jax.vmap(fn))(y)
    assert counts(count) == (1, 0, 0)
    assert count.lanes("primal") == [4] and count.batched == 1
    assert weighted(count, "primal") == 4

    _, lin = jax.linearize(fn, y[0])
    with counter.measure() as count:
        jax.jit(jax.vmap(lin))(y)
    assert counts(count) == (0, 1, 0) and count.lanes("tangent") == [4]

    with counter.measure() as count:
        jax.jit(jax.vmap(jax.vmap(fn), in_axes=1))(jnp.ones((3, 2, N)))
    assert count.lanes("primal") == [6]


def test_vmap_of_a_while_loop_runs_until_the_last_lane(counter, fn):
    @jax.jit
    @jax.vmap
    def run(y, trips):
        body = lambda carry: (carry[0] + 1, fn(carry[1]))
        return jax.lax.while_loop(lambda carry: carry[0] < trips, body, (jnp.array(0), y))

    with counter.measure() as count:
        run(jnp.ones((3, N)), jnp.array([1, 5, 2]))
    assert count.lanes("primal") == [3] * 5


def test_pytrees_integers_modules_and_values_pass_unchanged(counter):
    tree = {
        "module": eqx.nn.Linear(3, 2, key=jax.random.key(0)),
        "special": jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 5e-324]),
        "complex": jnp.array([complex(jnp.inf, -0.0), 1 + 2j]),
        "half": jnp.ones(3, jnp.float16),
        "integers": jnp.arange(3),
        "nothing": None,
        "text": "static",
    }
    with counter.measure() as count:
        out = eqx.filter_jit(counter.tick)(tree)
    assert counts(count) == (1, 0, 0)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(out), strict=True):
        if eqx.is_array(a):
            assert a.dtype == b.dtype
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert out["text"] == "static"
    with pytest.raises(ValueError, match="floating-point"):
        counter.tick(jnp.arange(3))


def test_partial_zero_tangents_and_transposes(counter):
    def fn(a, b):
        a, b = counter.tick((a, b))
        return a * b

    a, b = jnp.array(2.0), jnp.array(3.0)
    with counter.measure() as count:
        out = jax.jit(lambda a, b: jax.jvp(lambda a: fn(a, b), (a,), (jnp.ones(()),)))(a, b)
    assert counts(count) == (1, 1, 0) and out[1] == 3.0
    _, lin = jax.linearize(fn, a, b)
    half = lambda v: jax.linear_transpose(lambda da: lin(da, jnp.zeros(())), a)(v)[0]
    with counter.measure() as count:
        assert jax.jit(half)(jnp.ones(())) == 3.0
    assert count.primal == 0 and count.transposed == 1


def test_lineax_solve_counts_matvecs(counter):
    operator = lx.FunctionLinearOperator(
        lambda v: 2.0 * counter.tick(v), jax.ShapeDtypeStruct((N,), jnp.float64)
    )
    with counter.measure() as count:
        lx.linear_solve(operator, jnp.ones(N), lx.GMRES(rtol=1e-8, atol=0.0, restart=2))
    assert count.primal > 0


def test_counters_are_apart_and_measurements_nest(counter, fn):
    other = Counter()
    y = jnp.ones(N)
    with counter.measure() as outer, other.measure() as apart:
        fn(y)
        with counter.measure() as inner:
            fn(y)
    fn(y)
    assert (outer.primal, inner.primal, apart.primal) == (2, 1, 0)


@pytest.mark.parametrize("axis_type", list(jax.sharding.AxisType)[:2], ids=lambda t: t.name)
def test_sharded_values_count_once(counter, axis_type):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices; the CPU backend is given eight virtual ones")
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    y = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("d")))

    @jax.jit
    def run(y, trips):
        body = lambda carry: (carry[0] + 1, jnp.sin(counter.tick(carry[1])))
        return jax.lax.while_loop(lambda carry: carry[0] < trips, body, (jnp.array(0), y))

    with jax.set_mesh(mesh), counter.measure() as count:
        run(y, jnp.array(20))
    assert counts(count) == (20, 0, 0)


def test_shard_map_counts_on_each_device(counter):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices; the CPU backend is given eight virtual ones")
    mesh = Mesh(jax.devices(), ("d",))
    run = jax.shard_map(
        lambda y: jnp.sin(counter.tick(y)), mesh=mesh, in_specs=P("d"), out_specs=P("d")
    )
    with counter.measure() as count:
        jax.jit(run)(jnp.arange(16.0))
    assert count.primal == 8


# --- jaxprs -------------------------------------------------------------------------------------


@jax.custom_vjp
def _custom(x):
    return jnp.outer(x, x).sum(0)


_custom.defvjp(lambda x: (_custom(x), x), lambda x, ct: (ct * x,))


@jax.custom_jvp
def _customj(x):
    return jnp.outer(x, x).sum(0)


_customj.defjvp(lambda p, t: (_customj(*p), t[0]))
_outer = lambda x: jnp.outer(x, x).sum(0)

_CARRIERS = {
    "plain": _outer,
    "jit": jax.jit(_outer),
    "while": lambda x: jax.lax.while_loop(lambda x: x[0] < 1.0, _outer, x),
    "while_cond": lambda x: jax.lax.while_loop(lambda x: _outer(x)[0] < 1.0, lambda x: x + 1.0, x),
    "scan": lambda x: jax.lax.scan(lambda c, _: (_outer(c), None), x, length=2)[0],
    "cond": lambda x: jax.lax.cond(x[0] > 0.0, _outer, lambda x: x, x),
    "custom_vjp": _custom,
    "custom_jvp": _customj,
    "checkpoint": jax.checkpoint(_outer),
    "custom_linear_solve": lambda x: jax.lax.custom_linear_solve(
        lambda v: 2.0 * v, x, lambda mv, b: _outer(b), lambda mv, b: b
    ),
}


@pytest.mark.parametrize("name", _CARRIERS)
def test_square_values_are_found_in(name):
    jaxpr = jax.make_jaxpr(_CARRIERS[name])(jnp.ones(N))
    found = square_values(jaxpr, N)
    assert found and all(sum(d == N for d in value.aval.shape) >= 2 for value in found)
    assert any(value.eqn is not None for value in found)
    assert not square_values(jaxpr, N + 4)
    assert count_primitive(jaxpr, "mul") >= 1


def test_square_values_see_arguments_and_constants():
    matrix = np.ones((N, N))
    assert square_values(jax.make_jaxpr(lambda x: jnp.asarray(matrix) @ x)(jnp.ones(N)), N)
    assert square_values(jax.make_jaxpr(lambda a: a[0])(jnp.ones((N, 2, N))), N)[0].eqn is None
    assert not square_values(jax.make_jaxpr(lambda x: jnp.cumsum(x))(jnp.ones(N)), N)


def test_walk_reaches_nested_levels():
    def run(x):
        step = jax.jit(lambda c: jax.lax.cond(c[0] > 0.0, jnp.sin, jnp.cos, c))
        return jax.lax.scan(lambda c, _: (step(c), None), x, length=2)[0]

    names = {eqn.primitive.name for eqn in walk(jax.make_jaxpr(run)(jnp.ones(N)))}
    assert {"scan", "cond", "sin", "cos"} <= names


# --- HLO ----------------------------------------------------------------------------------------


def test_square_tensors_see_inside_a_lineax_solve():
    operator = lambda x: lx.FunctionLinearOperator(
        lambda v: jnp.outer(x, x) @ v + v, jax.ShapeDtypeStruct((N,), jnp.float64)
    )
    solve = lambda x: lx.linear_solve(operator(x), x, lx.GMRES(rtol=1e-3, atol=1e-3)).value
    text = jax.jit(solve).lower(jnp.ones(N)).as_text()
    assert square_tensors(text, N) and not square_tensors(text, N + 4)


def test_selects_appear_when_a_batched_loop_is_lowered():
    def run(y, trips):
        body = lambda carry: (carry[0] + 1, carry[1] + 1.0)
        return jax.lax.while_loop(lambda carry: carry[0] < trips, body, (jnp.array(0), y))

    one = jax.jit(run).lower(jnp.ones((5, N)), jnp.array(3)).as_text()
    assert not selects_at_least(one, 2)
    batch = jax.jit(jax.vmap(run)).lower(jnp.ones((3, 5, N)), jnp.arange(3)).as_text()
    assert [t.shape for t in selects_at_least(batch, 5 * N)] == [(3, 5, N)]
    assert not selects_at_least(batch, 3 * 5 * N + 1)


def test_collectives_in_and_out_of_loops():
    if jax.device_count() < 8:
        pytest.skip("needs eight devices; the CPU backend is given eight virtual ones")
    mesh = Mesh(jax.devices(), ("d",))
    y = jax.device_put(jnp.arange(32.0), NamedSharding(mesh, P("d")))

    def run(y, trips):
        scale = jnp.vdot(y, y)
        body = lambda carry: (carry[0] + 1, carry[1] / jnp.sqrt(jnp.vdot(carry[1], carry[1])))
        return jax.lax.while_loop(lambda c: c[0] < trips, body, (jnp.array(0), y / scale))[1]

    found = collectives(jax.jit(run).lower(y, jnp.array(3)).compile(AS_SHIPPED).as_text())
    assert [c.kind for c in found] == ["all-reduce"] * 2
    assert sorted(c.in_loop for c in found) == [False, True]
    assert all(c.shapes == (((), "f64"),) for c in found)

    gathered = jax.jit(lambda y: jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P())))
    found = collectives(gathered.lower(y).compile(AS_SHIPPED).as_text())
    assert [(c.kind, c.shapes[0].shape, c.in_loop) for c in found] == [("all-gather", (32,), False)]


# --- gallery ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GALLERY.values(), ids=GALLERY.keys())
def test_gallery_cases_are_what_they_say(case):
    values = np.linalg.svd(case.matrix, compute_uv=False)
    assert case.matrix.dtype == case.rhs.dtype == np.float64
    assert np.array_equal(case.matrix, case.matrix.T) == case.symmetric
    assert (values[-1] < 1e-12 * values[0]) == case.singular
    assert values[0] <= case.condition * values[-1] or case.singular
    solution = np.linalg.lstsq(case.matrix, case.rhs)[0]
    residual = np.linalg.norm(case.matrix @ solution - case.rhs)
    assert (residual <= 1e-10 * max(np.linalg.norm(case.rhs), 1.0)) == case.consistent


def test_gallery_names_what_the_tests_rely_on():
    eigenvalues = np.linalg.eigvalsh(GALLERY["symmetric_indefinite"].matrix)
    assert eigenvalues[0] < 0 < eigenvalues[-1]
    assert not GALLERY["zero_rhs"].rhs.any()
    assert not GALLERY["singular_inconsistent"].consistent

"""Deuflhard's affine covariant damping, against its algorithm with dense solves in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.newton.globalisation.nleq_err import NLEQErr
from nksolve.newton.globalisation.relay import Relay
from nksolve.problems import get
from tests.helpers import Counter

from .solving import assert_honest, counters, max_norm, reason, rows, run, trials

MIXING = np.random.default_rng(4).standard_normal((2, 2)) @ np.diag([1.0, 3e3])


def reference(fn, y, initial_length, steps):
    """NLEQ-ERR (Deuflhard 2004, §3.3.2) without re-expansion: λ and ‖F‖ of each trial."""
    jacobian = jax.jacobian(fn)
    norm = np.linalg.norm
    lengths, norms, before = [], [], None
    for _ in range(steps):
        j = np.asarray(jacobian(y))
        d = -np.linalg.solve(j, np.asarray(fn(y)))
        length = initial_length
        if before is not None:
            previous, previous_length, bar = before
            mu = previous_length * norm(previous) * norm(bar) / (norm(bar - d) * norm(d))
            length = min(1.0, mu)
        while True:
            value = np.asarray(fn(y + length * d))
            bar = -np.linalg.solve(j, value)
            lengths.append(length)
            norms.append(norm(value))
            if norm(bar) < norm(d):
                break
            mu = 0.5 * length**2 * norm(d) / norm(bar - (1 - length) * d)
            length = min(mu, 0.5 * length)
        before = d, length, bar
        y = y + length * d
    return np.array(lengths), np.array(norms)


def arctangents(y):
    return jnp.arctan(jnp.stack([y[0] + 0.1 * y[1], 3.0 * y[1] - 0.2 * y[0]]))


def powers(y):
    return jnp.stack([jnp.exp(y[0]) * y[1] - 0.5, y[0] ** 3 + y[1] - 1.0])


PROBLEMS = {
    "arctan": (arctangents, [4.0, -3.0]),
    "powers": (powers, [2.0, 2.0]),
    "rosenbrock": (lambda y: jnp.stack([10 * (y[1] - y[0] ** 2), 1 - y[0]]), [-1.2, 1.0]),
}


SEARCH = NLEQErr()


def solved(fn, y0, search=SEARCH, tol=1e-11, **kwargs):
    keywords = {"linear_solver": nks.DenseDirect(), "forcing": nks.ConstantForcing(1e-13)}
    solver = nks.NewtonKrylov(
        0.0, tol, globalisation=search, history_length=128, **(keywords | kwargs)
    )
    return run(lambda y, _: fn(y), solver, jnp.asarray(y0), max_steps=127)


@pytest.mark.parametrize("initial_length", [1.0, 0.01])
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_lengths(name, initial_length):
    """The same λ and ‖F‖ at every trial; trials are rejected, or λ < 1 is predicted."""
    fn, y0 = PROBLEMS[name]
    solution = solved(fn, y0, NLEQErr(initial_length=initial_length))
    assert reason(solution) == "residual_atol"
    assert_honest(solution, lambda y, _: fn(y), jnp.asarray(y0), None, rtol=0.0, atol=1e-11)
    record, steps = rows(solution), counters(solution)["num_steps"]
    lengths, norms = reference(fn, np.asarray(y0), initial_length, steps)
    assert len(lengths) == len(record["norm"]) - 1
    large = norms > 1e-9  # below, ‖F‖ and Δx̄ are rounding
    np.testing.assert_allclose(record["norm"][1:][large], norms[large], rtol=1e-6)
    sure = np.concatenate([[True], large[:-1]])
    np.testing.assert_allclose(record["step_length"][1:][sure], lengths[sure], rtol=1e-6)
    assert (lengths < 1).any() or name == "rosenbrock"


def test_affine_covariance():
    """The iterates of A F are those of F, whatever A; those of a line search on ‖F‖ are not."""
    mixed = lambda y: jnp.asarray(MIXING) @ arctangents(y)
    pair = [solved(fn, [4.0, -3.0], tol=1e-7) for fn in (arctangents, mixed)]
    records = [rows(solution) for solution in pair]
    k = min(len(record["norm"]) for record in records)
    assert k > 5
    for name in ("step_length", "accepted"):
        np.testing.assert_allclose(records[0][name][:k], records[1][name][:k], rtol=1e-7)
    np.testing.assert_allclose(pair[0].value, pair[1].value, atol=1e-6)
    searched = [
        rows(solved(fn, [4.0, -3.0], nks.Backtracking(), tol=1e-7)) for fn in (arctangents, mixed)
    ]
    k = min(len(record["norm"]) for record in searched)
    assert not np.allclose(searched[0]["step_length"][:k], searched[1]["step_length"][:k])


def test_work():
    """With a policy that evaluates `fn` at each product, a run-time counter sees all of them."""
    counter = Counter()

    def fn(y):
        return arctangents(counter.tick(y))

    with counter.measure() as count:
        solution = solved(
            fn,
            [4.0, -3.0],
            linear_solver=nks.GMRES(restart=2),
            policy=nks.Recompute(),
            tol=1e-8,
        )
    counted, record = counters(solution), rows(solution)
    assert reason(solution) == "residual_atol"
    assert counted["num_rejected_steps"] > 0
    assert count.primal == counted["num_fn_evals"]
    # Two unknowns: at least two products for each trial's simplified correction.
    simplified = counted["num_matvecs"] - record["num_matvecs"].sum()
    assert simplified >= 2 * (trials(solution) - 1)


PRECONDITIONERS = {
    "rebuilt": nks.Jacobi(probes=2),
    "lagged": nks.Lagged(nks.Jacobi(probes=2)),
    "user": nks.UserPreconditioner(
        lambda j, y, a: lambda v: v / (0.1 + jnp.abs(j.mv(jnp.ones(2))))
    ),
}


@pytest.mark.parametrize("name", list(PRECONDITIONERS))
def test_the_old_preconditioner_is_kept(name):
    """The same λ as with dense solves: J and M⁻¹ of the simplified solves are the old ones."""
    fn, y0 = PROBLEMS["arctan"]
    dense = rows(solved(fn, y0, tol=1e-8))
    krylov = solved(
        fn, y0, tol=1e-8, linear_solver=nks.GMRES(restart=3, preconditioner=PRECONDITIONERS[name])
    )
    assert reason(krylov) == "residual_atol"
    np.testing.assert_allclose(rows(krylov)["step_length"], dense["step_length"], rtol=1e-5)
    # M⁻¹ with each product, of d and of Δx̄.
    counted = counters(krylov)
    assert counted["num_preconditioner_applications"] >= counted["num_matvecs"]


def test_failure():
    """|y| + 1 has no root: θ < 1 nowhere near; the reason is told, the best point returned."""
    fn = lambda y: y**2 + 1.0
    solution = solved(fn, [2.0], NLEQErr(max_trials=12), tol=1e-9)
    assert reason(solution) in ("line_search_failed", "diverged", "stagnated")
    assert_honest(solution, lambda y, _: fn(y), jnp.array([2.0]), None, rtol=0.0, atol=1e-9)


def test_a_wall_of_nan():
    """A full step leads to NaN: λ is halved, and no product is made there."""
    fn = lambda y: jnp.log(y) + 2.0
    solution = solved(fn, [4.0], tol=1e-9)
    assert reason(solution) == "residual_atol"
    record = rows(solution)
    assert np.isnan(record["norm"]).any()
    np.testing.assert_allclose(solution.value, np.exp(-2.0), rtol=1e-8)


def test_lanes_trees_and_precision():
    """Lanes of a batch as if alone, on a tree, in float32, with GCRO-DR's recycled space."""

    def fn(y, a):
        u, v = y["u"], y["v"]
        return {"u": jnp.arctan(u) * a - 0.1 * v[0], "v": v + u[:1] - 1.0}

    y0 = {"u": jnp.asarray([3.0, -2.0], jnp.float32), "v": jnp.zeros((1,), jnp.float32)}
    solver = nks.NewtonKrylov(
        1e-4,
        1e-5,
        globalisation=NLEQErr(),
        forcing=nks.ConstantForcing(1e-4),
        linear_solver=nks.GCRODR(restart=3, recycle=1),
    )

    @jax.jit
    def solve(a):
        solution = run(fn, solver, y0, a, max_steps=60)
        return solution.value, solution.stats

    args = jnp.array([1.0, 0.3, 2.0], jnp.float32)
    values, stats = jax.jit(jax.vmap(solve))(args)
    for k, a in enumerate(args):
        alone, counted = solve(a)
        assert nks.reason_name(counted["reason"]).startswith("residual")
        for name in ("num_steps", "num_rejected_steps"):
            assert int(counted[name]) == int(stats[name][k])
        for got, wanted in zip(jax.tree.leaves(values), jax.tree.leaves(alone), strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got[k], wanted, rtol=2e-3, atol=2e-4)


def test_gradient_and_scales():
    """Rows scaled by 1e12 and 1e-3 cost nothing; the derivative of a root, by differences too."""
    scaled = lambda y: jnp.array([1e12, 1e-3]) * powers(y)
    solution = solved(scaled, [2.0, 2.0], tol=1e-2)
    assert reason(solution) == "residual_atol"
    root = lambda a: nks.root_find(
        lambda y, a: powers(y) - a * jnp.array([0.1, -0.2]),
        nks.NewtonKrylov(0.0, 1e-10, globalisation=NLEQErr(), linear_solver=nks.DenseDirect()),
        jnp.array([2.0, 2.0]),
        a,
    ).value[0]
    step = 1e-5
    difference = (root(1.0 + step) - root(1.0 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(root)(1.0), difference, rtol=1e-5)


def test_a_published_problem():
    """Chandrasekhar's equation with inexact solves: converges in a few full steps."""
    problem = get("chandrasekhar", n=64)
    solver = nks.NewtonKrylov(
        0.0, 1e-9, globalisation=NLEQErr(), forcing=nks.ConstantForcing(1e-4), history_length=20
    )
    solution = run(problem.fn, solver, problem.y0, problem.args)
    assert reason(solution) == "residual_atol"
    assert counters(solution)["num_rejected_steps"] == 0
    assert float(max_norm(problem.fn(solution.value, problem.args))) <= 1e-9


def test_as_one_of_several():
    """In a relay, whose first member has the turn: the same solve, the same counters."""
    alone = solved(*PROBLEMS["arctan"])
    among = solved(*PROBLEMS["arctan"], Relay((NLEQErr(), nks.Backtracking())))
    assert counters(alone) == counters(among)
    np.testing.assert_array_equal(alone.value, among.value)


def test_bad_arguments():
    for make in (
        lambda: NLEQErr(initial_length=0.0),
        lambda: NLEQErr(initial_length=2.0),
        lambda: NLEQErr(min_length=0.0),
    ):
        with pytest.raises(ValueError, match="must"):
            make()

"""`Scaled` is the solver on the problem in other units, and finds good units itself."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from jaxtyping import TypeCheckError

import nksolve as nks
from nksolve.newton.scaling.units import in_units, viewed
from nksolve.problems import get
from tests.helpers import Counter, square_values

from .solving import SUCCESS, counters, max_norm, reason, rows, run

N = 6
UNITS = 2.0 ** np.array([0, 9, -7, 3, -12, 5])  # of the unknowns
EQUATIONS = 2.0 ** np.array([4, -3, 11, 0, -9, 6])
S, R = jnp.asarray(UNITS), jnp.asarray(EQUATIONS)
Y0 = jnp.asarray(UNITS * np.array([2.0, -1.5, 1.0, 3.0, 0.5, -2.0]))


def coupled(y, args):
    """Arctangents and a tridiagonal part, in units S of y and R of F."""
    x = y / S.astype(y.dtype)
    p = jnp.pad(x, 1)
    f = 2 * jnp.arctan(x) + x - 0.4 * (p[2:] + p[:-2]) + 0.1 * x**2 - args
    return R.astype(y.dtype) * f


def by_hand(x, args):
    """The same, divided and multiplied by hand."""
    return coupled(S * x, args) / R


ARGS = jnp.asarray([0.3, -0.2, 0.5, 0.1, -0.4, 0.2])


def newton(**keywords):
    return nks.NewtonKrylov(1e-9, 0.0, history_length=40, **keywords)


def assert_same_solve(ours, theirs, units=UNITS):
    """Two solves of one problem in different units: point, counters, records."""
    np.testing.assert_allclose(ours.value / units, theirs.value, rtol=1e-8)
    assert reason(ours) == reason(theirs)
    same = {k: v for k, v in counters(ours).items() if k in counters(theirs)}
    assert same == counters(theirs)
    for name, column in rows(theirs).items():
        # The last norms are differences of rounding errors.
        np.testing.assert_allclose(rows(ours)[name], column, rtol=1e-5, atol=1e-13, err_msg=name)


# --- the solver in given units --------------------------------------------------------------------

MASS = jnp.linspace(1.0, 2.0, N)
DELTA = 1e2  # pseudo-time, in units of u over units of F
LOWER, UPPER = jnp.full(N, -1.9), jnp.full(N, 3.5)

GLOBALISATIONS = {
    "Backtracking": (nks.Backtracking(), nks.Backtracking()),
    "Dogleg": (nks.Dogleg(initial_radius=0.3), nks.Dogleg(initial_radius=0.3)),
    "Hookstep": (nks.Hookstep(initial_radius=0.3), nks.Hookstep(initial_radius=0.3)),
    "CriticalPoint": (nks.CriticalPoint(), nks.CriticalPoint()),
    "PseudoTransient": (
        nks.PseudoTransient(DELTA, mass=MASS),
        nks.PseudoTransient(DELTA, mass=MASS * S / R),
    ),
    "PseudoTransient-identity": (
        nks.PseudoTransient(DELTA),
        nks.PseudoTransient(DELTA, mass=S / R),
    ),
    "PseudoTransient-operator": (
        nks.PseudoTransient(DELTA, mass=lx.DiagonalLinearOperator(MASS)),
        nks.PseudoTransient(DELTA, mass=MASS * S / R),
    ),
    "PseudoTransient-TTE": (
        nks.PseudoTransient(DELTA, rule=nks.TTE()),
        nks.PseudoTransient(DELTA, rule=nks.TTE(), mass=S / R),
    ),
    "Feasible": (
        nks.Feasible(nks.Backtracking(), LOWER * S, UPPER * S),
        nks.Feasible(nks.Backtracking(), LOWER, UPPER),
    ),
    "Feasible-transient": (
        nks.Feasible(nks.PseudoTransient(DELTA, mass=MASS), LOWER * S, UPPER * S),
        nks.Feasible(nks.PseudoTransient(DELTA, mass=MASS * S / R), LOWER, UPPER),
    ),
}


@pytest.mark.parametrize("name", GLOBALISATIONS)
def test_every_globalisation_as_if_scaled_by_hand(name):
    plain, hand = GLOBALISATIONS[name]
    ours = run(coupled, nks.Scaled(newton(globalisation=plain), S, R), Y0, ARGS)
    theirs = run(by_hand, newton(globalisation=hand), Y0 / S, ARGS)
    assert reason(theirs) == "residual_rtol"
    assert_same_solve(ours, theirs)


def diagonal(operator, y, args):
    """A user's own, from y and the J that the user knows: 1/J_ii."""
    slope = jax.vmap(lambda i: operator.mv(jnp.zeros(N).at[i].set(1.0))[i])(jnp.arange(N))
    return lambda v: v / (slope + 0 * y)


PRECONDITIONERS = {
    "UserPreconditioner": nks.UserPreconditioner(diagonal),
    "BlockJacobi": nks.BlockJacobi(1, coupling=1),
    "Banded": nks.Banded(1, 1),
    "SparseLU": nks.SparseLU(),
    "Dense": nks.Dense(),
    "Lagged": nks.Lagged(nks.Dense(), 2),
    "InnerKrylov": nks.InnerKrylov(nks.GMRES(max_steps=3)),
    "Multiplicative": nks.Multiplicative((nks.Banded(1, 1), nks.UserPreconditioner(diagonal))),
    "QuasiNewton": nks.QuasiNewton(),
}


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_preconditioners_as_if_scaled_by_hand(name):
    """Those that are invariant under scaling; the user's sees the J and y that the user knows."""
    linear_solver = nks.FGMRES(preconditioner=PRECONDITIONERS[name])
    solver = newton(linear_solver=linear_solver, forcing=nks.ConstantForcing(1e-4))
    ours = run(coupled, nks.Scaled(solver, S, R), Y0, ARGS)
    theirs = run(by_hand, solver, Y0 / S, ARGS)
    assert reason(theirs) == "residual_rtol"
    assert_same_solve(ours, theirs)


SOLVERS = {
    "DenseDirect": nks.DenseDirect(),
    "BandedDirect": nks.BandedDirect(lower=1, upper=1),
    "LSMR": nks.LSMR(max_steps=100),
    "BiCGStab": nks.BiCGStab(),
    "GCRODR": nks.GCRODR(restart=6, recycle=2),
    "left": nks.GMRES(preconditioner=nks.Dense(), side="left"),
    "MixedPrecision": nks.GMRES(),
    "AutoLinear": nks.AutoLinear(),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_linear_solvers_as_if_scaled_by_hand(name):
    solver = newton(linear_solver=SOLVERS[name])
    ours = run(coupled, nks.Scaled(solver, S, R), Y0, ARGS)
    theirs = run(by_hand, solver, Y0 / S, ARGS)
    assert reason(theirs) == "residual_rtol"
    assert_same_solve(ours, theirs)
    assert "recycled" not in ours.stats


def test_increments_of_differences_are_made_in_scaled_unknowns():
    policy = nks.FiniteDifference()
    solver = newton(policy=policy, linear_solver=nks.GMRES(restart=N))
    ours = run(coupled, nks.Scaled(solver, S, R), Y0, ARGS)
    theirs = run(by_hand, solver, Y0 / S, ARGS)
    assert reason(ours) == reason(theirs) == "residual_rtol"
    np.testing.assert_allclose(ours.value / S, theirs.value, rtol=1e-8)
    assert counters(ours) == counters(theirs)


def test_ones_are_the_solver_itself():
    ours = run(coupled, nks.Scaled(newton(), 1.0, 1.0), Y0, ARGS)
    theirs = run(coupled, newton(), Y0, ARGS)
    np.testing.assert_array_equal(ours.value, theirs.value)
    for name, column in rows(theirs).items():
        np.testing.assert_array_equal(rows(ours)[name], column, err_msg=name)


def test_iterations_in_similar_units():
    """The plain iteration and what accelerates it: u + F(u) is the same map in units S = S_F."""

    def contraction(y, args):
        x = y / S
        return S * (0.5 * jnp.cos(x + 0.3 * jnp.roll(x, 1)) - x) + args

    hand = lambda x, args: contraction(S * x, args) / S
    args = jnp.zeros(N)
    for solver in (
        nks.Picard(1e-9, 0.0, history_length=60),
        nks.Anderson(1e-9, 0.0, depth=3, history_length=60),
        nks.Broyden(1e-9, 0.0, history_length=60),
        nks.Switching(1e-9, 0.0, history_length=60),
    ):
        ours = run(contraction, nks.Scaled(solver, S, nks.Similar()), Y0, args)
        theirs = run(hand, solver, Y0 / S, args)
        assert reason(theirs) == "residual_rtol"
        assert_same_solve(ours, theirs)
        assert "inverse" not in ours.stats


def test_gradients_in_congruent_units():
    """F = ∇E stays one in units S_F = S⁻¹, and CG may have its symmetric J."""
    energy = lambda x: jnp.sum(x**4 / 4 + x**2 / 2) + 0.2 * jnp.sum(x[1:] * x[:-1])
    gradient = lambda y, args: jax.grad(lambda y: energy(y / S))(y) - args / S
    hand = lambda x, args: jax.grad(energy)(x) - args
    tags = frozenset({lx.positive_semidefinite_tag, lx.symmetric_tag})
    for linear_solver in (nks.CG(), nks.MINRES()):
        solver = newton(linear_solver=linear_solver)
        ours = run(gradient, nks.Scaled(solver, S, nks.Congruent()), Y0, ARGS, tags=tags)
        theirs = run(hand, solver, Y0 / S, ARGS, tags=tags)
        assert reason(theirs) == "residual_rtol"
        assert_same_solve(ours, theirs)


# --- found from data ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_automatic_sizes_make_a_solve_independent_of_units(dtype):
    """The same steps, bit by bit, whatever the units of the unknowns and the equations are."""

    def fn(u, args):
        shifts, units, of_rows = args
        value = by_hand((u / units).astype(jnp.float64), shifts.astype(jnp.float64))
        return of_rows * value.astype(dtype)

    # Magnitudes within one array must differ by less than the round-off.
    tol, spread = (1e-9, 20.0) if dtype == jnp.float64 else (1e-4, 10.0)
    solver = nks.Scaled(nks.NewtonKrylov(tol, 0.0, history_length=40))
    y0, args = (Y0 / S).astype(dtype), ARGS.astype(dtype)
    seen = []
    for k in (0, 1, -1):
        units = jnp.asarray(2.0 ** (k * spread * np.array([0.0, 1.0, -0.8, 0.2, -1.0, 0.6])), dtype)
        of_rows = jnp.asarray(2.0 ** (k * np.array([-20.0, 13.0, 40.0, -31.0, 5.0, 0.0])), dtype)
        solution = run(fn, solver, y0 * units, (args, units, of_rows))
        assert reason(solution) == "residual_rtol"
        seen.append((solution, solution.value / units))
    for solution, value in seen[1:]:
        np.testing.assert_array_equal(value, seen[0][1])
        assert counters(solution) == counters(seen[0][0])
        for name, column in rows(seen[0][0]).items():
            np.testing.assert_array_equal(rows(solution)[name], column, err_msg=name)


def sizes_of(variables, y):
    """S_u at y."""
    solver = nks.Scaled(newton(), variables, 1.0)
    fn = lambda y, args: jtu.tree_map(lambda x: x - 1.0, y)
    return run(fn, solver, y, max_steps=0).stats["scaling"].unknowns


def test_entry_sizes():
    y = {"a": jnp.asarray([3.0, -0.3, 0.0, 1e-17, 5e4]), "b": jnp.zeros(2), "c": jnp.asarray(-7.0)}
    found = sizes_of(nks.EntrySizes(), y)
    # 0 and 1e-17, below the round-off of 5e4, get √((9 + 0.09 + 25e8)/3) = 28868.
    np.testing.assert_array_equal(found["a"], [4.0, 0.25, 2.0**15, 2.0**15, 2.0**16])
    np.testing.assert_array_equal(found["b"], [1.0, 1.0])
    assert found["c"] == 8.0


def test_leaf_sizes():
    y = {"a": jnp.asarray([[1.0, 3e4], [3.0, 4e4]]), "b": jnp.zeros(2)}
    found = sizes_of(nks.LeafSizes(), y)
    np.testing.assert_array_equal(found["a"], np.full((2, 2), 2.0**15))
    np.testing.assert_array_equal(found["b"], [1.0, 1.0])
    by_axis = sizes_of(nks.LeafSizes(axes=-1), {"a": y["a"]})
    np.testing.assert_array_equal(by_axis["a"], np.broadcast_to([2.0, 2.0**15], (2, 2)))


def test_sizes_of_extremes():
    tiny, huge = np.finfo(np.float64).smallest_subnormal, np.finfo(np.float64).max
    found = sizes_of(nks.EntrySizes(), {"a": jnp.asarray(tiny), "b": jnp.asarray(huge)})
    for size in jtu.tree_leaves(found):
        assert np.isfinite(size) and np.isfinite(1 / size) and size > 0
    found = sizes_of(nks.EntrySizes(), jnp.asarray([1.0, jnp.inf, jnp.nan]))
    assert np.all(np.isfinite(found))


def test_given_sizes_of_the_unknowns_are_powers_of_two():
    np.testing.assert_array_equal(sizes_of(jnp.asarray([3e4, 1.0, 0.4]), jnp.ones(3))[0], 2.0**15)
    nested = sizes_of(
        {"a": 3.0, "b": None}, {"a": {"p": jnp.ones(2), "q": jnp.ones(())}, "b": None}
    )
    assert nested["a"]["q"] == 4.0 and nested["a"]["p"].shape == (2,)


def test_row_sizes_estimate_row_norms():
    """Within the error that the docstring states: k probes, 1/√(2k) of the norm, one σ."""
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=(200, 200)) * 10.0 ** rng.uniform(-5, 5, (200, 1)))
    fn = lambda y, args: matrix @ y - 1.0
    exact = np.linalg.norm(np.asarray(matrix), axis=1)
    for probes in (8, 64):
        solver = nks.Scaled(newton(), 1.0, nks.RowSizes(probes))
        solution = run(fn, solver, jnp.ones(200), max_steps=0)
        found = np.asarray(solution.stats["scaling"].residual)
        assert int(solution.stats["num_probes"]) == probes
        # Rounding to a power of two is off by √2 at most, and evenly spread in the logarithm.
        error = np.log2(found / exact)
        spread = 1 / np.sqrt(2 * probes) / np.log(2)
        assert np.max(np.abs(error)) < 0.5 + 4.5 * spread
        assert np.std(error) < 1.2 * np.hypot(spread, 1 / np.sqrt(12))
        np.testing.assert_array_equal(found, 2.0 ** np.round(np.log2(found)))
    again = run(fn, nks.Scaled(newton(), 1.0, nks.RowSizes(8, seed=1)), jnp.ones(200), max_steps=0)
    assert np.any(np.asarray(again.stats["scaling"].residual) != found)


def test_a_row_of_zeros_and_sizes_from_the_residual():
    fn = lambda y, args: jnp.stack([1e6 * (y[0] - 2), 0 * y[1] + 3e-3, y[2] - 1])
    start = jnp.asarray([1.0, 1.0, 3.0])
    rows_found = run(fn, nks.Scaled(newton()), start, max_steps=0).stats["scaling"].residual
    assert rows_found[1] > rows_found[2]  # the root mean square of the others
    by_value = nks.Scaled(newton(), residual=nks.EntrySizes())
    found = run(fn, by_value, start, max_steps=0).stats["scaling"].residual
    np.testing.assert_array_equal(found, 2.0 ** np.round(np.log2([1e6, 3e-3, 2.0])))
    one = run(fn, nks.Scaled(newton(), residual=nks.LeafSizes()), start, max_steps=0)
    assert np.unique(np.asarray(one.stats["scaling"].residual)).size == 1


# --- work and derivatives -------------------------------------------------------------------------

COUNTER = Counter()


def counted(y, args):
    y, args = COUNTER.tick((y, args))
    return coupled(y, args)


@pytest.mark.parametrize("automatic", [False, True])
def test_work(automatic):
    """Given sizes cost nothing; those from data one evaluation and eight probes; a gradient adds
    no evaluation."""
    solver = nks.Scaled(newton()) if automatic else nks.Scaled(newton(), S, R)
    solve = lambda args: nks.root_find(counted, solver, Y0, args)
    with COUNTER.measure() as count:
        solution = solve(ARGS)
    stats = counters(solution)
    assert count.primal == stats["num_fn_evals"]
    trials = 1 + stats["num_steps"] + stats["num_rejected_steps"]
    assert stats["num_fn_evals"] == trials + automatic
    assert stats["num_probes"] == 8 * automatic
    assert sum(e.lanes or 1 for e in count.executions if e.role == "tangent") == (
        stats["num_matvecs"] + stats["num_probes"]
    )
    with COUNTER.measure() as again:
        jax.jit(jax.grad(lambda a: jnp.sum(solve(a).value)))(ARGS)
    assert again.primal == count.primal


def test_derivatives():
    weights = jnp.linspace(-1.0, 2.0, N)
    solve = lambda args, solver: nks.root_find(coupled, solver, Y0, args).value / S
    root = solve(ARGS, newton(norm=max_norm))
    dense = jax.jacfwd(coupled)(S * root, ARGS)
    by_args = jax.jacfwd(coupled, 1)(S * root, ARGS)
    exact = -np.linalg.solve(dense * S[None] / R[:, None], by_args / R[:, None])
    for solver in (nks.Scaled(newton()), nks.Scaled(newton(), S, R)):
        scalar = lambda a, solver=solver: jnp.vdot(weights, solve(a, solver))
        np.testing.assert_allclose(jax.grad(scalar)(ARGS), weights @ exact, rtol=1e-6)
        forward = jax.jacfwd(lambda a, solver=solver: solve(a, solver))(ARGS)
        np.testing.assert_allclose(forward, exact, rtol=1e-6, atol=1e-9)


def test_no_square_array():
    n = 13
    fn = lambda y, args: 1e5 * (jnp.tanh(y) + 0.1 * jnp.roll(y, 1) - args)
    solver = nks.Scaled(nks.NewtonKrylov(1e-8, 0.0, linear_solver=nks.GMRES(restart=5)))
    loss = lambda a: jnp.sum(nks.root_find(fn, solver, jnp.ones(n), a).value)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(0.1 * jnp.ones(n))
    assert not square_values(jaxpr, n)


def test_lanes_have_sizes_of_their_own():
    solver = nks.Scaled(nks.NewtonKrylov(1e-12, 0.0, history_length=60))
    units = jnp.asarray([1.0, 1e6, 1e-9])

    def solve(unit):
        fn = lambda y, args: (y / unit) ** 3 + y / unit - args
        solution = run(fn, solver, unit * jnp.asarray([3.0, -30.0]), jnp.asarray([2.0, 10.0]))
        return solution.value / unit, solution.stats["num_steps"], solution.stats["scaling"]

    batch = jax.jit(jax.vmap(solve))(units)
    for k, unit in enumerate(units):
        alone = jax.jit(solve)(unit)
        for got, wanted in zip(jtu.tree_leaves(batch), jtu.tree_leaves(alone), strict=True):
            np.testing.assert_allclose(got[k], wanted, rtol=1e-12)
    np.testing.assert_allclose(batch[0], np.tile([1.0, 2.0], (3, 1)), rtol=1e-8)


class Layered(eqx.Module):
    """Unknowns of two units beside a function and a number that are none."""

    flow: jax.Array
    heat: jax.Array
    activation: object
    size: int = eqx.field(static=True)


def test_modules():
    y0 = Layered(jnp.full(3, 2e6), jnp.asarray(5e-7), jnp.tanh, 3)

    def fn(y, args):
        flow = (y.flow / 1e6) ** 2 - 2.0
        return Layered(flow, (y.heat / 1e-6) ** 3 - 3e3, None, 3)

    solver = nks.Scaled(nks.NewtonKrylov(1e-10, 0.0))
    value = nks.root_find(fn, solver, y0).value
    np.testing.assert_allclose(value.flow, 1e6 * 2**0.5, rtol=1e-9)
    np.testing.assert_allclose(value.heat, 1e-6 * 3e3 ** (1 / 3), rtol=1e-9)
    assert value.activation is jnp.tanh


def test_it_is_an_optimistix_solver():
    solver = nks.Scaled(newton())
    theirs = optx.root_find(coupled, solver, Y0, ARGS, max_steps=257)
    ours = nks.root_find(coupled, solver, Y0, ARGS)
    np.testing.assert_array_equal(theirs.value, ours.value)
    assert int(theirs.stats["num_fn_evals"]) == int(ours.stats["num_fn_evals"])


def test_complex_unknowns():
    fn = lambda y, args: 1e7 * ((y / 1e-3) ** 2 - args)
    solver = nks.Scaled(nks.NewtonKrylov(1e-10, 0.0))
    value = run(fn, solver, jnp.asarray([1e-3 + 1e-3j, 2e-3 - 1e-4j]), jnp.asarray([2j, 4.0])).value
    np.testing.assert_allclose(value, [1e-3 * (1 + 1j), 2e-3], rtol=1e-8)


def test_nothing_to_solve():
    solution = run(lambda y, args: y, nks.Scaled(newton()), {})
    assert reason(solution) in SUCCESS


# --- problems -------------------------------------------------------------------------------------


def test_food_web_in_its_own_units():
    """Prey of 1, predators of 3·10⁴, equations of 1 and 10⁹: KINSOL's example without its scaling.
    Without `Scaled` the tolerance of the prey lies below the rounding of the predators."""
    problem = get("food-web", scaled=False)
    sizes = jnp.where(jnp.arange(6) < 3, 1.0, 1e5)  # KINSOL's D⁻¹, in which it judges
    krylov = nks.GMRES(restart=60)
    own = nks.NewtonKrylov(0.0, 1e-8, norm=max_norm, linear_solver=krylov)

    def judged(solution):
        f = problem.fn(solution.value, problem.args)
        return float(max_norm(f / sizes[None, None])), reason(solution), counters(solution)

    norm, why, work = judged(
        run(problem.fn, nks.Scaled(own, residual=sizes), problem.y0, problem.args)
    )
    assert why == "residual_atol" and norm < 1e-7
    assert work["num_steps"] <= 5 and work["num_rejected_steps"] == 0
    # Nothing given at all: the tolerance is then one of the scaled residual, too.
    blind = nks.Scaled(nks.NewtonKrylov(1e-9, 0.0, norm=max_norm, linear_solver=krylov))
    solution = run(problem.fn, blind, problem.y0, problem.args)
    norm, why, work = judged(solution)
    assert why == "residual_rtol" and norm < 1e-7
    assert work["num_steps"] <= 6 and work["num_rejected_steps"] == 0
    corner = solution.value[0, 0]
    np.testing.assert_allclose([corner[0], corner[3]], problem.published["bottom_left"], rtol=3e-6)
    _, why, plain = judged(run(problem.fn, own, problem.y0, problem.args))
    assert why != "residual_atol"
    assert plain["num_matvecs"] > 5 * work["num_matvecs"]


# --- the laws of the parts ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [k for k in PRECONDITIONERS if k not in ("InnerKrylov",)])
def test_preconditioners_keep_their_transpose(name):
    """⟨M⁻¹u, v⟩ = ⟨u, M⁻ᵀv⟩ in scaled units, and M⁻¹ = S_u⁻¹ M⁻¹ S_F of the plain one."""
    scaling = nks.Scaling(S, R)
    lin = nks.linearise(coupled, Y0, ARGS)
    part = in_units(PRECONDITIONERS[name], scaling)
    scaled = viewed(lin.operator, scaling)
    inverse = part.as_operator(part.init(scaled, Y0 / S, ARGS))
    rng = np.random.default_rng(3)
    u, v = (jnp.asarray(rng.normal(size=N)) for _ in range(2))
    np.testing.assert_allclose(
        jnp.vdot(inverse.mv(u), v), jnp.vdot(u, inverse.transpose().mv(v)), rtol=1e-10
    )


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        (0.0, "positive"),
        (-1.0, "positive"),
        (jnp.asarray([1.0, jnp.nan]), "positive"),
        (np.inf, "positive"),
        (None, "Sizes are"),
        (True, "Sizes are"),
        ("auto", "Sizes are"),
        (1j, "Sizes are"),
    ],
)
def test_bad_sizes(sizes, match):
    for keywords in ({"variables": sizes}, {"residual": sizes}):
        with pytest.raises((ValueError, TypeError), match=match):
            nks.Scaled(newton(), **keywords)


def test_sizes_that_do_not_fit():
    fn, y = (lambda y, args: y), {"a": jnp.ones(3), "b": jnp.ones(2)}
    for keywords, match in (
        ({"variables": {"a": 1.0}}, "prefix"),
        ({"variables": {"a": jnp.ones(2), "b": 1.0}}, "broadcast"),
        ({"residual": {"a": jnp.ones((1, 3)), "b": 1.0}}, "broadcast"),
        ({"variables": nks.LeafSizes(axes=(1,))}, "no such axes"),
    ):
        with pytest.raises(ValueError, match=match):
            nks.root_find(fn, nks.Scaled(newton(), **keywords), y)


@pytest.mark.parametrize("which", ["variables", "residual"])
def test_traced_sizes_that_are_not_positive(which):
    """Known only when the program runs: the solve fails and returns its start."""

    @jax.jit
    def solve(size):
        solution = run(coupled, nks.Scaled(newton(), **{which: size}), Y0, ARGS)
        return solution.value, solution.stats["reason"]

    value, why = solve(jnp.asarray(-1.0))
    np.testing.assert_array_equal(value, Y0)
    assert nks.reason_name(why) == "nonfinite"
    assert nks.reason_name(solve(jnp.asarray(2.0))[1]) in SUCCESS


def test_what_cannot_be_scaled():
    inner, sweep = newton(), lambda y, args: y
    own = nks.NonlinearPreconditioner(nks.Picard(0.0, 0.0), fn=sweep)
    cg = newton(linear_solver=nks.CG())
    hidden = newton(linear_solver=nks.FGMRES(preconditioner=nks.InnerKrylov(nks.CG())))
    for solver, match in (
        (nks.Scaled(inner), "scale twice"),
        (nks.Recorded(inner, (1,)), "Record the scaled"),
        (nks.Deflated(inner, [jnp.ones(2)]), "deflate"),
        (nks.RightPreconditioned(inner, own), "own residual"),
        (cg, "Congruent"),
        (hidden, "Congruent"),
    ):
        with pytest.raises(ValueError, match=match):
            nks.Scaled(solver)
    nks.Scaled(cg, residual=nks.Congruent())
    for wrong in (optx.Newton(1e-8, 1e-8), nks.GMRES()):
        with pytest.raises((TypeError, TypeCheckError), match="Scaled"):
            nks.Scaled(wrong)
    with pytest.raises(TypeError, match="residual only"):
        nks.Scaled(inner, variables=nks.RowSizes())
    with pytest.raises(ValueError, match="probes"):
        nks.RowSizes(0)

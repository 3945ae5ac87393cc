"""Parts whose meeting asks something of either: what a shift leaves of J, what a wrapper must pass
on, what a method reports and what a derivative must not inherit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve import tree
from nksolve.linearise.lower import working
from nksolve.linearise.views import plus_multiple
from tests.newton.composing import ARGS, SIZE, START, TAGS, lane, residual
from tests.newton.solving import SUCCESS, counters, reason, rows, run

Y0, PARAMETERS = lane(START, 1), lane(ARGS, 1)
TRANSIENT = nks.PseudoTransient(10.0)


def newton(**keywords):
    return nks.NewtonKrylov(1e-9, 0.0, **keywords)


def solve(solver, **keywords):
    return run(residual, solver, Y0, PARAMETERS, **{"tags": TAGS, **keywords})


def gradient(solver, **keywords):
    """Of the sum of all unknowns, as a plain function of args."""

    def value(args):
        y = nks.root_find(residual, solver, Y0, args, **{"tags": TAGS, **keywords}).value
        return jnp.sum(y["u"]) + jnp.sum(y["v"])

    return jax.jit(jax.grad(value))(PARAMETERS)


@pytest.fixture(scope="module")
def exact():
    """That gradient by solves to rounding."""
    return gradient(nks.NewtonKrylov(1e-13, 0.0, linear_solver=nks.DenseDirect()))


def close(found, exact, rtol=1e-7):
    for name, value in exact.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, err_msg=name)


# --- J + M/δ --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kept",
    [nks.Chebyshev(2), nks.Multiplicative([nks.Jacobi(probes=1)] * 2)],
    ids=lambda p: type(p).__name__,
)
@pytest.mark.parametrize("wrap", [lambda s: s, nks.Scaled], ids=["plain", "scaled"])
def test_a_preconditioner_that_keeps_the_operator_keeps_the_shifted_one(kept, wrap):
    method = nks.GMRES(preconditioner=nks.Lagged(kept, max_age=2))
    assert reason(solve(wrap(newton(globalisation=TRANSIENT, linear_solver=method)))) in SUCCESS


@pytest.mark.parametrize("method", [nks.GMRES(), nks.GCRODR(restart=6, recycle=3)])
@pytest.mark.parametrize("make", [newton, nks.Robust])
def test_a_shift_in_a_lower_precision(make, method):
    """The linear solves are in float32 all the same: nothing else is in double but the residual."""
    keywords = {"policy": nks.LowerPrecision(), "linear_solver": method}
    if make is newton:
        solver = newton(globalisation=TRANSIENT, **keywords)
    else:
        solver = nks.Robust(1e-9, 0.0, **keywords)
    solution = solve(solver)
    assert reason(solution) in SUCCESS
    assert solution.stats["arnoldi"].matrix.dtype == jnp.float32


def test_what_is_promised_of_a_shifted_jacobian():
    promised = frozenset({lx.symmetric_tag, lx.positive_semidefinite_tag, nks.holomorphic_tag})
    policy = nks.LowerPrecision()
    operator = nks.linearise(residual, Y0, PARAMETERS, policy=policy, tags=promised).operator
    half = jnp.asarray(0.5)
    for mass in (None, tree.scale(2.0, Y0)):
        shifted = plus_multiple(operator, half, mass)
        assert shifted.tags == promised
        assert working(shifted).out_structure()["u"].dtype == jnp.float32
    other = nks.linearise(lambda y, _: tree.scale(3.0, y), Y0).operator
    assert plus_multiple(operator, half, other).tags == frozenset()
    assert not plus_multiple(other, half).tags


def _dense_and_definite(y, args):
    return 0.5 * y + 0.02 * args["m"] @ jnp.tanh(args["m"].T @ y) - args["b"]


def test_the_choice_sees_the_shift():
    """A tag or a pattern of J alone would choose another method than that of J + M/δ."""
    n = 20
    args = {"m": jax.random.normal(jax.random.key(0), (n, n)), "b": jnp.linspace(0.0, 1.0, n)}
    solver = newton(globalisation=TRANSIENT, linear_solver=nks.AutoLinear())
    tags = frozenset({lx.positive_semidefinite_tag})
    solution = run(_dense_and_definite, solver, jnp.full(n, 2.0), args, tags=tags)
    assert reason(solution) in SUCCESS
    assert str(solution.stats["choice"]).startswith("CG")


@pytest.mark.parametrize("order", [1, -1])
def test_attempts_that_keep_a_jacobian_beside_one_that_shifts_it(order):
    """From the first to the second, in either order."""
    searches = [TRANSIENT, nks.NLEQErr()][::order]
    attempts = (nks.Attempt(searches[0], max_trials=1), nks.Attempt(searches[1]))
    solution = solve(nks.Robust(1e-9, 0.0, attempts=attempts))
    assert reason(solution) in SUCCESS and counters(solution)["num_attempts"] == 2
    alone = solve(newton(globalisation=searches[1]))
    # It begins anew at the best point: no more steps than from the start.
    assert counters(solution)["num_steps"] <= 2 + counters(alone)["num_steps"]


# --- workspaces and what is reported --------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "search"),
    [
        (nks.FGMRES(), nks.Backtracking()),
        (nks.GCRODR(restart=6, recycle=3), nks.Backtracking()),
        (nks.LSMR(kept=SIZE), nks.LevenbergMarquardt(0.3)),
        (nks.FGMRES(), nks.Hookstep(0.3)),
    ],
    ids=["FGMRES", "GCRODR", "LSMR", "Hookstep"],
)
def test_a_preconditioner_that_turns_out_to_be_the_identity(method, search):
    """The same steps as without one, but for what a recycled space is renewed from."""
    idle = nks.Lagged(nks.Identity(), max_age=1)
    with_idle = eqx.tree_at(lambda m: m.preconditioner, method, idle)
    norms = []
    for m in (method, with_idle):
        solution = solve(newton(globalisation=search, linear_solver=m, history_length=30))
        assert reason(solution) in SUCCESS
        norms.append(rows(solution)["norm"])
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("factor", [1e3, 1e-3])
def test_a_left_preconditioner_of_another_size(factor):
    """‖M⁻¹r‖ is in no units of F: what is reported, forced and judged is ‖F + J d‖."""
    large = nks.UserPreconditioner(lambda *_: lambda v: tree.scale(factor, v))
    method = nks.GMRES(side="left", preconditioner=large)
    solution = solve(newton(linear_solver=method, forcing=nks.EisenstatWalker1()))
    plain = solve(newton(forcing=nks.EisenstatWalker1()))
    assert reason(solution) in SUCCESS
    assert counters(solution)["num_steps"] == counters(plain)["num_steps"]
    # One matvec a direction more, for F + J d.
    directions = 1 + counters(plain)["num_steps"] - 1
    assert counters(solution)["num_matvecs"] == counters(plain)["num_matvecs"] + directions
    lin = nks.linearise(residual, Y0, PARAMETERS)
    b = tree.neg(lin.value)
    linear = lx.linear_solve(lin.operator, b, nks.GMRES(1e-3, side="left", preconditioner=large))
    left = tree.norm2(tree.sub(b, lin.operator.mv(linear.value)))
    np.testing.assert_allclose(linear.stats["residual_norm"], left, rtol=1e-10)


def test_least_squares_in_a_lower_precision(exact):
    """Also where the rest is solved for in double, with Jᵀ and M⁻ᵀ."""
    method = nks.LSMR(preconditioner=nks.Jacobi(probes=1))
    solver = nks.NewtonKrylov(1e-13, 0.0, linear_solver=method, policy=nks.LowerPrecision())
    close(gradient(solver), exact)
    # κ = 1e9: refinement of float32 solves stagnates at once.
    scales = jnp.asarray(np.logspace(0, -9, 12))
    fn = lambda y, b: scales * y - b
    solution = run(fn, solver, jnp.zeros(12), scales)
    assert reason(solution) in SUCCESS
    np.testing.assert_allclose(solution.value, 1.0, rtol=1e-3)


@pytest.mark.parametrize(
    ("method", "search"),
    [
        (nks.FGMRES(), nks.Hookstep(0.2)),
        (nks.LSMR(kept=SIZE), nks.LevenbergMarquardt(0.2)),
    ],
    ids=["Hookstep", "LevenbergMarquardt"],
)
def test_bent_steps_in_a_lower_precision(method, search):
    """The space of the one solve that a loose tolerance needs serves: the same short steps."""
    forcing = nks.ConstantForcing(1e-3)
    keywords = {"globalisation": search, "forcing": forcing, "history_length": 30}
    made = [
        solve(newton(linear_solver=method, policy=policy, **keywords))
        for policy in (nks.Linearise(), nks.LowerPrecision())
    ]
    lengths = [rows(solution)["step_length"][1:4] for solution in made]
    assert lengths[0][0] < 0.5
    np.testing.assert_allclose(lengths[0], lengths[1], rtol=1e-4)
    norms = [rows(solution)["norm"][:4] for solution in made]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


@pytest.mark.parametrize("method", [nks.BiCGStab, nks.LSMR], ids=lambda m: m.__name__)
def test_a_sparse_factorisation_in_lanes_that_end_apart(method):
    """KLU's pattern is no operand of the branches that these methods take lane by lane."""
    solver = newton(linear_solver=method(preconditioner=nks.SparseLU()))
    found = jax.jit(
        jax.vmap(lambda y, args: nks.root_find(residual, solver, y, args).stats["residual_norm"])
    )(START, ARGS)
    assert np.all(found < 1e-7)


def test_a_dogleg_within_its_first_radius_is_the_direction():
    """‖d‖² may round below (√‖d‖²)²: at a radius of ‖d‖ the step is d for all that."""
    wide = jax.random.uniform(jax.random.key(1), (400,), minval=0.5, maxval=2.0)
    search = nks.Dogleg()

    @jax.vmap
    def full(dd):
        # The Cauchy point lies further out than d.
        path = search.nothing(jnp.zeros(1), dd, None)._replace(cc=4 * dd, cd=dd, dd=dd)
        step = search.step(path, jnp.sqrt(dd))
        return step.is_full

    assert np.all(full(wide))


@pytest.mark.parametrize(
    ("search", "method"),
    [(nks.Hookstep(), nks.GMRES()), (nks.LevenbergMarquardt(), nks.LSMR(kept=SIZE))],
    ids=["Hookstep", "LevenbergMarquardt"],
)
def test_attempts_in_a_batch_that_hurries_its_solves(search, method):
    """The method that ends early is the one that was chosen."""
    solver = nks.Robust(1e-9, 0.0, linear_solver=method, attempts=(nks.Attempt(search),))
    solution = nks.compacted_root_find(residual, solver, START, ARGS, tags=TAGS)
    assert all(nks.reason_name(int(r)) in SUCCESS for r in solution.stats["reason"]._value)


def test_a_variable_preconditioner_that_comes_with_the_operator():
    """FGMRES keeps Z for it, though it has no preconditioner of its own."""
    lin = nks.linearise(residual, Y0, PARAMETERS)
    inner = nks.InnerKrylov(nks.GMRES(rtol=0.2, max_steps=2))
    inverse = inner.as_operator(inner.init(lin.operator, Y0, PARAMETERS))
    method, options = nks.FGMRES(rtol=1e-10), {"preconditioner": inverse}
    found = lx.linear_solve(lin.operator, lin.value, method, options=options)
    left = tree.norm2(tree.sub(lin.value, lin.operator.mv(found.value)))
    assert left <= 2e-10 * tree.norm2(lin.value)
    # A minimal residual over span(Z) takes no restart here; with V in its place it would.
    assert int(found.stats["num_restarts"]) == 0


# --- derivatives ----------------------------------------------------------------------------


def test_damping_of_the_forward_solves_is_not_inherited(exact):
    close(gradient(newton(linear_solver=nks.LSMR(damp=0.1))), exact)
    damped = nks.SwitchingLinear(nks.LSMR(damp=0.1))
    close(gradient(newton(linear_solver=damped)), exact)
    with pytest.raises(ValueError, match=r"damped `LSMR`.*`nks.LSMR\(\)`"):
        nks.KrylovAdjoint(linear_solver=nks.LSMR(damp=0.1))


def test_promises_reach_the_adjoint(exact):
    """With the linearisation kept, made anew, and made again for second derivatives."""
    solver = newton(linear_solver=nks.CG())
    for reuse in (nks.KeepLinearisation(), nks.Relinearise()):
        close(gradient(solver, adjoint=nks.KrylovAdjoint(reuse=reuse)), exact)

    def value(bend):
        args = {**PARAMETERS, "bend": bend}
        return jnp.sum(nks.root_find(residual, solver, Y0, args, tags=TAGS).value["u"])

    second = jax.jit(jax.grad(jax.grad(value)))(PARAMETERS["bend"])
    assert np.isfinite(second)
    adjoint = nks.KrylovAdjoint(linear_solver=nks.CG())
    with pytest.raises(ValueError, match=r"`CG` solves symmetric systems"):
        gradient(newton(), adjoint=adjoint, tags=frozenset())


# --- what is put around ---------------------------------------------------------------------


def test_wrappers_refuse_what_newton_would():
    with pytest.raises(ValueError, match="`Hookstep` needs"):
        nks.Robust(0.0, 1.0, linear_solver=nks.CG(), attempts=(nks.Attempt(nks.Hookstep()),))
    with pytest.raises(ValueError, match="At most one"):
        nks.Robust(0.0, 1.0, attempts=(nks.Attempt(TRANSIENT), nks.Attempt(TRANSIENT)))
    with pytest.raises(ValueError, match="`Hookstep` needs"):
        nks.Switching(0.0, 1.0, globalisation=nks.Hookstep())
    with pytest.raises(ValueError, match="`Scaled` does not go with `CG`"):
        nks.Scaled(newton(linear_solver=nks.CG()))
    nks.Scaled(newton(linear_solver=nks.CG()), residual=nks.Congruent())


def test_bounds_and_symmetry_inside_of_nonlinear_preconditioners():
    bounded = newton(globalisation=nks.Feasible(lower=-5.0))
    free = nks.NonlinearPreconditioner(nks.Picard(0.0, 0.0))
    inside = nks.NonlinearPreconditioner(bounded)
    for around in (nks.RightPreconditioned, nks.LeftPreconditioned):
        with pytest.raises(ValueError, match=r"`Feasible`.*know no bounds"):
            around(bounded, free)
        around(bounded, inside)
    symmetric = newton(linear_solver=nks.SwitchingLinear(nks.CG()))
    nks.RightPreconditioned(symmetric, free)
    with pytest.raises(ValueError, match="not symmetric"):
        nks.LeftPreconditioned(symmetric, free)


def test_stand_ins_precondition_nothing():
    for method in (nks.GMRES, nks.CG, nks.LSMR):
        for held in (nks.ForwardPreconditioner(), nks.Lagged(nks.ForwardPreconditioner())):
            with pytest.raises(TypeError, match=r"stands for another.*`nks.Jacobi"):
                method(preconditioner=held)


# --- what is symmetric ----------------------------------------------------------------------

_COEFFICIENTS = {"diffusion": 0.05, "shift": 0.9}
ENDS = nks.Multigrid(residual, nks.VertexDirichlet(), order=0, coarsest=6)


@pytest.mark.parametrize(
    ("preconditioner", "keeps"),
    [
        (nks.Nystrom(3), False),
        (nks.QuasiNewton(), False),
        (nks.Deflation(2), True),
        (nks.Chebyshev(2), True),
        (nks.Banded(2, 2), True),
        (nks.Spectral(**_COEFFICIENTS), True),
        (nks.Spectral(nks.NeumannCells(), **_COEFFICIENTS), True),
        (nks.Spectral(nks.NeumannNodes(), **_COEFFICIENTS), False),
        (nks.Spectral(nks.Periodic(), convection=0.3, **_COEFFICIENTS), False),
        (ENDS, True),
        (eqx.tree_at(lambda m: m.cycle, ENDS, nks.VCycle(1, 0)), False),
        (eqx.tree_at(lambda m: m.cycle, ENDS, nks.WCycle()), True),
        (eqx.tree_at(lambda m: m.grid, ENDS, nks.VertexNeumann()), False),
        (nks.Multiplicative([nks.Jacobi(probes=1), nks.Spectral(**_COEFFICIENTS)]), False),
        (
            nks.Multiplicative(
                [nks.Jacobi(probes=1), nks.Spectral(**_COEFFICIENTS), nks.Jacobi(probes=1)]
            ),
            True,
        ),
        (nks.TriangularFieldSplit({"u": nks.Identity(), "v": nks.Identity()}), False),
        (nks.FieldSplit({"u": nks.Identity(), "v": nks.Banded(1, 1)}), True),
        (nks.FieldSplit({"u": nks.Nystrom(2), "v": nks.Banded(1, 1)}), False),
        (nks.Lagged(nks.Nystrom(3)), False),
        (nks.NegativeIdentity(), True),
    ],
    ids=lambda p: type(p).__name__ if isinstance(p, nks.AbstractPreconditioner) else str(p),
)
def test_what_is_said_of_the_symmetry_of_an_inverse_is_so(preconditioner, keeps):
    """A False is shown by an example; `QuasiNewton` becomes so by its first update."""
    assert preconditioner.keeps_symmetry == keeps
    operator = nks.linearise(residual, Y0, PARAMETERS, tags=TAGS).operator
    state = preconditioner.init(operator, Y0, PARAMETERS)
    if isinstance(preconditioner, nks.QuasiNewton):
        near = tree.scale(0.5, Y0)
        operator = nks.linearise(residual, near, PARAMETERS).operator
        state = preconditioner.update(state, operator, near, PARAMETERS)
    matrix = np.asarray(preconditioner.as_operator(state).as_matrix())
    apart = np.max(np.abs(matrix - matrix.T)) / np.max(np.abs(matrix))
    assert apart < 1e-12 if keeps else apart > 1e-5
    for method in (nks.CG, nks.MINRES):
        if keeps:
            method(preconditioner=preconditioner)
        else:
            with pytest.raises(ValueError, match=rf"`{method.__name__}` needs a symmetric M⁻¹"):
                method(preconditioner=preconditioner)


def test_a_promise_is_asked_for_wherever_a_symmetric_method_is_used():
    operator = nks.linearise(residual, Y0, PARAMETERS).operator
    for method in (nks.CG(), nks.MINRES(), nks.SwitchingLinear(nks.CG())):
        with pytest.raises(ValueError, match="nothing promises"):
            lx.linear_solve(operator, Y0, method)
        with pytest.raises(ValueError, match="nothing promises"):
            solve(newton(linear_solver=method), tags=frozenset())
    inner = nks.FGMRES(preconditioner=nks.InnerKrylov(nks.CG(max_steps=3)))
    with pytest.raises(ValueError, match="nothing promises"):
        solve(newton(linear_solver=inner), tags=frozenset())
    # Of complex systems there is no such tag.
    hermitian = jnp.asarray([[2.0, 1j], [-1j, 2.0]])
    complex_operator = lx.MatrixLinearOperator(hermitian)
    b = jnp.asarray([1.0 + 1j, 2.0])
    found = lx.linear_solve(complex_operator, b, nks.CG(1e-12)).value
    np.testing.assert_allclose(found, np.linalg.solve(hermitian, b), rtol=1e-10)


def test_differences_and_transposes_inside_of_preconditioners():
    inner = nks.FGMRES(preconditioner=nks.Lagged(nks.InnerKrylov(nks.LSMR(max_steps=3))))
    solver = nks.NewtonKrylov(1e-6, 0.0, linear_solver=inner, policy=nks.FiniteDifference())
    assert inner.needs_transpose
    with pytest.raises(ValueError, match=r"`FGMRES` multiplies by Jᵀ.*`nks.GMRES\(\)`"):
        solve(solver, tags=frozenset())
    assert reason(solve(solver)) in SUCCESS

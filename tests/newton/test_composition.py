"""Everything composes: every combination is made, or refused as docs/theory/composition.md says; a
set in which everything meets everything is run, batched and with gradients."""

import functools as ft
import inspect
import re

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from tests.newton import composing
from tests.newton.composing import (
    ARGS,
    ARITHMETICS,
    FACTORS,
    FORCINGS,
    GLOBALISATIONS,
    LANES,
    LINEAR_SOLVERS,
    NOT_AS_IF_ALONE,
    PRECONDITIONERS,
    START,
    WITHOUT_FIELD,
    Combination,
    arithmetic,
    functional,
    lane,
    problem,
    residual,
    solver,
)
from tests.newton.covering import allowed, covering, meetings, refusals
from tests.newton.solving import SUCCESS

# --- the lists are complete -----------------------------------------------------------------

#: Public classes that are in no list, and why.
_NOT_PARTS = {
    "ForwardPreconditioner": "stands for another solver's, in adjoints only; refused elsewhere",
}
_LISTS = {
    nks.AbstractGlobalisation: (GLOBALISATIONS, lambda part: part),
    nks.AbstractForcing: (FORCINGS, lambda part: part),
    nks.AbstractKrylovSolver: (LINEAR_SOLVERS, lambda part: part),
    nks.AbstractPreconditioner: (PRECONDITIONERS, lambda part: part),
    nks.AbstractPolicy: (ARITHMETICS, lambda part: part.policy),
    nks.AbstractBending: (GLOBALISATIONS, lambda part: getattr(part, "bending", None)),
    nks.AbstractStepRule: (GLOBALISATIONS, lambda part: getattr(part, "rule", None)),
}


@pytest.mark.parametrize("base", _LISTS, ids=lambda base: base.__name__)
def test_every_public_class_is_in_the_lists(base):
    parts, of = _LISTS[base]
    public = {
        name
        for name, cls in vars(nks).items()
        if isinstance(cls, type) and issubclass(cls, base) and not name.startswith("Abstract")
    }
    listed = {type(of(part.make())).__name__ for part in parts.values()} - {"NoneType"}
    assert listed <= public
    assert listed == public - set(_NOT_PARTS)
    for name, part in parts.items():
        if base in (nks.AbstractGlobalisation, nks.AbstractKrylovSolver):
            assert re.match(r"\w+", name)[0] == type(part.make()).__name__


# --- the table of the documentation ---------------------------------------------------------


def _rows(root, *header):
    """The rows of the table whose header begins with these cells."""
    lines = (root / "docs" / "theory" / "composition.md").read_text(encoding="utf-8").splitlines()
    tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    first = next(k for k, cells in enumerate(tables) if tuple(cells[: len(header)]) == header)
    rows = []
    for line, cells in zip(lines[first + 2 :], tables[first + 2 :], strict=True):
        if not line.startswith("|"):
            return rows
        rows.append(cells)
    return rows


def _class(name):
    return name.partition("(")[0]


def _names(cell):
    return re.findall(r"`([^`]+)`", cell)


def _means(cell, name):
    """Whether a cell of the table means that part."""
    hit = any(name == told or _class(name) == told for told in _names(cell))
    return not cell or hit != cell.startswith("all but")


def _says(message, row, names):
    """Whether it names the parts that do not go together, and a public class to take instead."""
    told = [_class(name) for cell, name in zip(row, names, strict=False) if cell]
    told = ["GMRES" if name == "SwitchingLinear" else name for name in told]  # what that wraps
    advised = re.findall(r"`(?:linear_solver=)?nks\.(\w+)", message)
    assert advised and all(hasattr(nks, name) for name in advised), message
    return all(re.search(rf"\b{name}\b", message) for name in told)


def test_every_combination_is_made_or_refused_as_documented(root):
    table = _rows(root, "globalisation", "linear solver", "preconditioner")
    used = set()
    for names, error in refusals().items():
        hits = [k for k, row in enumerate(table) if all(map(_means, row, names))]
        assert bool(hits) == (error is not None), (names, error)
        if error is None:
            continue
        used |= set(hits)
        assert any(_says(str(error), table[k], names) for k in hits), (names, error)
    assert used == set(range(len(table)))
    for method in WITHOUT_FIELD:
        assert "preconditioner" not in inspect.signature(getattr(nks, method)).parameters


def test_no_forcing_term_and_no_policy_is_in_the_way():
    for (search, method, preconditioner), error in refusals().items():
        parts = [(forcing, "Linearise") for forcing in FORCINGS]
        if preconditioner in ("Identity", "Auto"):
            parts += [("Tightened", how) for how in ARITHMETICS]
        for forcing, how in parts:
            combination = Combination(search, forcing, method, preconditioner, how)
            if error is None:
                solver(combination)
            else:
                with pytest.raises(type(error)):
                    solver(combination)


_AROUND = {
    "Feasible(bending=ProjectedDescent())": lambda search: nks.Feasible(
        search, bending=nks.ProjectedDescent()
    ),
    "Deflated": lambda search: nks.Deflated(
        nks.NewtonKrylov(
            1e-8,
            0.0,
            globalisation=search,
            linear_solver=(
                nks.LSMR(kept=3) if isinstance(search, nks.LevenbergMarquardt) else nks.GMRES()
            ),
        ),
        [lane(START, 0)],
    ),
}


def test_what_is_put_around_others_is_documented(root):
    table = {_names(row[0])[0]: row for row in _rows(root, "around", "not")}
    assert table.keys() == _AROUND.keys()
    for around, make in _AROUND.items():
        for name, part in GLOBALISATIONS.items():
            if _means(table[around][1], name):
                with pytest.raises(ValueError, match=_class(name)) as caught:
                    make(part.make())
                assert re.search(r"`nks\.\w+", str(caught.value))
            else:
                make(part.make())


def _begun(solver, tags=frozenset()):
    """Begins a solve, abstractly: what is refused is refused here."""
    y, args = lane(START, 0), lane(ARGS, 0)
    fn = lambda y, args: (residual(y, args), None)
    structure = jax.eval_shape(lambda: y)
    jax.eval_shape(lambda: solver.init(fn, y, args, {}, structure, None, tags).norm)


def test_what_is_refused_where_a_solve_begins_is_documented(root):
    symmetric, transposed = _rows(root, "part", "under", "unless promised")
    for name, part in GLOBALISATIONS.items():
        search = part.make()
        method = nks.GMRES()
        if isinstance(search, nks.LevenbergMarquardt):
            method = nks.LSMR(kept=3)
        made = nks.NewtonKrylov(
            1e-8, 0.0, globalisation=search, linear_solver=method, policy=nks.FiniteDifference()
        )
        told = _names(transposed[0])
        bending = getattr(search, "bending", None)
        inner = getattr(search, "globalisation", search)
        if (
            {_class(name), type(inner).__name__} & set(told)
            or type(method).__name__ in told
            or isinstance(bending, nks.ProjectedDescent)
        ):
            with pytest.raises(ValueError, match=r"FiniteDifference.*`nks\.\w+"):
                _begun(made)
        else:
            _begun(made)
        _begun(made, composing.TAGS)  # a symmetric J is its own transpose
    for name, part in LINEAR_SOLVERS.items():
        keywords = {"preconditioner": nks.Auto(composing.pattern())} if name == "AutoLinear" else {}
        for cell, policy in ((symmetric, nks.Linearise()), (transposed, nks.FiniteDifference())):
            made = nks.NewtonKrylov(1e-8, 0.0, linear_solver=part.make(**keywords), policy=policy)
            if _means(symmetric[0], name) or (cell is transposed and _means(cell[0], name)):
                with pytest.raises(ValueError, match=rf"`{_class(name)}`.*`nks\.\w+"):
                    _begun(made)
            else:
                _begun(made)


# --- the covering set is run ----------------------------------------------------------------

SIZE_OF_COVER, SIZE_OF_PAIRS = 126, 436


def test_the_set_covers_every_meeting():
    assert len(covering()) == SIZE_OF_COVER <= 150
    assert len(covering(by_kind=False)) == SIZE_OF_PAIRS
    for by_kind in (True, False):
        chosen = [
            [list(factor).index(name) for factor, name in zip(FACTORS, names, strict=True)]
            for names in covering(by_kind=by_kind)
        ]
        rows = np.concatenate([allowed(), np.array(chosen, np.int16)])
        for column in meetings(rows, by_kind=by_kind):
            assert set(column[: len(allowed())]) == set(column[len(allowed()) :])


@jax.jit
@jax.vmap
def _exact(args, y):
    """‖F‖ at y, and the gradient of the functional by the dense implicit function theorem."""
    flat, unflatten = jax.flatten_util.ravel_pytree(y)
    fn = lambda x, args: jax.flatten_util.ravel_pytree(residual(unflatten(x), args))[0]
    value, pull = jax.vjp(lambda args: fn(flat, args), args)
    slope = jax.flatten_util.ravel_pytree(jax.grad(functional)(y))[0]
    (gradient,) = pull(-jnp.linalg.solve(jax.jacfwd(fn)(flat, args).T, slope))
    return jnp.linalg.norm(value), gradient


def _solve(combination, args, y0):
    fn, tags = problem(combination)
    how = solver(combination)
    solution = nks.root_find(fn, how, y0, args, max_steps=60, throw=False, tags=tags)
    stats = {k: v for k, v in solution.stats.items() if k.startswith("num_") or "norm" in k}
    ended = solution.result._value, solution.stats["reason"]._value
    return functional(solution.value), (solution.value, ended, stats)


def _with_gradient(combination, args, y0):
    """(value of the functional, (root, how it ended, stats)), its gradient or `None`."""
    solve = ft.partial(_solve, combination)
    if arithmetic(combination).gradient is None:
        return solve(args, y0), None
    return jax.value_and_grad(solve, has_aux=True)(args, y0)


def _data(combination):
    dtype = arithmetic(combination).dtype
    return jtu.tree_map(lambda x: x.astype(dtype), (ARGS, START))


def _check(combination, *, batched=True):
    """Alone is among lanes that are alike, in the same program; or not `batched` at all."""
    how = arithmetic(combination)
    args, start = _data(combination)
    run = jax.jit(jax.vmap(ft.partial(_with_gradient, combination)))
    (_, (y, ended, stats)), gradient = run(args, start)

    # Success, and what is told of it is so.
    assert all(nks.reason_name(int(reason)) in SUCCESS for reason in ended[1])
    assert all(int(result) == optx.RESULTS.successful._value for result in ended[0])
    wide = lambda tree: jtu.tree_map(lambda x: x.astype(np.float64), tree)
    norm, exact = _exact(wide(args), wide(y))
    norm, first = np.asarray(norm), np.asarray(_exact(wide(args), wide(start))[0])
    slack = 50 * np.finfo(how.dtype).eps * first
    told = {k: np.asarray(v, np.float64) for k, v in stats.items()}
    np.testing.assert_allclose(told["initial_residual_norm"], first, rtol=1e-6)
    assert np.all(abs(told["residual_norm"] - norm) <= slack + 1e-9 * norm)
    assert np.all(norm <= how.rtol * first + slack)
    trials = told["num_steps"] + told["num_rejected_steps"]
    np.testing.assert_array_equal(told["num_linearisations"], 1 + trials)

    if gradient is not None:
        for name, expected in exact.items():
            close = how.gradient * float(np.max(np.abs(expected)))
            np.testing.assert_allclose(gradient[name], expected, rtol=0, atol=close, err_msg=name)

    like = lambda i: jtu.tree_map(lambda x: jnp.stack([x[i]] * LANES), (args, start))
    single = jax.jit(ft.partial(_with_gradient, combination))
    for i in range(LANES):
        own = lane(run(*like(i)), 0) if batched else single(*lane((args, start), i))
        (_, (y_alone, ended_alone, own_stats)), _ = own
        for a, b in zip(jtu.tree_leaves(lane(y, i)), jtu.tree_leaves(y_alone), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=50 * how.rtol)
        assert [int(x[i]) for x in ended] == [int(x) for x in ended_alone]
        if combination.preconditioner not in NOT_AS_IF_ALONE:
            for name, counter in own_stats.items():
                if name.startswith("num_"):
                    assert int(stats[name][i]) == int(counter), (i, name)


def _named(combination, **keywords):
    try:
        _check(combination, **keywords)
    except Exception as error:
        error.add_note(f"{combination}")
        raise


@pytest.mark.parametrize("number", range(SIZE_OF_COVER))
def test_a_combination(number):
    _named(covering()[number], batched=number % 12 > 0)


def test_lanes_are_unlike():
    """They stop at different steps, and one of them is refused a step on the way."""
    default = Combination("Backtracking", "Tightened", "GMRES", "Identity", "Linearise")
    (_, (_, _, stats)), _ = jax.jit(jax.vmap(ft.partial(_with_gradient, default)))(ARGS, START)
    assert len(set(np.asarray(stats["num_steps"]).tolist())) == LANES
    assert np.asarray(stats["num_rejected_steps"]).tolist() == [0, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(SIZE_OF_PAIRS))
def test_a_combination_of_all_pairs(number):
    _named(covering(by_kind=False)[number])

"""docs/storage.md against the code: vectors that a solve keeps, and products an iteration."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from tests.helpers.jaxprs import _subjaxprs

N = 211  # prime: nothing else has this size
M, K, S = 12, 4, 3
SOLVERS = {
    "GMRES": lambda **kw: nks.GMRES(restart=M, **kw),
    "FGMRES": lambda **kw: nks.FGMRES(restart=M, **kw),
    "GCRODR": lambda **kw: nks.GCRODR(restart=M, recycle=K, **kw),
    "CG": nks.CG,
    "MINRES": nks.MINRES,
    "BiCGStab": nks.BiCGStab,
    "IDR": lambda **kw: nks.IDR(s=S, **kw),
    "TFQMR": nks.TFQMR,
    "LSMR": nks.LSMR,
    "Richardson": nks.Richardson,
}


def _documented(root):
    """{method: cells} of the table whose header starts with "method"."""
    rows, inside = {}, False
    for line in (root / "docs" / "storage.md").read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        if cells[0] == "method":
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and cells[0] in SOLVERS:
            rows[cells[0]] = cells[1:]
    return rows


def _value(formula):
    return eval(re.sub(r"(?<=\d) (?=[mks])", "*", formula), {"m": M, "k": K, "s": S})


def _singles(variables):
    return sum(v.aval.size == N for v in variables)


def _rows(variables):
    """Vectors in buffers of several: a basis is updated in place from loop to loop."""
    return sum(v.aval.size // N for v in variables if v.aval.size > N and v.aval.size % N == 0)


def _kept(jaxpr, given=frozenset()):
    """(vectors, rows of bases) that the loops of a solve hold: what each loop carries, and what it
    closes over, unless an outer loop holds it too (`given`)."""
    singles = rows = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            count = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
            closed = {id(v): v for v in eqn.invars[:count] if id(v) not in given}.values()
            carried = eqn.invars[count:]
            body = eqn.params["body_jaxpr"].jaxpr
            inner, inner_rows = _kept(body, frozenset(map(id, body.invars)))
            here = _singles(closed) + _singles(carried) + inner
            here_rows = _rows(closed) + max(_rows(carried), inner_rows)
        else:
            subs = [sub for param in eqn.params.values() for sub in _subjaxprs(param)]
            found = [_kept(sub, frozenset(map(id, sub.invars))) for sub in subs]
            here = max((vectors for vectors, _ in found), default=0)
            here_rows = max((buffers for _, buffers in found), default=0)
        singles, rows = max(singles, here), max(rows, here_rows)
    return singles, rows


def _solve(name, preconditioned, max_steps):
    """A solve that runs to `max_steps`, as Newton makes it, and its arguments."""
    halved = nks.UserPreconditioner(lambda *_: lambda v: 0.5 * v)
    keywords = {"preconditioner": halved} if preconditioned else {}
    solver = SOLVERS[name](max_steps=max_steps, **keywords)
    # An operator that keeps no array of its own.
    operator = nks.linearise(lambda y, _: 3.0 * y - jnp.roll(y, 1), jnp.ones(N)).operator

    def solve(b, workspace):
        state = solver.prepare(operator, None, None)
        out = solver.run(state, b, tolerance=1e-30, real=True, workspace=workspace)
        return out._replace(workspace=None)

    b = jnp.asarray(np.random.default_rng(0).standard_normal(N))
    return solve, (b, solver.workspace(b, real=True))


def test_every_krylov_method_has_its_row(root):
    assert set(_documented(root)) == set(SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
def test_vectors_kept(root, name):
    for column, preconditioned in enumerate((False, True)):
        solve, args = _solve(name, preconditioned, 40)
        closed = jax.make_jaxpr(solve)(*args)
        vectors, rows = _kept(closed.jaxpr)
        assert vectors + rows == _value(_documented(root)[name][column])


@pytest.mark.parametrize("name", SOLVERS)
def test_products_an_iteration(root, name):
    """Counted by the solver, whose counters other tests hold to the products that are run."""
    few, many = 3, 3 + 4  # within one cycle of those that restart
    outs = []
    for max_steps in (few, many):
        solve, args = _solve(name, True, max_steps)
        outs.append(jax.jit(solve)(*args))
    steps = int(outs[1].num_steps) - int(outs[0].num_steps)
    assert steps == many - few
    counters = ("num_matvecs", "num_transposed_matvecs", "num_preconditioner_applications")
    measured = [(int(getattr(outs[1], k)) - int(getattr(outs[0], k))) / steps for k in counters]
    assert measured == [float(cell) for cell in _documented(root)[name][2:5]]

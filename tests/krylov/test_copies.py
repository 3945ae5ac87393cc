"""The basis is written in place: XLA makes no copy of it inside the loops of a solve."""

import re

import jax
import jax.numpy as jnp
import lineax as lx
import pytest

import nksolve as nks
from tests.helpers import AS_SHIPPED

N = 16384  # large enough for several blocks


def _copies_in_loops(text: str) -> list[str]:
    """Copies of arrays `[rows, N]` in computations other than the entry."""
    found, entry = [], False
    for line in text.splitlines():
        if line.startswith("ENTRY"):
            entry = True
        elif line.startswith("}"):
            entry = False
        if not entry and re.search(rf"= \w+\[\d+,{N}\]\S* copy\(", line):
            found.append(line.strip())
    return found


def test_the_search_finds_a_copy():
    line = f"  %copy.1 = f64[8,{N}]{{1,0}} copy(%x)"
    assert _copies_in_loops("%body {\n" + line + "\n}\n") == [line.strip()]
    assert _copies_in_loops("ENTRY %main {\n" + line + "\n}\n") == []


@pytest.mark.parametrize("solver", [nks.GMRES(restart=12), nks.FGMRES(restart=12)])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_no_copy_of_the_basis(solver, preconditioned):
    def solve(d, b):
        operator = lx.FunctionLinearOperator(lambda v: d * v + jnp.roll(v, 1), b)
        options = {}
        if preconditioned:
            options["preconditioner"] = lx.FunctionLinearOperator(lambda v: v / d, b)
        return lx.linear_solve(operator, b, solver, options=options, throw=False).value

    b = jnp.ones(N)
    text = jax.jit(solve).lower(2.0 + b, b).compile(AS_SHIPPED).as_text()
    assert "while(" in text
    assert _copies_in_loops(text) == []

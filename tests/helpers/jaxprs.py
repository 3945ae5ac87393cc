"""Read a jaxpr, the sub-jaxprs of its control flow and custom rules included.

What this cannot see: Lineax and Equinox keep some programs (the inside of `lx.linear_solve` with a
`FunctionLinearOperator`, for one) behind a primitive whose body appears only when it is lowered.
`tests.helpers.hlo.square_tensors` reads the lowered text and sees those too.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


class Square(NamedTuple):
    """A value with two or more axes of size n: the equation that makes it, and its aval.

    `eqn` is None for a constant of the jaxpr or one of its arguments.
    """

    eqn: JaxprEqn | None
    aval: Any


def _subjaxprs(param: Any) -> Iterator[Jaxpr]:
    if isinstance(param, ClosedJaxpr):
        yield param.jaxpr
    elif isinstance(param, Jaxpr):
        yield param
    elif isinstance(param, list | tuple):
        for item in param:
            yield from _subjaxprs(item)
    elif isinstance(param, dict):
        for item in param.values():
            yield from _subjaxprs(item)


def jaxprs(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[Jaxpr]:
    """This jaxpr and every one inside it, outermost first."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    yield jaxpr
    for eqn in jaxpr.eqns:
        for param in eqn.params.values():
            for inner in _subjaxprs(param):
                yield from jaxprs(inner)


def walk(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[JaxprEqn]:
    """Every equation, those inside jit, while, scan, cond, custom rules and remat included."""
    for inner in jaxprs(jaxpr):
        yield from inner.eqns


def _is_square(aval: Any, n: int) -> bool:
    return sum(size == n for size in getattr(aval, "shape", ())) >= 2


def square_values(jaxpr: Jaxpr | ClosedJaxpr, n: int) -> list[Square]:
    """The values with two or more axes of size n. Choose n prime, so that only n×n has them."""
    found = []
    for inner in jaxprs(jaxpr):
        for var in [*inner.constvars, *inner.invars]:
            if _is_square(var.aval, n):
                found.append(Square(None, var.aval))
        for eqn in inner.eqns:
            for var in eqn.outvars:
                if _is_square(var.aval, n):
                    found.append(Square(eqn, var.aval))
    return found


def count_primitive(jaxpr: Jaxpr | ClosedJaxpr, name: str) -> int:
    """How many equations bind the primitive of this name."""
    return sum(eqn.primitive.name == name for eqn in walk(jaxpr))

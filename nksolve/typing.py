"""The words that the annotations of nksolve are written in."""

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import Array, ArrayLike, Bool, Float, Inexact, Int, PyTree, Shaped

Scalar: TypeAlias = Float[Array, ""]
ScalarLike: TypeAlias = Float[ArrayLike, ""]
NumberLike: TypeAlias = Inexact[ArrayLike, ""]
Flag: TypeAlias = Bool[Array, ""]
Count: TypeAlias = Int[Array, ""]
#: A vector of the solver: a PyTree of inexact arrays (`None` where a static leaf was taken out).
Vector: TypeAlias = PyTree[Inexact[Array, "..."]]
#: The unknown of a residual: a PyTree with arrays and, possibly, other leaves.
Y: TypeAlias = PyTree[Any]
Args: TypeAlias = PyTree[Any]
Aux: TypeAlias = PyTree[Any]
#: A residual `fn(y, args)`, with `has_aux=True` `fn(y, args) -> (residual, aux)`.
Fn: TypeAlias = Callable[[Y, Args], Any]
Norm: TypeAlias = Callable[[Any], Shaped[Array, ""]]
#: `v -> A v`.
LinearFn: TypeAlias = Callable[[Vector], Vector]

"""Mixed complementarity problems as residuals, for semismooth Newton methods."""

import abc
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .. import tree
from ..newton.globalisation.box import box, check_order
from ..typing import Args, Fn, ScalarLike, Y


class AbstractComplementarityFunction(eqx.Module):
    """Φ(y, f; l, u), entry by entry, which vanishes where y and f are complementary on [l, u].

    Laws: Φ = 0 where l ≤ y ≤ u and f ≥ 0 at y = l, f ≤ 0 at y = u, f = 0 in between, and only
    there; without bounds Φ = f. Its derivative as JAX takes it is, also at kinks, a limit of
    derivatives at points near by where Φ is differentiable.
    """

    @abc.abstractmethod
    def __call__(
        self,
        y: Float[Array, "..."],
        f: Float[Array, "..."],
        lower: Float[Array, "..."],
        upper: Float[Array, "..."],
    ) -> Float[Array, "..."]:
        """Φ; `lower` and `upper` are of y's shape, or scalars."""


class Mid(AbstractComplementarityFunction):
    """Φ = (y − mid(l, u, y − c f))/c: y − l over c, y − u over c, or f. The default.

    Newton's method on it is the primal–dual active set method: rows of J where y − c f ≤ l or ≥ u
    become rows of the identity over c, the others stay. Where the problem is linear it ends with
    the active set, exactly, after finitely many steps. On points inside the bounds, where
    `nks.Feasible` keeps them, Φ is f where that pushes inwards, and what PETSc's `vinewtonrsls`
    measures at a point on its bounds.

    A tie, y − c f = l or u, is taken as active. A value of f that is infinite is never hidden.

    **Arguments:**

    - `scale`: c > 0, which gives f the units of y; the inverse of a typical entry of the diagonal
      of J is a good one.

    Source: Hintermüller, Ito & Kunisch, SIAM J. Optim. 13(3), 2002; Benson & Munson, Optim. Methods
    Softw. 21(1), 2006.
    """

    scale: ScalarLike = 1.0

    def __check_init__(self):
        _check_scale(self.scale)

    def __call__(
        self,
        y: Float[Array, "..."],
        f: Float[Array, "..."],
        lower: Float[Array, "..."],
        upper: Float[Array, "..."],
    ) -> Float[Array, "..."]:
        c = _factor(self.scale, y)
        # Not `jnp.clip`: its derivative at a tie is ½ of one and ½ of the other.
        moved = y - c * f
        at_lower = (moved <= lower) & (f < jnp.inf)
        at_upper = (moved >= upper) & (f > -jnp.inf)
        return jnp.where(at_lower, (y - lower) / c, jnp.where(at_upper, (y - upper) / c, f))


class FischerBurmeister(AbstractComplementarityFunction):
    """Φ = φ(y − l, −φ(u − y, −c f))/c with φ(a, b) = a + b − √(a² + b²).

    Smooth but where both arguments vanish, and for a single bound ‖Φ‖² is smooth everywhere: a line
    search on it cannot be caught at a kink. Φ is nonlinear even where f is linear: Newton's method
    takes more steps than on `nks.Mid`.
    At a = b = 0 the derivative is (1 − 1/√2, 1 − 1/√2).

    **Arguments:**

    - `scale`: c > 0, as of `nks.Mid`.

    Source: Fischer, Optimization 24, 1992; for two bounds Billups, Algorithms for Complementarity
    Problems and Generalized Equations, thesis, Wisconsin 1995.
    """

    scale: ScalarLike = 1.0

    def __check_init__(self):
        _check_scale(self.scale)

    def __call__(
        self,
        y: Float[Array, "..."],
        f: Float[Array, "..."],
        lower: Float[Array, "..."],
        upper: Float[Array, "..."],
    ) -> Float[Array, "..."]:
        c = _factor(self.scale, y)
        # φ(∞, b) = b: without a bound its function is not there.
        above = _where_finite(upper, lambda high, g: -_fischer_burmeister(high - y, -g), c * f)
        both = _where_finite(lower, lambda low, g: _fischer_burmeister(y - low, g), above)
        return both / c


def _fischer_burmeister(a: Array, b: Array) -> Array:
    """a + b − √(a² + b²), free of cancellation, overflow and a NaN in its derivatives at 0."""
    largest = lax.stop_gradient(jnp.maximum(jnp.abs(a), jnp.abs(b)))
    zero = largest == 0
    # φ is homogeneous: in units of the larger argument, whose derivative cancels out.
    unit = jnp.where(zero | ~jnp.isfinite(largest), jnp.ones_like(largest), largest)
    a, b = a / unit, b / unit
    root = jnp.sqrt(jnp.where(zero, jnp.ones_like(a), a * a + b * b))
    root = jnp.where(zero, jnp.sqrt(jnp.full_like(a, 0.5)) * (a + b), root)
    total = a + b
    positive = total > 0
    sum_of_all = jnp.where(positive, total + root, jnp.ones_like(total))
    return unit * jnp.where(positive, 2 * a * b / sum_of_all, total - root)


def _where_finite(bound: Array, function: Any, f: Array) -> Array:
    """function(bound, f), or f where there is no bound."""
    finite = jnp.isfinite(bound)
    value = function(jnp.where(finite, bound, jnp.zeros_like(bound)), f)
    return jnp.where(finite, value, f)


def _factor(scale: ScalarLike, y: Array) -> Array:
    # Where Φ vanishes does not depend on c.
    return lax.stop_gradient(jnp.asarray(scale).astype(y.dtype))


def _check_scale(scale: Any) -> None:
    if isinstance(scale, int | float) and not scale > 0:
        raise ValueError(f"`scale` must be positive, but it is {scale}.")


class Complementarity(eqx.Module):
    """The residual that `nks.complementarity` makes; called like `fn`."""

    fn: Fn
    lower: PyTree
    upper: PyTree
    function: AbstractComplementarityFunction
    has_aux: bool = eqx.field(static=True)

    def __call__(self, y: Y, args: Args) -> Any:
        """Φ(y, fn(y, args)), with aux if there is."""
        out = self.fn(y, args)
        f, aux = out if self.has_aux else (out, None)
        variables = eqx.filter(y, eqx.is_inexact_array)
        bounds = box(self.lower, self.upper, variables)
        if tree.structure(f) != tree.structure(variables):
            raise ValueError(
                "In a complementarity problem there is one equation for each unknown: `fn` must "
                "return the PyTree of y, of its shapes and dtypes."
            )
        value = jtu.tree_map(self.function, variables, f, *bounds)
        return (value, aux) if self.has_aux else value


_MID = Mid()


def complementarity(
    fn: Fn,
    lower: PyTree,
    upper: PyTree,
    function: AbstractComplementarityFunction = _MID,
    *,
    has_aux: bool = False,
) -> Complementarity:
    """The residual of a mixed complementarity problem: its root solves a variational inequality.

    Wanted is y with lower ≤ y ≤ upper such that for each entry f_i(y, args)

    - = 0 where lower_i < y_i < upper_i,
    - ≥ 0 where y_i = lower_i, ≤ 0 where y_i = upper_i.

    What is returned is a residual Φ(y, args) for `nks.root_find` and any of its solvers. A Newton
    step on it linearises `fn` once; where the bounds are active, rows of J are replaced, as a view.
    Φ sees points outside of the bounds unless the solver keeps y inside:
    `globalisation=nks.Feasible(lower=lower, upper=upper)`.

    Derivatives of the solution with respect to args, and to the bounds, are right where every entry
    on a bound has f_i ≠ 0 (strict complementarity). Elsewhere the solution has directional
    derivatives only, and what comes out belongs to one side.

    **Arguments:**

    - `fn`: `fn(y, args) -> f` with the structure, shapes and dtypes of y; with `has_aux` a pair
      `(f, aux)`.
    - `lower`, `upper`: prefixes of y: numbers, arrays, or `None` for no bound. Arrays may
      change without compiling again, and be differentiated.
    - `function`: `nks.Mid(scale)` or `nks.FischerBurmeister(scale)`.

    **Raises:** `ValueError` for bounds that cross (where their values are known) or do not fit y,
    `TypeError` for complex y.

    Storage: three vectors of flags or numbers beside the linearisation of `fn`. Work: none in
    products or evaluations.

    Source: Ferris & Pang, SIAM Review 39(4), 1997; Benson & Munson, Optim. Methods Softw. 21(1),
    2006.
    """
    check_order(lower, upper)
    return Complementarity(fn, lower, upper, function, has_aux)

"""A residual, and what a solver holds of it, in units of typical sizes."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np

from ...krylov.base import AbstractKrylovSolver
from ...linearise.linearisation import AbstractLinearisable, Linearisation, linearise
from ...linearise.operator import AbstractLinearMap, JacobianOperator, low_of
from ...linearise.policies import AbstractPolicy, _DifferenceMap
from ...linearise.views import divided, times
from ...typing import Args, Fn, Vector, Y
from ..globalisation.box import box
from ..globalisation.feasible import Feasible
from ..globalisation.pseudo_transient import PseudoTransient
from ..recording import Recorded


class Scaling(eqx.Module):
    """Typical sizes S_u of the unknowns and S_F of the residual: u = S_u û and F = S_F F̂.

    **Attributes:** (positive, of the structure and shapes of u and F)

    - `unknowns`: the diagonal of S_u, which is D_u⁻¹; powers of two, so that u = S_u û and
      û = S_u⁻¹ u are exact.
    - `residual`: the diagonal of S_F, which is D_F⁻¹.
    """

    unknowns: Vector
    residual: Vector

    def scaled(self, y: Y) -> Y:
        """û, with the leaves of y that are no unknowns."""
        variables, static = eqx.partition(y, eqx.is_inexact_array)
        return eqx.combine(divided(variables, self.unknowns), static)

    def plain(self, y: Y) -> Y:
        """u from û, in the same way."""
        variables, static = eqx.partition(y, eqx.is_inexact_array)
        return eqx.combine(times(variables, self.unknowns), static)

    def checked(self) -> "Scaling":
        """Itself, or where a size of the unknowns is NaN, one in which every residual is NaN: the
        solve then ends with `nonfinite` at the point where it began."""
        good = jtu.tree_map(lambda x: ~jnp.isnan(x), self.unknowns)
        fine = jnp.stack([jnp.all(x) for x in jtu.tree_leaves(good)] or [jnp.array(True)]).all()
        unknowns = jtu.tree_map(lambda x, ok: jnp.where(ok, x, 1), self.unknowns, good)
        return Scaling(unknowns, jtu.tree_map(lambda x: jnp.where(fine, x, jnp.nan), self.residual))

    @property
    def of_inverses(self) -> "Scaling":
        """For J⁻¹, which maps residuals to unknowns."""
        return Scaling(self.residual, self.unknowns)

    @property
    def undoing(self) -> "Scaling":
        """That which leads back: for Ĵ = S_F⁻¹ J S_u in place of J."""
        return jtu.tree_map(lambda x: 1 / x, self)


class UnitsMap(AbstractLinearMap):
    """v → S_F⁻¹ A S_u v."""

    operator: lx.AbstractLinearOperator
    scaling: Scaling

    def mv(self, vector: Vector) -> Vector:
        image = self.operator.mv(times(vector, self.scaling.unknowns))
        return divided(image, self.scaling.residual)

    def transpose_mv(self, vector: Vector) -> Vector:
        image = self.operator.transpose().mv(divided(vector, self.scaling.residual))
        return times(image, self.scaling.unknowns)

    @property
    def low(self) -> np.dtype | None:
        return low_of(self.operator)


def viewed(
    operator: lx.AbstractLinearOperator, scaling: Scaling, tags: frozenset[object] = frozenset()
) -> JacobianOperator:
    """S_F⁻¹ A S_u, on A's linearisation."""
    structures = operator.in_structure(), operator.out_structure()
    return JacobianOperator(UnitsMap(operator, scaling), *structures, tags)


class _AtScaled(eqx.Module):
    """û → fn(S_u û)."""

    fn: Callable
    unknowns: Vector

    def __call__(self, scaled: Vector) -> Any:
        return self.fn(times(scaled, self.unknowns))


class _Differences(AbstractLinearMap):
    """v → J v by differences in û, whose increment is made for v̂ = S_u⁻¹ v."""

    linear_map: _DifferenceMap
    unknowns: Vector

    def mv(self, vector: Vector) -> Vector:
        return self.linear_map.mv(divided(vector, self.unknowns))

    def transpose_mv(self, vector: Vector) -> Vector:
        return self.linear_map.transpose_mv(vector)


def _differenced(linear_map: AbstractLinearMap, unknowns: Vector) -> AbstractLinearMap:
    """The map with its difference quotients, where it has any, taken in û."""
    is_difference = lambda x: isinstance(x, _DifferenceMap)

    def one(x):
        if not is_difference(x):
            return x
        fn, point = _AtScaled(x.fn, unknowns), divided(x.primal, unknowns)
        return _Differences(_DifferenceMap(fn, point, x.value, x.relative_step), unknowns)

    return jtu.tree_map(one, linear_map, is_leaf=is_difference)


class ScaledResidual(AbstractLinearisable):
    """û → S_F⁻¹ fn(S_u û), which linearises fn itself."""

    fn: Fn
    args: Args
    scaling: Scaling
    policy: AbstractPolicy
    tags: frozenset[object] = eqx.field(static=True)  # of J

    def linearise(self, y: Y, tags: frozenset[object]) -> Linearisation:
        fn, args = self.fn, self.args
        target = fn if isinstance(fn, AbstractLinearisable) else lambda y, _: fn(y, args)
        point = self.scaling.plain(y)
        lin = linearise(target, point, has_aux=True, policy=self.policy, tags=self.tags)
        j, scaling = lin.operator, self.scaling
        inner = JacobianOperator(
            _differenced(j.linear_map, scaling.unknowns),
            j.in_structure(),
            j.out_structure(),
            j.tags,
        )
        # No solver asks for the joint map of its residual: it stays that of fn.
        value = divided(lin.value, scaling.residual)
        return Linearisation(value, lin.aux, viewed(inner, scaling, tags), lin.joint)


# --- the parts of a solver ----------------------------------------------------------------------


@ft.singledispatch
def in_units(part: Any, scaling: Scaling) -> Any:
    """A part of a solver that serves û as it served u; what holds nothing in units is itself.

    To be registered for every class with fields in the units of u, of F, or of J.
    """
    del scaling
    return part


def has_units(part: Any) -> bool:
    """Whether `in_units` is registered for its class."""
    return in_units.dispatch(type(part)) is not in_units.dispatch(object)


def solver_in_units(solver: Any, scaling: Scaling) -> Any:
    """The solver with all such parts replaced."""
    return jtu.tree_map(lambda part: in_units(part, scaling), solver, is_leaf=has_units)


@ft.singledispatch
def refusal(part: Any, congruent: bool) -> str | None:
    """Why this part of a solver cannot serve û; `congruent` where S_F = S_u⁻¹."""
    del part, congruent
    return None


@refusal.register
def _(part: AbstractKrylovSolver, congruent: bool) -> str | None:
    if congruent or not part.needs_symmetry:
        return None
    return (
        "it needs a symmetric J, but S_F⁻¹ J S_u is symmetric only with S_F = S_u⁻¹. Say "
        "`Scaled(..., residual=nks.Congruent())`, or take `nks.GMRES()`."
    )


@refusal.register
def _(part: Recorded, congruent: bool) -> str:
    return (
        "it would keep points in scaled units. Record the scaled solver: `Recorded(Scaled(...))`."
    )


@in_units.register
def _(part: PseudoTransient, scaling: Scaling) -> PseudoTransient:
    # M̂ = S_F⁻¹ M S_u, so that the flow is that of u.
    if isinstance(part.mass, lx.AbstractLinearOperator):
        mass = viewed(part.mass, scaling)
    else:
        mass = divided(scaling.unknowns, scaling.residual)
        mass = mass if part.mass is None else times(part.mass, mass)
    return eqx.tree_at(lambda p: p.mass, part, mass, is_leaf=lambda x: x is None)


@in_units.register
def _(part: Feasible, scaling: Scaling) -> Feasible:
    # Exact, as u = S_u û is: what lies in one box lies in the other.
    bounds = box(part.lower, part.upper, scaling.unknowns)
    lower, upper = (jtu.tree_map(jnp.divide, bound, scaling.unknowns) for bound in bounds)
    return Feasible(solver_in_units(part.globalisation, scaling), lower, upper, part.bending)

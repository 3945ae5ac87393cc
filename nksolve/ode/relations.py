"""The equations that Diffrax's implicit solvers hand to a root finder, seen from y's space.

Diffrax solves for a slope f, for an increment k = F = h f, or for a displacement z − y0, depending
on the solver and its terms; each comes with arguments of its own.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from equinox import AbstractVar

from .. import tree
from ..linearise.operator import AbstractLinearMap
from ..typing import Args, Scalar, Vector


class Slope(eqx.Module):
    """(t, z) → f(t, z, args), or h f: what is linearised."""

    vf: Any
    args: Args
    rest: tuple

    def __call__(self, t: Any, z: Vector) -> Any:
        return self.vf(t, z, self.args, *self.rest)


class Prod(eqx.Module):
    """f → f · control."""

    prod: Any
    control: Any

    def __call__(self, f: Any) -> Vector:
        return self.prod(f, self.control)


class AbstractRelation(eqx.Module):
    """w = γ F(base + w) in terms of Diffrax's unknown x, with γ the `diagonal`."""

    slope: AbstractVar[Slope]
    prod: AbstractVar[Prod | None]  # from the slope to F, where they are not the same
    t: AbstractVar[Any]
    base: AbstractVar[Vector]
    diagonal: AbstractVar[Any]
    control: AbstractVar[Any]

    @property
    def args(self) -> Args:
        """Those of `diffeqsolve`."""
        return self.slope.args

    @property
    def shift(self) -> Scalar:
        """h γ, in units of time, where the control is a time step; otherwise γ."""
        h = jtu.tree_leaves(self.control)
        if len(h) == 1 and jnp.shape(h[0]) == ():
            return jnp.asarray(self.diagonal * h[0].astype(jnp.result_type(self.diagonal)))
        return jnp.asarray(self.diagonal)

    @abc.abstractmethod
    def point(self, x: Any) -> Vector:
        """z = base + w."""

    def linearise_at(self, x: Any) -> Vector:
        """Where f is linearised, given the first guess."""
        return self.point(x)

    @abc.abstractmethod
    def in_y(self, r: Any) -> Vector:
        """Diffrax's residual as that of w − γ F(base + w)."""

    @abc.abstractmethod
    def change(self, dw: Vector, r: Any, slope: lx.AbstractLinearOperator) -> Any:
        """Δx from Δw = W⁻¹ (its residual)."""

    def rejected(self, x: Any, scale: Callable[[Vector], Vector]) -> Any:
        """A finite value for a solve that failed. Diffrax rejects the step whatever it is."""
        del scale
        return tree.zeros_like(x)


class SlopeRelation(AbstractRelation):
    """f − vf(t, base + γ prod(f)) = 0."""

    slope: Slope
    prod: Prod
    t: Any
    base: Vector
    diagonal: Any
    control: Any

    def point(self, x: Any) -> Vector:
        return tree.add(self.base, self.in_y(x))

    def in_y(self, r: Any) -> Vector:
        return tree.scale(self.diagonal, self.prod(r))

    def change(self, dw: Vector, r: Any, slope: lx.AbstractLinearOperator) -> Any:
        if not _is_elementwise(self.prod, r, dw):
            # (I − f' γ prod)⁻¹ r = r + f' W⁻¹ γ prod r, whatever the product.
            return tree.add(r, slope.mv(dw))
        factor = self.in_y(jtu.tree_map(jnp.ones_like, r))
        nothing = jtu.tree_map(lambda c: c == 0, factor)
        # No step at all, or an explicit stage: the slope is what it is.
        return jtu.tree_map(
            lambda none, r, d, c: jnp.where(none, r, d / jnp.where(none, jnp.ones_like(c), c)),
            nothing,
            r,
            dw,
            factor,
        )


class IncrementRelation(AbstractRelation):
    """k − F(t, base + γ k) = 0."""

    slope: Slope
    t: Any
    base: Vector
    diagonal: Any
    control: Any
    prod: None = None

    def point(self, x: Any) -> Vector:
        return tree.axpy(self.diagonal, x, self.base)

    def in_y(self, r: Any) -> Vector:
        return tree.scale(self.diagonal, r)

    def change(self, dw: Vector, r: Any, slope: lx.AbstractLinearOperator) -> Any:
        del slope
        none = self.diagonal == 0
        by = 1 / jnp.where(none, jnp.ones_like(self.diagonal), self.diagonal)
        return tree.where(none, r, tree.scale(by, dw))


class DisplacementRelation(AbstractRelation):
    """F(t, y0 + w) − w = 0, with the sign of `dfx.ImplicitEuler`."""

    slope: Slope
    t: Any
    base: Vector
    diagonal: Any
    control: Any
    prod: None = None

    def point(self, x: Any) -> Vector:
        return tree.add(self.base, x)

    def linearise_at(self, x: Any) -> Vector:
        # The first guess is an explicit step, which may lead anywhere.
        del x
        return self.base

    def in_y(self, r: Any) -> Vector:
        return tree.scale(-1.0, r)

    def change(self, dw: Vector, r: Any, slope: lx.AbstractLinearOperator) -> Any:
        del r, slope
        return dw

    def rejected(self, x: Any, scale: Callable[[Vector], Vector]) -> Any:
        # Here Diffrax looks at the error estimate only, which is half of k − w.
        size = scale(self.base)
        return jtu.tree_map(lambda x, s: (1e3 * s).astype(x.dtype), x, size)


class IncrementMap(AbstractLinearMap):
    """δy → prod(f' δy)."""

    linear_map: AbstractLinearMap
    prod: Prod
    slope_structure: tuple = eqx.field(static=True)

    def mv(self, vector: Vector) -> Vector:
        return self.prod(self.linear_map.mv(vector))

    def transpose_mv(self, vector: Vector) -> Vector:
        structure = tree.thaw(self.slope_structure)
        (back,) = jax.linear_transpose(self.prod, structure)(vector)
        return self.linear_map.transpose_mv(back)


def relation_of(args: Any) -> AbstractRelation:
    """The stage equation with those arguments of Diffrax (0.7)."""
    size = len(args) if isinstance(args, tuple) else 0
    if size == 8:
        _, diagonal, vf, prod, t, base, args, control = args
        slope, product = Slope(vf, args, ()), Prod(prod, control)
        diagonal = jnp.real(diagonal)
        return SlopeRelation(
            slope=slope, prod=product, t=t, base=base, diagonal=diagonal, control=control
        )
    if size == 7:
        _, diagonal, vf_prod, t, base, args, control = args
        slope, diagonal = Slope(vf_prod, args, (control,)), jnp.real(diagonal)
        return IncrementRelation(slope=slope, t=t, base=base, diagonal=diagonal, control=control)
    if size == 5 and callable(args[0]):
        vf_prod, t, base, args, control = args
        slope, one = Slope(vf_prod, args, (control,)), jnp.ones((), tree.real_dtype(base))
        return DisplacementRelation(slope=slope, t=t, base=base, diagonal=one, control=control)
    raise TypeError(
        "StageNewtonKrylov solves the stages of Diffrax's implicit solvers, as their "
        "`root_finder`. For other equations use `nks.root_find`, or `optx.root_find` with a "
        "method of nksolve."
    )


_ELEMENTWISE = {"mul", "convert_element_type", "broadcast_in_dim"}


def _is_elementwise(prod: Prod, f: Any, dw: Vector) -> bool:
    """Whether the product multiplies each entry of f by a number. Seen from its program."""
    structures = [jax.eval_shape(lambda x=x: x) for x in (f, dw)]
    if jtu.tree_structure(structures[0]) != jtu.tree_structure(structures[1]):
        return False
    leaves = zip(*map(jtu.tree_leaves, structures), strict=True)
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in leaves):
        return False
    jaxpr = jax.make_jaxpr(prod)(f).jaxpr
    kept = all(
        eqn.primitive.name in _ELEMENTWISE
        and not any(_grows(eqn.invars[0].aval.shape, out.aval.shape, eqn) for out in eqn.outvars)
        for eqn in jaxpr.eqns
    )
    return kept


def _grows(before: tuple, after: tuple, eqn: Any) -> bool:
    """Whether what is no scalar is broadcast."""
    return eqn.primitive.name == "broadcast_in_dim" and before != () and before != after

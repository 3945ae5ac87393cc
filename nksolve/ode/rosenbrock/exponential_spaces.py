"""The Krylov spaces of a step of an exponential Rosenbrock method."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp

from ... import tree
from ...linearise.linearisation import Linearisation
from ...typing import Flag, Scalar, ScalarLike, Vector
from ..newton import SimplifiedNewton
from ..stepper import derivative_tolerance
from .exponential_krylov import Space, grown
from .exponential_rule import Frame, Held, Wanted
from .phi import first_columns


class Spaces(eqx.Module):
    """The Krylov spaces of a step."""

    lin: Linearisation
    frame: Frame
    unit: Scalar  # the scaled length of the step
    allowed: Scalar
    rtol: Scalar
    norm_of: Callable[[Vector], Scalar]
    size: int = eqx.field(static=True)
    max_dimension: int = eqx.field(static=True)

    @classmethod
    def at(
        cls,
        root_finder: SimplifiedNewton,
        lin: Linearisation,
        h: Scalar,
        y0: Vector,
        *,
        max_dimension: int,
        adjoint_rtol: ScalarLike | None,
    ) -> "Spaces":
        """Those of a step of length h from y0; nothing here is differentiated."""
        dtype = tree.real_dtype(y0)
        scale = root_finder.scale(y0)
        at_once = Frame(scale, h)
        # The unit of time in which ∂F/∂t has the norm one: the scaled time is as small as that.
        unit = tree.norm2(at_once.inward(lin.args_tangent(h))).astype(dtype)
        safe = jnp.where(unit > 0, unit, jnp.ones_like(unit))
        frame = Frame(scale, jnp.where(unit > 0, h / safe.astype(h.dtype), jnp.zeros_like(h)))
        norm_of = lambda v: jnp.asarray(root_finder.norm(v)).astype(dtype)
        y = frame.inward(y0)
        # What the rounding of y leaves no hope to get below.
        floor = 4 * tree.eps(y0) * norm_of(y)
        allowed = jnp.maximum(jnp.asarray(root_finder.kappa).astype(dtype), floor)
        rtol = derivative_tolerance(root_finder, adjoint_rtol, y0)
        size = min(max_dimension, tree.size(y) + 1)
        return cls(lin, frame, unit, allowed, rtol, norm_of, size, max_dimension)

    def of(self, v: Vector, with_time: Flag, wanted: Wanted) -> Space:
        """That of v, in which what is wanted is found; with h²f_t for the first of a step."""

        def mv(x):
            v, s = x
            by = (self.frame.outward(v), s.astype(self.frame.per_time.dtype) * self.frame.per_time)
            return self.frame.inward(self.lin.joint.mv(by)), jnp.zeros_like(s)

        def weigh(hessenberg, span):
            table = first_columns(span * hessenberg, wanted.weights.shape[1] - 1)
            table = jnp.where((wanted.ends == 1)[:, None, None], table[1][None], table[0][None])
            return jnp.sum(wanted.weights[:, :, None] * table, axis=1)

        one = jnp.ones_like(self.unit)
        return grown(
            mv,
            (v, jnp.where(with_time, self.unit, jnp.zeros_like(self.unit))),
            weigh,
            lambda x: self.norm_of(x[0]),
            size=self.size,
            span=one,
            least_span=one,
            allowed=self.allowed,
        )

    def held(self, space: Space, wanted: Wanted) -> Held:
        """What derivatives are found with."""
        return Held(space, wanted, self.frame, self.lin, self.rtol, self.max_dimension)

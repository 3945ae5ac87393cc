"""How a search that leaves a box is fitted to it."""

import abc

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from ... import tree
from ...loops import any_lane
from ...typing import Flag, Scalar, Vector
from ..state import Direction
from .base import AbstractGlobalisation, Model
from .box import Box, largest_factor, towards
from .line_search import linear_norm_along


class AbstractBending(eqx.Module):
    """How a search that leaves the box is fitted to it."""

    @abc.abstractmethod
    def region(self, bounds: Box, point: Vector) -> Box:
        """The part of the box that trial points from `point` are projected onto."""

    @abc.abstractmethod
    def direction(self, bounds: Box, point: Vector, model: Model) -> tuple[Direction, Scalar]:
        """The direction to search along, and its length as a fraction of Newton's."""

    def products(self) -> tuple[int, int]:
        """How many products with J and with Jᵀ that takes."""
        return 0, 0

    @property
    def needs_transpose(self) -> bool:
        """Whether there is one with Jᵀ."""
        return self.products()[1] > 0

    def check(self, globalisation: AbstractGlobalisation) -> None:
        """Raises where it cannot bend the steps of that globalisation."""
        del globalisation


class Projected(AbstractBending):
    """Trial points are projected: P(y + s), entry by entry. The default.

    Entries that meet their bound stay on it, the others go on as far as the search says. A search
    that shortens s comes back to the direction itself as soon as no entry meets a bound, so that a
    descent direction at an interior point stays one.

    Source: Bertsekas, IEEE Trans. Automat. Control 21(2), 1976; as PETSc's `vinewtonrsls`.
    """

    def region(self, bounds: Box, point: Vector) -> Box:
        return bounds

    def direction(self, bounds: Box, point: Vector, model: Model) -> tuple[Direction, Scalar]:
        return model.direction, jnp.ones_like(model.norm)


class ProjectedDescent(AbstractBending):
    """As `nks.Projected`; where that is no descent, along the projected gradient of ½‖F‖².

    An entry on its bound whose part of d points out of it is held. What is left of d may be no
    descent direction any more: then `nks.Projected` ends with `line_search_failed`, and this goes
    on. d stands where FᵀJ d ≤ −`descent` ‖F‖² without the entries held, and everywhere but on a
    bound; otherwise it is −(‖g‖²/‖J g‖²) g, g = JᵀF without the entries that this would hold.

    For line searches. It ends (`step_small`) where there is no direction of descent inside the box.

    **Arguments:**

    - `descent`: see above.

    Work: for each direction one product with J and one with Jᵀ.

    Source: as the globalisation in Kanzow, Yamashita & Fukushima, J. Comput. Appl. Math. 172, 2004.
    """

    descent: float = 1e-3

    def region(self, bounds: Box, point: Vector) -> Box:
        return bounds

    def products(self) -> tuple[int, int]:
        return 1, 1

    def check(self, globalisation: AbstractGlobalisation) -> None:
        if not globalisation.is_line_search:
            raise ValueError(
                "`ProjectedDescent` puts the projected gradient in the place of a direction, along "
                f"which only a line search goes: `{type(globalisation).__name__}` makes its step "
                "of Newton's own. Take `nks.Backtracking()`, or another bending such as "
                "`nks.Projected()`."
            )

    def direction(self, bounds: Box, point: Vector, model: Model) -> tuple[Direction, Scalar]:
        found, one = model.direction, jnp.ones_like(model.norm)
        dot = lambda a, b: tree.vdot(a, b).astype(model.norm.dtype)

        def fitted():
            unit = tree.scale(-1 / model.norm, model.minus_f)
            gradient = model.operator.transpose().mv(unit)
            free = released(bounds, point, found.vector)
            slope = dot(gradient, free) / model.norm
            down = released(bounds, point, tree.neg(gradient))
            image = model.operator.mv(down)
            square = dot(down, down)
            length = square / dot(image, image)
            # Nothing is left of the gradient, or J maps it to zero: no step.
            length = jnp.where(jnp.isfinite(length), length, 0)
            steepest = Direction(
                tree.scale(length * model.norm, down),
                -length * square,
                jnp.sqrt(jnp.maximum(1 - length * square, 0)),
                found.eta,
            )
            held = ~_equal(free, found.vector)
            newton = found._replace(slope=jnp.where(held, slope, found.slope))
            return tree.where(held & ~(slope <= -self.descent), steepest, newton)

        return lax.cond(any_lane(model.wanted), fitted, lambda: found), one


class Interior(AbstractBending):
    """Each entry goes at most `fraction` of its way to its bound: y stays strictly inside.

    For residuals that are singular on a bound, as log y at 0. Otherwise as `nks.Projected`: no
    entry holds up another.

    **Arguments:**

    - `fraction`: in (0, 1).

    Source: the rule of interior-point methods, entry by entry: Nocedal & Wright, Numerical
    Optimization, 2nd ed., (19.9).
    """

    fraction: float = 0.9

    def __check_init__(self):
        if not 0 < self.fraction < 1:
            raise ValueError(f"`fraction` must lie in (0, 1), but it is {self.fraction}.")

    def region(self, bounds: Box, point: Vector) -> Box:
        return towards(bounds, point, self.fraction)

    def direction(self, bounds: Box, point: Vector, model: Model) -> tuple[Direction, Scalar]:
        return model.direction, jnp.ones_like(model.norm)


class Shortened(AbstractBending):
    """The whole direction is shortened to `fraction` of the way to the nearest bound it crosses.

    It keeps its angle, and so remains a descent direction. The price: one entry that runs against
    its bound holds up all others. Entries that are on their bound and point out of it are held
    there and not counted.

    **Arguments:**

    - `fraction`: in (0, 1].

    Source: KINSOL's inequality constraints (SUNDIALS), with its 0.9.
    """

    fraction: float = 0.9

    def __check_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"`fraction` must lie in (0, 1], but it is {self.fraction}.")

    def region(self, bounds: Box, point: Vector) -> Box:
        return bounds

    def direction(self, bounds: Box, point: Vector, model: Model) -> tuple[Direction, Scalar]:
        found = model.direction
        factor = largest_factor(bounds, point, found.vector)
        length = jnp.where(factor < 1, self.fraction * factor, 1).astype(model.norm.dtype)
        return Direction(
            tree.scale(length, found.vector),
            length * found.slope,
            # What the rest of it promises where entries are held, for want of a product.
            linear_norm_along(length, found),
            found.eta,
        ), length


def released(bounds: Box, point: Vector, direction: Vector) -> Vector:
    """The direction without the entries that are on their bound and point out of it."""

    def leaf(y, d, lower, upper):
        held = ((y <= lower) & (d < 0)) | ((y >= upper) & (d > 0))
        return jnp.where(held, jnp.zeros_like(d), d)

    return jtu.tree_map(leaf, point, direction, *bounds)


def _equal(a: Vector, b: Vector) -> Flag:
    same = jtu.tree_leaves(jtu.tree_map(lambda x, y: jnp.all(x == y), a, b))
    return jnp.stack(same or [jnp.array(True)]).all()

"""Box constraints: every trial point of a globalisation stays inside."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import PyTree

from ... import tree
from ...krylov.base import AbstractKrylovSolver
from ...results import REASONS
from ...typing import Count, Scalar, Vector
from ..state import Direction
from .base import AbstractGlobalisation, Judgement, Linear, Model, Shift, Trial
from .bending import AbstractBending, Projected
from .box import Box, box, check_order, contains, is_known, projected, step_inside
from .line_search import Backtracking


class _Inside(NamedTuple):
    """The point from which the search goes, its direction, and the search itself."""

    point: Vector
    along: Direction
    length: Scalar  # of that direction, as a fraction of Newton's
    search: PyTree


class Feasible(AbstractGlobalisation[_Inside]):
    """lower ≤ y ≤ upper at every point where F is evaluated; the root is looked for inside.

    The trial points of another globalisation, fitted to the box: F is never seen outside, so that
    it may be NaN there. For roots of F. Where F need not vanish in entries that end on a bound, it
    is a complementarity problem: see `nks.complementarity`, which this goes well with.

    The initial point must lie inside. Where its value is known (outside of `jit`) another one is
    refused; a traced one, as `nks.root_find` has it, is projected, and the projection is the
    first point evaluated. A search that is held at the bounds ends with `step_small` or the failure
    of the globalisation, never in success: that is the residual test's.

    **Arguments:**

    - `globalisation`: any other.
    - `lower`, `upper`: prefixes of y: numbers, arrays, or `None` for no bound.
    - `bending`: `nks.Projected()`, `nks.ProjectedDescent()`, `nks.Interior(fraction)` or
      `nks.Shortened(fraction)`.

    **Raises:** `ValueError` for bounds that cross (where their values are known) or do not fit y,
    `TypeError` for complex y.

    Storage: two vectors (the point and the direction), besides the bounds. Work: none in products
    or evaluations, but for the two products of `nks.ProjectedDescent`.

    Source: those of the bendings.
    """

    globalisation: AbstractGlobalisation = Backtracking()
    lower: PyTree = None
    upper: PyTree = None
    bending: AbstractBending = Projected()

    def __check_init__(self):
        if not isinstance(self.globalisation, AbstractGlobalisation):
            raise TypeError(
                "`Feasible` wraps a globalisation, such as `nks.Backtracking()`, but got "
                f"{self.globalisation!r}."
            )
        self.bending.check(self.globalisation)
        check_order(self.lower, self.upper)

    def init(self, variables: Vector, norm: Scalar, workspace: PyTree) -> _Inside:
        bounds = self._box(variables)
        if is_known((bounds, variables)) and not bool(contains(bounds, variables)):
            raise ValueError(
                "The initial point lies outside of `lower` and `upper`; the nearest point inside "
                f"is {projected(bounds, variables)}."
            )
        one = jnp.ones_like(norm)
        along = Direction(tree.zeros_like(variables), -one, one, 0 * one)
        search = self.globalisation.init(variables, norm, workspace)
        return _Inside(variables, along, one, search)

    def remember(self, state: _Inside, linear: Callable[[], Linear]) -> _Inside:
        return state._replace(search=self.globalisation.remember(state.search, linear))

    def start(self, model: Model, state: _Inside) -> _Inside:
        along, length = self.bending.direction(self._box(state.point), state.point, model)
        search = self.globalisation.start(model._replace(direction=along), state.search)
        return _Inside(state.point, along, length, search)

    def displacement(self, state: _Inside, direction: Vector) -> Vector:
        del direction  # Newton's
        step = self.globalisation.displacement(state.search, state.along.vector)
        region = self.bending.region(self._box(state.point), state.point)
        return step_inside(region, state.point, step)

    def step_length(self, state: _Inside) -> Scalar:
        return state.length * self.globalisation.step_length(state.search)

    def held_length(self, state: _Inside) -> Scalar:
        return self.globalisation.held_length(state.search)

    def linear_norm(self, state: _Inside, direction: Direction) -> Scalar:
        del direction
        return self.globalisation.linear_norm(state.search, state.along)

    def judge(self, state: _Inside, trial: Trial) -> Judgement:
        along = trial._replace(direction=state.along.vector)
        judged = self.globalisation.judge(state.search, along)
        point = tree.where(judged.accepted, trial.point, state.point)
        return judged._replace(state=state._replace(point=point, search=judged.state))

    def check(self, linear_solver: AbstractKrylovSolver) -> None:
        self.globalisation.check(linear_solver)

    def shift(self, state: _Inside | None) -> Shift | None:
        return self.globalisation.shift(None if state is None else state.search)

    @property
    def needs_transpose(self) -> bool:
        return self.globalisation.needs_transpose or self.bending.needs_transpose

    def failure(self, state: _Inside) -> REASONS:
        return self.globalisation.failure(state.search)

    def products(self, state: _Inside) -> tuple[Count | int, Count | int]:
        forward, transposed = self.globalisation.products(state.search)
        more, more_transposed = self.bending.products()
        return forward + more, transposed + more_transposed

    def work(self, state: _Inside) -> tuple[Count | int, Count | int, Count | int]:
        return self.globalisation.work(state.search)

    def _box(self, variables: Vector) -> Box:
        return box(self.lower, self.upper, variables)

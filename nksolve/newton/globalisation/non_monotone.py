"""A line search that lets ‖F‖ grow now and then."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ... import tree
from ...typing import Scalar, Vector
from ..state import Direction
from .base import AbstractGlobalisation, Judgement, Model, Trial
from .line_search import (
    Search,
    begun,
    check_growth,
    first_length,
    interpolated,
    linear_norm_along,
    retried,
)


class _Window(NamedTuple):
    """A search, and ‖F‖ at the last accepted points, the present one first; 0 before there were."""

    search: Search
    norms: Float[Array, " window"]


class NonMonotone(AbstractGlobalisation[_Window]):
    """Backtracking against the largest ‖F‖ of the last `window` accepted points.

    Accepts ½‖F(y + λ d)‖² ≤ ½ max_{j < window} ‖F_{k−j}‖² + α λ FᵀJd; otherwise λ is shortened as
    by `nks.Backtracking`. Narrow curved valleys, along which every step to their bottom is tiny,
    are crossed instead of followed. `window=1` is `nks.Backtracking`; `growth` is as there. Fails
    after `max_trials` trials or below `min_length`.

    Source: Grippo, Lampariello & Lucidi, SIAM J. Numer. Anal. 23(4), 1986, (1).
    """

    window: int = eqx.field(static=True, default=10)
    alpha: float = 1e-4
    min_length: float = 1e-12
    max_trials: int = 40
    growth: float = 2.0

    def __check_init__(self):
        check_growth(self.growth)
        if self.window < 1:
            raise ValueError(f"`window` must be at least 1, but it is {self.window}.")

    @property
    def is_line_search(self) -> bool:
        return True

    def init(self, variables: Vector, norm: Scalar, workspace: PyTree) -> _Window:
        del variables, workspace
        return _Window(begun(-jnp.ones_like(norm)), jnp.zeros((self.window,), norm.dtype))

    def start(self, model: Model, state: _Window) -> _Window:
        norms = jnp.concatenate([model.norm[None], state.norms[:-1]])
        first = first_length(state.search, self.growth)
        return _Window(begun(model.direction.slope, first), norms)

    def displacement(self, state: _Window, direction: Vector) -> Vector:
        return tree.scale(state.search.length, direction)

    def step_length(self, state: _Window) -> Scalar:
        return state.search.length

    def linear_norm(self, state: _Window, direction: Direction) -> Scalar:
        return linear_norm_along(state.search.length, direction)

    def judge(self, state: _Window, trial: Trial) -> Judgement:
        search, merit = state.search, trial.merit
        # No norm at all yet: the initial point, with merit 0.
        ratio = jnp.max(state.norms) / state.norms[0]
        reference = jnp.where(jnp.isfinite(ratio), ratio, jnp.ones_like(ratio))
        allowed = 0.5 * reference**2 + self.alpha * search.length * search.slope
        accepted = 0.5 * merit**2 <= allowed
        shorter = interpolated(search, merit)
        judged = retried(search, merit, accepted, shorter, self.min_length, self.max_trials)
        return judged._replace(state=_Window(judged.state, state.norms))

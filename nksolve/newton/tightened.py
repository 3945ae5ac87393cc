"""A forcing term that is tight where short steps persist, and loose again where that harms."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..typing import Count, Scalar
from .forcing import AbstractForcing, EisenstatWalker2, Progress, check_unit


class _Streak(NamedTuple):
    """Shortened steps in a row; negative while tight solves rest."""

    length: Count
    forcing: PyTree


class Tightened(AbstractForcing[_Streak]):
    """η_k of another forcing term, but at most `tight` after `patience` shortened steps in a row.

    ‖F_k‖/‖F_{k−1}‖ is near 1 after a step that the globalisation had to shorten, and the terms of
    Eisenstat and Walker then ask for a loose solve, whose direction may be what held the step
    short. So where that goes on, the next systems are solved to `tight`, until a step is taken in
    full. Where a tight direction in turn is followed for less than `shortest` of its length it is
    Newton's own direction that leads away, as near a singular J; the loose ones, from a smaller
    space, are then taken for the next `rest` shortened steps. Where every step is full, or nearly,
    this is the term that it wraps. `NewtonKrylov` has it by default, around `EisenstatWalker2`.

    **Arguments:**

    - `forcing`: any other.
    - `tight`: η where short steps persist.
    - `patience`: how many make it so.
    - `shortest`: the least λ of a tight direction that is worth its solve.
    - `rest`: for how many short steps none is tried after one that was not.

    Source: the authors; the numbers were chosen on the 23 problems and on Bratu's and a
    convection–diffusion problem from far starts (docs/validation/nonlinear.md).
    """

    forcing: AbstractForcing = EisenstatWalker2()
    tight: float = 1e-3
    patience: int = 3
    shortest: float = 0.01
    rest: int = 10

    def __check_init__(self):
        check_unit("tight", self.tight)
        if self.patience < 1 or self.rest < 0:
            raise ValueError("`patience` must be at least 1 and `rest` not negative.")

    def init(self, dtype: np.dtype) -> _Streak:
        return _Streak(jnp.zeros((), jnp.int32), self.forcing.init(dtype))

    def eta(self, progress: Progress, state: _Streak) -> tuple[Scalar, _Streak]:
        eta, inner = self.forcing.eta(progress, state.forcing)
        zero = jnp.zeros_like(state.length)
        in_vain = (state.length >= self.patience) & (progress.length < self.shortest)
        streak = jnp.where(progress.length < 1, state.length + 1, zero)
        streak = jnp.where(in_vain, jnp.full_like(zero, -self.rest), streak)
        streak = jnp.where(progress.is_first, zero, streak)
        # As tight as the residual test can use, and no tighter.
        most = jnp.fmax(jnp.full_like(eta, self.tight), 0.5 * progress.target)
        eta = jnp.where(streak >= self.patience, jnp.minimum(eta, most), eta)
        return eta, _Streak(streak, inner)

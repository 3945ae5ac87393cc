"""How tightly each linear system is solved: ‖F + J s‖ ≤ η ‖F‖."""

import abc
from typing import Generic, NamedTuple, TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ..typing import Scalar

_State = TypeVar("_State")


class Progress(NamedTuple):
    """What a forcing term sees after an accepted step; norms are scaled 2-norms.

    `is_first` holds at the initial point, where the other norms mean nothing.
    """

    is_first: Scalar
    norm: Scalar  # ‖F_k‖
    previous_norm: Scalar  # ‖F_{k−1}‖
    linear_norm: Scalar  # ‖F_{k−1} + J_{k−1} s_{k−1}‖ for the step that was taken
    previous_eta: Scalar  # η_{k−1}
    target: Scalar  # tolerance of the convergence test as a fraction of the current norm in it
    length: Scalar | float = 1.0  # of that step in units of d where longer ones would not do


class AbstractForcing(eqx.Module, Generic[_State]):
    """A forcing sequence. Law: 0 ≤ η ≤ eta_max < 1; no gradient flows through it."""

    @abc.abstractmethod
    def init(self, dtype: np.dtype) -> _State:
        """The state at the initial point."""

    @abc.abstractmethod
    def eta(self, progress: Progress, state: _State) -> tuple[Scalar, _State]:
        """η_k, and the state for η_{k+1}."""


class ConstantForcing(AbstractForcing[None]):
    """η_k = eta.

    **Arguments:**

    - `value`: η. Small values (1e-10) give Newton's method with exact linear solves.
    """

    value: float = 0.1

    def __check_init__(self):
        check_unit("value", self.value)

    def init(self, dtype: np.dtype) -> None:
        return None

    def eta(self, progress: Progress, state: None) -> tuple[Scalar, None]:
        return jnp.full_like(progress.norm, self.value), None


class EisenstatWalker1(AbstractForcing[None]):
    """η_k = |‖F_k‖ − ‖F_{k−1} + J_{k−1}s_{k−1}‖| / ‖F_{k−1}‖: how well the linear model predicted.

    Safeguard: η_k ≥ η_{k−1}^{(1+√5)/2} where that exceeds `threshold`; final guard against solving
    tighter than the last step needs: η_k ≥ ½ tol/‖F_k‖; η_k ≤ `eta_max`.

    Source: Eisenstat & Walker, SIAM J. Sci. Comput. 17(1), 1996, choice 1 (2.2); final guard:
    Kelley, Solving Nonlinear Equations with Newton's Method, SIAM 2003, eq. 3.6.
    """

    eta_0: float = 0.5
    eta_max: float = 0.9
    threshold: float = 0.1

    def __check_init__(self):
        check_unit("eta_0", self.eta_0)
        check_unit("eta_max", self.eta_max)

    def init(self, dtype: np.dtype) -> None:
        return None

    def eta(self, progress: Progress, state: None) -> tuple[Scalar, None]:
        eta = jnp.abs(progress.norm - progress.linear_norm) / progress.previous_norm
        floor = progress.previous_eta ** ((1 + 5**0.5) / 2)
        return _guarded(self, progress, eta, floor), None


class EisenstatWalker2(AbstractForcing[None]):
    """η_k = γ (‖F_k‖/‖F_{k−1}‖)^α.

    Safeguard: η_k ≥ γ η_{k−1}^α where that exceeds `threshold`; final guard η_k ≥ ½ tol/‖F_k‖;
    η_k ≤ `eta_max`.

    Source: Eisenstat & Walker, SIAM J. Sci. Comput. 17(1), 1996, choice 2 (2.6); final guard:
    Kelley, Solving Nonlinear Equations with Newton's Method, SIAM 2003, eq. 3.6. The defaults
    γ = 0.9, α = 2, eta_max = 0.9 are Kelley's.
    """

    gamma: float = 0.9
    alpha: float = 2.0
    eta_0: float = 0.5
    eta_max: float = 0.9
    threshold: float = 0.1

    def __check_init__(self):
        check_unit("eta_0", self.eta_0)
        check_unit("eta_max", self.eta_max)
        if not 0 <= self.gamma <= 1 or not 1 < self.alpha <= 2:
            raise ValueError("`gamma` must lie in [0, 1] and `alpha` in (1, 2].")

    def init(self, dtype: np.dtype) -> None:
        return None

    def eta(self, progress: Progress, state: None) -> tuple[Scalar, None]:
        eta = self.gamma * (progress.norm / progress.previous_norm) ** self.alpha
        floor = self.gamma * progress.previous_eta**self.alpha
        return _guarded(self, progress, eta, floor), None


def _guarded(
    rule: EisenstatWalker1 | EisenstatWalker2, progress: Progress, eta: Scalar, floor: Scalar
) -> Scalar:
    eta = jnp.where(floor > rule.threshold, jnp.maximum(eta, floor), eta)
    eta = jnp.where(progress.is_first, jnp.full_like(eta, rule.eta_0), eta)
    # A tolerance that is NaN bounds nothing.
    return jnp.clip(jnp.fmax(eta, 0.5 * progress.target), 0.0, rule.eta_max)


def check_unit(name: str, value: float) -> None:
    """Raises unless 0 ≤ value < 1."""
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must lie in [0, 1), but it is {value}.")

"""What a globalisation is: from the Newton direction to the next trial point, and its verdict."""

import abc
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import PyTree

from ...krylov.base import AbstractKrylovSolver
from ...krylov.system import KrylovState
from ...results import REASONS
from ...typing import Args, Count, Flag, Scalar, Vector, Y
from ..state import Direction

_State = TypeVar("_State")


class Linear(NamedTuple):
    """What it takes to solve with J.

    **Attributes:**

    - `solver`: the linear solver, which prepares itself at an `operator`, `point` and `args`.
    - `operator`: J there.
    - `real`: whether inner products are real.
    """

    solver: AbstractKrylovSolver
    operator: lx.AbstractLinearOperator
    point: Y
    args: Args
    real: bool


class Model(NamedTuple):
    """F ≈ F + J s at a point, and the direction that was found there.

    **Attributes:**

    - `operator`: J.
    - `minus_f`: −F.
    - `norm`: ‖F‖₂.
    - `direction`: d, with FᵀJd/‖F‖² and ‖F + J d‖/‖F‖.
    - `workspace`: of the Krylov method, after its solve, which took `num_restarts` restarts.
    - `wanted`: whether a direction was wanted; elsewhere the rest means nothing.
    - `linear`: J with its preconditioner.
    """

    operator: lx.AbstractLinearOperator
    minus_f: Vector
    norm: Scalar
    direction: Direction
    workspace: PyTree
    num_restarts: Count
    wanted: Flag
    linear: KrylovState | None = None


class Trial(NamedTuple):
    """A trial point y + s.

    **Attributes:**

    - `point`: y + s.
    - `value`: F there.
    - `merit`: ‖F(y + s)‖₂/‖F(y)‖₂; infinite where F is not finite, 0 at the initial point.
    - `direction`: that along which it lies.
    - `running`: whether the solve goes on; elsewhere the judgement means nothing.
    - `linear`: makes what it takes to solve with J there.
    """

    point: Vector
    value: Vector
    merit: Scalar
    direction: Vector
    running: Flag | bool = True
    linear: Callable[[], Linear] | None = None


class Shift(NamedTuple):
    """c M, to be added to J.

    **Attributes:**

    - `factor`: c ≥ 0.
    - `mass`: M, as a tree like y with its diagonal or a Lineax operator; `None` is the identity.
    """

    factor: Scalar
    mass: Any


def merit(norm: Scalar, before: Scalar, finite: Flag) -> Scalar:
    """‖F(y + s)‖₂/‖F(y)‖₂ as a trial has it: finite where F is, though the ratio may overflow."""
    ratio = jnp.minimum(norm / before, jnp.finfo(norm.dtype).max)
    return jnp.where(finite, ratio, jnp.inf)


class Judgement(NamedTuple):
    """What a globalisation says of a trial point. Not accepted and not failed: try again."""

    accepted: Flag
    failed: Flag
    state: Any


class AbstractGlobalisation(eqx.Module, Generic[_State]):
    """Turns a direction into trial points and judges them.

    The merit is φ = ‖F(y + s)‖₂ / ‖F(y)‖₂, so that everything is free of scale.

    Laws: a trial point that is not finite is never accepted; a trial that is not accepted leaves y
    as it was; no trial but an accepted one calls for another direction.
    """

    @abc.abstractmethod
    def init(self, variables: Vector, norm: Scalar, workspace: PyTree) -> _State:
        """The state before the initial point, whose displacement means nothing. `norm` has the
        dtype of norms, `workspace` is that of the Krylov method."""

    def remember(self, state: _State, linear: Callable[[], Linear]) -> _State:
        """That state with room for what it keeps of a linearisation like that one."""
        del linear
        return state

    @abc.abstractmethod
    def start(self, model: Model, state: _State) -> _State:
        """The state of the search along a new direction."""

    @abc.abstractmethod
    def displacement(self, state: _State, direction: Vector) -> Vector:
        """The step s from y to the next trial point."""

    @abc.abstractmethod
    def step_length(self, state: _State) -> Scalar:
        """The length of that step as a fraction of the direction."""

    def held_length(self, state: _State) -> Scalar:
        """That length where the step is short because longer ones would not do, otherwise 1."""
        return self.step_length(state)

    @abc.abstractmethod
    def linear_norm(self, state: _State, direction: Direction) -> Scalar:
        """‖F + J s‖/‖F‖, what the linear model promises of that step."""

    @abc.abstractmethod
    def judge(self, state: _State, trial: Trial) -> Judgement:
        """Judges the trial point."""

    def check(self, linear_solver: AbstractKrylovSolver) -> None:
        """Raises where the two cannot go together."""
        del linear_solver

    def shift(self, state: _State | None) -> Shift | None:
        """What is added to J in the linear system for the direction; for no state, before there is
        one, anything of that form."""
        del state
        return None

    @property
    def is_line_search(self) -> bool:
        """Whether it searches along any direction of descent that it is given."""
        return False

    @property
    def needs_transpose(self) -> bool:
        """Whether `start` multiplies by Jᵀ."""
        return False

    def failure(self, state: _State) -> REASONS:
        """Why a solve ends where no trial point will do."""
        del state
        return REASONS.line_search_failed

    def products(self, state: _State) -> tuple[Count | int, Count | int]:
        """How many products with J and with Jᵀ `start` makes for a direction."""
        del state
        return 0, 0

    def work(self, state: _State) -> tuple[Count | int, Count | int, Count | int]:
        """Products with J, with Jᵀ, and applications of M⁻¹ that the last judgement made."""
        del state
        return 0, 0, 0

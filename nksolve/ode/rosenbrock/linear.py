"""The linear solves of Rosenbrock stages, whose errors no iteration of Newton's makes good."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx

from ... import tree
from ...adjoint.base import stop_gradient
from ...krylov.system import KrylovState
from ...linearise.views import divided
from ...loops import any_lane
from ...typing import Count, Flag, Scalar, Vector
from ..linear import AbstractStageLinear, DirectStageLinear, KrylovStageLinear

# A solve has failed whose residual is larger than the tolerance by more than this factor.
FAILED = 10


class Solved(NamedTuple):
    """u = W⁻¹ r, and what it cost."""

    value: Vector
    ok: Flag  # finite, with a small residual
    num_matvecs: Count
    num_applications: Count
    workspace: Any


class AbstractTightLinear(eqx.Module):
    """W of a step with what solves with it, for all stages and their derivatives."""

    @property
    @abc.abstractmethod
    def state(self) -> KrylovState:
        """W with its inverse or preconditioner."""

    @abc.abstractmethod
    def workspace(self) -> Any:
        """The memory of a solve."""

    @abc.abstractmethod
    def solve(self, r: Vector, tolerance: Scalar, workspace: Any) -> Solved:
        """u with ‖r − W u‖ at most `tolerance` in the weighted root-mean-square norm."""

    @abc.abstractmethod
    def tight(self, state: KrylovState, b: Vector) -> Vector:
        """W⁻¹ b, to the tolerance of derivatives, for the W of such a state or its transpose."""

    def derivative(self, b: Vector, *, transposed: bool) -> Vector:
        """W⁻¹ b or W⁻ᵀ b, to the tolerance of derivatives."""
        return self.tight(self.state.transpose() if transposed else self.state, b)


class RefinedLinear(AbstractTightLinear):
    """By a factorisation, refined once where an application of it is not enough.

    Elimination without pivoting across blocks leaves errors that count where hγ f_y is large and W
    badly conditioned, as a conserved sum makes it.
    """

    operator: lx.AbstractLinearOperator
    inverse: lx.AbstractLinearOperator
    scale: Vector

    @property
    def state(self) -> KrylovState:
        return KrylovState(self.operator, self.inverse)

    def workspace(self) -> Any:
        return None

    def solve(self, r: Vector, tolerance: Scalar, workspace: Any) -> Solved:
        norm = lambda v: weighted_norm(v, self.scale).astype(tolerance.dtype)
        x, rest, num = _refined(self.state, r, norm, tolerance)
        # The residual of a badly conditioned W may be the rounding of W u, which W⁻¹ makes small
        # again: then its image, the error of u, decides.
        residual, most = norm(rest), FAILED * tolerance
        doubtful = any_lane(~(residual <= most))
        error = lax.cond(doubtful, lambda: norm(self.inverse.mv(rest)), lambda: residual)
        ok = all_finite(x) & (jnp.minimum(residual, error) <= most)
        return Solved(x, ok, num, num, workspace)

    def tight(self, state: KrylovState, b: Vector) -> Vector:
        tolerance = tree.eps(b) ** (2 / 3) * tree.norm2(b)
        return _refined(state, b, tree.norm2, tolerance)[0]


class KrylovLinear(AbstractTightLinear):
    """By a Krylov method with the step's preconditioner, as stages of other methods are solved."""

    stage_linear: KrylovStageLinear

    @property
    def state(self) -> KrylovState:
        return KrylovState(self.stage_linear.operator, self.stage_linear.inverse)

    def workspace(self) -> Any:
        return self.stage_linear.workspace()

    def solve(self, r: Vector, tolerance: Scalar, workspace: Any) -> Solved:
        norm, found, workspace = self.stage_linear.measured(r, tolerance, workspace)
        ok = all_finite(found.value) & (norm <= FAILED * tolerance)
        return Solved(found.value, ok, found.num_matvecs, found.num_applications, workspace)

    def tight(self, state: KrylovState, b: Vector) -> Vector:
        return self.stage_linear.tight(state, b)


def tight_linear(linear: AbstractStageLinear, scale: Vector) -> AbstractTightLinear:
    """For the linear solves that were prepared."""
    if isinstance(linear, DirectStageLinear):
        return stop_gradient(RefinedLinear(linear.operator, linear.inverse, scale))
    assert isinstance(linear, KrylovStageLinear)
    return KrylovLinear(linear)


def _refined(
    state: KrylovState, b: Vector, norm: Callable[[Vector], Scalar], tolerance: Scalar
) -> tuple[Vector, Vector, Count]:
    """(x, b − A x, applications) with one refinement where the norm is above the tolerance."""
    x = state.preconditioner.mv(b)
    rest = tree.sub(b, state.operator.mv(x))
    needed = ~(norm(rest) <= tolerance)

    def refine():
        better = tree.add(x, state.preconditioner.mv(rest))
        return better, tree.sub(b, state.operator.mv(better))

    x, rest = lax.cond(any_lane(needed), refine, lambda: (x, rest))
    return x, rest, 1 + tree.count(needed)


def weighted_norm(v: Vector, scale: Vector) -> Scalar:
    """The root-mean-square norm of D⁻¹ v."""
    size = jnp.sqrt(jnp.asarray(float(max(tree.size(v), 1)), tree.real_dtype(v)))
    return tree.norm2(divided(v, scale)) / size


def all_finite(v: Vector) -> Flag:
    """Whether every entry is a number."""
    ok = [jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(v)]
    return jnp.all(jnp.stack(ok)) if ok else jnp.array(True)

"""Plain iteration while it contracts fast enough, a Krylov method where it does not."""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import PyTree

from .. import tree
from ..loops import any_lane
from ..precondition.base import AbstractPreconditioner
from ..typing import Args, Count, Flag, LinearFn, Scalar, ScalarLike, Vector, Y
from .base import AbstractKrylovSolver
from .gmres import GMRES
from .system import KrylovResult, LinearSystem


class AbstractSwitchingRule(eqx.Module):
    """When a plain iteration gives way to a Krylov method."""

    @abc.abstractmethod
    def cost(self, mv: LinearFn, vector: Vector) -> float:
        """Work of a Krylov iteration, in plain iterations; decided when the solve is traced."""

    @abc.abstractmethod
    def __call__(self, rate: Scalar, reduction: Scalar, cost: float) -> Flag:
        """Whether the Krylov method is the cheaper way from here. `rate` is the factor by which the
        last iteration reduced the residual, `reduction` the factor that is still wanted."""


class ContractionRule(AbstractSwitchingRule):
    """Compares ln(r)/ln(ρ) plain iterations with `start` + ln(r)/ln(σ) Krylov iterations.

    r is the reduction that is still wanted and ρ the measured rate. σ = (1 − √(1 − ρ²))/ρ is the
    rate of a Krylov method for eigenvalues of −J in [1 − ρ, 1 + ρ], as of a near-symmetric cell.

    **Arguments:**

    - `krylov_cost`: work of a Krylov iteration in plain iterations; by default estimated from the
      multiplications in J v and the length of v (for a CPU: small cells about 5, large ones 1.2).
    - `start`: iterations that setting up the Krylov method is worth.
    """

    krylov_cost: float | None = eqx.field(static=True, default=None)
    start: float = eqx.field(static=True, default=2.0)

    def __check_init__(self):
        if self.krylov_cost is not None and not self.krylov_cost >= 1:
            raise ValueError(f"`krylov_cost` must be at least 1, but it is {self.krylov_cost}.")

    def cost(self, mv: LinearFn, vector: Vector) -> float:
        if self.krylov_cost is not None:
            return self.krylov_cost
        return estimated_cost(mv, vector)

    def __call__(self, rate: Scalar, reduction: Scalar, cost: float) -> Flag:
        limit = 1 - jnp.finfo(rate.dtype).eps
        rho = jnp.clip(rate, 1e-6, limit)
        sigma = rho / (1 + jnp.sqrt((1 - rho) * (1 + rho)))
        wanted = -jnp.log(jnp.minimum(reduction, 1.0))
        plain = wanted / -jnp.log(rho)
        return (plain > cost * (self.start + wanted / -jnp.log(sigma))) | ~(rate < limit)


class SwitchingWorkspace(NamedTuple):
    """Of the Krylov method, and what the last plain iterations showed."""

    krylov: PyTree
    rate: Scalar  # 0 before the first
    num_plain_steps: Count


class _Plain(NamedTuple):
    x: Vector
    r: Vector  # b − A x
    size: Scalar
    rate: Scalar
    steps: Count
    going: Flag


class SwitchingLinear(AbstractKrylovSolver):
    """x ← x + M⁻¹(b − A x) while that contracts fast enough, then a Krylov method for the rest.

    M⁻¹ is the preconditioner of the Krylov method, or −β I where it has none: J = ∂g/∂z − I of a
    fixed-point problem is near −I. The rate is measured at each iteration, from ‖b − A x‖; an
    iteration that did not reduce it is undone. Within a Newton solve the rate is remembered, so
    that a cell known to contract slowly goes to the Krylov method at once.

    **Arguments:**

    - `krylov`: the Krylov method, `GMRES()` by default, with the tolerances and the preconditioner.
    - `rule`: when to switch; `ContractionRule()` by default.
    - `damping`: β.

    Reports what the Krylov method reports; in the stats `contraction`, the last measured rate, and
    `num_plain_steps`, the plain iterations of all solves.

    Storage: that of the Krylov method and 2 vectors. Work of a plain iteration: one matvec, one
    M⁻¹ application, one reduction.
    """

    krylov: AbstractKrylovSolver
    rule: AbstractSwitchingRule
    damping: ScalarLike

    is_flexible: ClassVar[bool] = True  # the Krylov method has checked its own

    def __init__(
        self,
        krylov: AbstractKrylovSolver | None = None,
        rule: AbstractSwitchingRule | None = None,
        damping: ScalarLike = 1.0,
    ):
        self.krylov = GMRES() if krylov is None else krylov
        self.rule = ContractionRule() if rule is None else rule
        self.damping = damping

    @property
    def rtol(self) -> ScalarLike:
        """Of the Krylov method."""
        return self.krylov.rtol

    @property
    def atol(self) -> ScalarLike:
        """Of the Krylov method."""
        return self.krylov.atol

    @property
    def preconditioner(self) -> AbstractPreconditioner:
        """Of the Krylov method."""
        return self.krylov.preconditioner

    @property
    def needs_symmetry(self) -> bool:
        return self.krylov.needs_symmetry

    @property
    def needs_transpose(self) -> bool:
        return self.krylov.needs_transpose

    def chosen(
        self, operator: Callable[[], lx.AbstractLinearOperator], y: Y, args: Args
    ) -> "SwitchingLinear":
        krylov = self.krylov.chosen(operator, y, args)
        return SwitchingLinear(krylov, self.rule, self.damping)

    def why(self, operator: Callable[[], lx.AbstractLinearOperator], y: Y, args: Args) -> str:
        return self.krylov.why(operator, y, args)

    def check_operator(self, operator: lx.AbstractLinearOperator) -> None:
        self.krylov.check_operator(operator)

    def for_derivatives(self) -> "SwitchingLinear":
        return SwitchingLinear(self.krylov.for_derivatives(), self.rule, self.damping)

    def workspace(self, vector: Vector, *, real: bool) -> SwitchingWorkspace:
        nothing = jnp.zeros((), tree.real_dtype(vector))
        none = jnp.zeros((), jnp.int32)
        return SwitchingWorkspace(self.krylov.workspace(vector, real=real), nothing, none)

    def report(self, workspace: SwitchingWorkspace) -> dict[str, Any]:
        return {
            **self.krylov.report(workspace.krylov),
            "contraction": workspace.rate,
            "num_plain_steps": workspace.num_plain_steps,
        }

    def solve(
        self,
        system: LinearSystem,
        vector: Vector,
        *,
        tolerance: ScalarLike,
        workspace: SwitchingWorkspace,
        norm: Scalar | None = None,
        guess: Vector | None = None,
        verify: bool = False,
    ) -> KrylovResult:
        norm = tree.norm2(vector) if norm is None else norm
        tolerance = jnp.asarray(tolerance).astype(norm.dtype)
        unit = jnp.where((norm > 0) & jnp.isfinite(norm), norm, jnp.ones_like(norm))
        b = tree.scale(1 / unit, vector)
        plain = self._plain(system, b, norm / unit, tolerance / unit, workspace.rate, guess, unit)
        asked = ~jnp.isposinf(tolerance) & ~(plain.size * unit <= tolerance)  # b with NaN is asked
        rest = self.krylov.solve(
            system,
            tree.scale(unit, plain.r),
            tolerance=jnp.where(asked, tolerance, jnp.inf),
            workspace=workspace.krylov,
            norm=plain.size * unit,
            verify=verify,
        )
        size = jnp.where(asked, rest.residual_norm, plain.size * unit)
        x = tree.add(tree.scale(unit, plain.x), rest.value)
        ran = plain.steps > 0
        rate = jnp.where(ran, plain.rate, workspace.rate)
        preconditioned = 0 if system.psolve is None else plain.steps
        matvecs = plain.steps + (0 if guess is None else tree.count(jnp.isfinite(tolerance)))
        return KrylovResult(
            value=x,
            residual_norm=size,
            # ⟨b, A x⟩ = ⟨b, b − r⟩ ≥ ‖b‖² − ‖b‖ ‖r‖
            descent=norm * jnp.maximum(norm - size, jnp.zeros_like(size)),
            result=lx.RESULTS.where(asked, rest.result, lx.RESULTS.successful),
            num_steps=rest.num_steps + plain.steps,
            num_matvecs=rest.num_matvecs + matvecs,
            num_transposed_matvecs=rest.num_transposed_matvecs,
            num_preconditioner_applications=rest.num_preconditioner_applications + preconditioned,
            num_restarts=rest.num_restarts,
            workspace=SwitchingWorkspace(
                rest.workspace, rate, workspace.num_plain_steps + plain.steps
            ),
        )

    def _plain(
        self,
        system: LinearSystem,
        b: Vector,
        size: Scalar,
        target: Scalar,
        rate: Scalar,
        guess: Vector | None,
        unit: Scalar,
    ) -> _Plain:
        """The plain iterations, for b of norm `size`, 0 or 1."""
        cost = self.rule.cost(system.mv, b)
        x, r = tree.zeros_like(b), b
        if guess is not None:
            useful = jnp.isfinite(target)
            x = tree.where(useful, tree.scale(1 / unit, guess), x)
            r = lax.cond(useful, lambda: tree.sub(b, system.mv(x)), lambda: b)
            size = jnp.where(useful, _norm(r), size)
        none = jnp.zeros_like(size, jnp.int32)
        minus_beta = -jnp.asarray(self.damping)
        going = (size > target) & jnp.isfinite(size) & ~self.rule(rate, target / size, cost)
        start = _Plain(x, r, size, rate, none, going)

        def body(carry: _Plain) -> _Plain:
            move = system.psolve(carry.r) if system.psolve else tree.scale(minus_beta, carry.r)
            x = tree.add(carry.x, move)
            r = tree.sub(b, system.mv(x))
            size = _norm(r)
            better = carry.going & (size < carry.size)
            rate = jnp.where(carry.going, size / carry.size, carry.rate)
            rate = jnp.where(jnp.isfinite(rate), rate, jnp.full_like(rate, jnp.inf))
            leave = self.rule(rate, target / size, cost)
            return _Plain(
                x=tree.where(better, x, carry.x),
                r=tree.where(better, r, carry.r),
                size=jnp.where(better, size, carry.size),
                rate=rate,
                steps=carry.steps + tree.count(carry.going),
                going=better & (size > target) & ~leave,
            )

        return lax.while_loop(lambda carry: any_lane(carry.going), body, start)


def _norm(r: Vector) -> Scalar:
    return jnp.sqrt(tree.vdot(r, r).real)


# A CPU core, roughly: seconds a multiplication, a byte of memory, a kernel; kernels of a plain and
# a Krylov iteration, and the rows of a basis that a Krylov iteration reads.
_SECONDS = {"multiplication": 4e-11, "byte": 5e-11, "kernel": 1e-6}
_KERNELS = (5, 40)
_ROWS = 40


def estimated_cost(mv: LinearFn, vector: Vector) -> float:
    """Work of a GMRES iteration in plain iterations, from what can be seen of both without running
    them. An estimate within a factor of two or so."""
    leaves = jax.tree_util.tree_leaves(vector)
    size = sum(x.size * x.dtype.itemsize for x in leaves) * _SECONDS["byte"]
    product = (
        _multiplications(jax.make_jaxpr(lambda v: mv(v))(vector).jaxpr) * _SECONDS["multiplication"]
    )
    plain = product + 6 * size + _KERNELS[0] * _SECONDS["kernel"]
    extra = _ROWS * size + (_KERNELS[1] - _KERNELS[0]) * _SECONDS["kernel"]
    return 1 + extra / plain


def _multiplications(jaxpr: Any) -> int:
    """Of the products of matrices and the convolutions; those of a loop count once."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += depth * eqn.outvars[0].aval.size
        elif name == "conv_general_dilated":
            kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
            channels = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += out.size * kernel.size // max(channels, 1)
        for value in jax.tree_util.tree_leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += _multiplications(inner)
    return total

"""Broyden's methods with limited memory."""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import equinox as eqx
import jax.numpy as jnp
from equinox import AbstractVar

from .. import tree
from ..history import PerLeaf
from ..krylov.base import AbstractKrylovSolver, check_tolerances
from ..krylov.gmres import GMRES
from ..linearise.policies import AbstractPolicy, Linearise
from ..loops import AbstractProgressMeter, NoProgressMeter
from ..newton.convergence import AbstractConvergenceTest, ResidualTest
from ..newton.report import StepReport
from ..newton.reuse import AbstractReuse, Relinearise
from ..newton.scaling.units import refusal
from ..typing import Count, Flag, Norm, Scalar, ScalarLike, Vector
from .base import AbstractIteration, Proposal, Trial
from .low_rank import AbstractForgetting, LowRankInverse, Restart, relative_size

#: Trials in a row that may be refused.
MAX_RETREATS = 10

_Solver = TypeVar("_Solver", bound="AbstractBroyden")


class BroydenMemory(NamedTuple):
    """The point that steps are taken from, and H."""

    point: Vector
    value: Vector  # F there
    applied: Vector  # H F there
    norm: Scalar  # ‖F‖₂ there; infinite before the first
    length: Scalar  # of the next step along −H F
    retreats: Count  # in a row
    inverse: LowRankInverse


class AbstractBroyden(AbstractIteration):
    """y ← y − λ H F(y), H ← H + (s − H d) wᵀ/(wᵀd) with s = Δy, d = ΔF.

    The secant equation H₊ d = s holds after each update. A trial whose ‖F‖₂ exceeds `growth` times
    that of the point it was tried from is not gone on from, but its pair is learnt: the next step
    is taken from the old point with the new H, at half the length. After ten of these in a row the
    trial is taken.
    """

    damping: AbstractVar[ScalarLike]
    rank: AbstractVar[int]
    forgetting: AbstractVar[AbstractForgetting]
    growth: AbstractVar[float]
    inverse: AbstractVar[LowRankInverse | None]

    reuse: ClassVar[AbstractReuse] = Relinearise()

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        if self.rank < 1:
            raise ValueError(f"`rank` must be at least 1, but it is {self.rank}.")
        if not self.growth >= 1:
            raise ValueError(f"`growth` must be at least 1, but it is {self.growth}.")

    @abc.abstractmethod
    def weight(
        self, inverse: LowRankInverse, s: Vector, d: Vector, hd: Vector
    ) -> tuple[Vector, Scalar, Flag]:
        """(w, wᵀd, whether that is well away from 0) for s of norm 1, d = ΔF/‖Δy‖ and H d."""

    def starting_from(self: _Solver, inverse: LowRankInverse | None) -> _Solver:
        """The same, with the inverse that another solve ended with (`stats["inverse"]`)."""
        return eqx.tree_at(lambda s: s.inverse, self, inverse, is_leaf=lambda x: x is None)

    def memory(self, variables: Vector) -> BroydenMemory:
        """H = −β I, or what was given."""
        inverse = self.inverse
        if inverse is None:
            inverse = LowRankInverse.allocate(variables, self.rank, self.damping)
        elif inverse.rank != self.rank or not inverse.fits(variables):
            raise ValueError(
                f"`inverse` has room for {inverse.rank} terms of {_told(inverse)}, but this solve "
                f"needs {self.rank} of {tree.structure(variables)}: it must come from "
                '`stats["inverse"]` of a solve of the same kind.'
            )
        dtype = tree.real_dtype(variables)
        inverse = eqx.tree_at(lambda h: h.damping, inverse, jnp.asarray(inverse.damping, dtype))
        # The first trial makes no pair, and takes no row.
        inverse = eqx.tree_at(lambda h: h.written, inverse, inverse.written - 1)
        nothing, one = tree.zeros_like(variables), jnp.ones((), dtype)
        none = jnp.zeros((), jnp.int32)
        return BroydenMemory(variables, nothing, nothing, jnp.inf * one, one, none, inverse)

    def propose(self, memory: BroydenMemory, trial: Trial, wanted: Flag) -> Proposal:
        """Learns the pair of the trial and goes on from there, or back to where it came from."""
        f = trial.linearisation.value
        norm = tree.norm2(f)
        is_first = ~jnp.isfinite(memory.norm)
        paired = wanted & ~is_first
        inverse, old = self.forgetting.room(memory.inverse, memory.value, memory.applied, paired)
        slot = self.forgetting.slot(inverse)
        inverse, old = inverse.forgetting(slot, memory.value, old, paired)
        new = inverse.mv(f)  # H f

        # The update, with the pair scaled to ‖s‖ = 1.
        s = tree.sub(trial.point, memory.point)
        length = tree.norm2(s)
        unit = 1 / jnp.where(length > 0, length, jnp.ones_like(length))
        s = tree.scale(unit, s)
        d = tree.scale(unit, tree.sub(f, memory.value))
        hd = tree.scale(unit, tree.sub(new, old))
        w, product, sound = self.weight(inverse, s, d, hd)
        u = tree.sub(s, hd)
        learnt = paired & sound & (length > 0) & jnp.isfinite(tree.max_norm(u))
        scale = 1 / jnp.where(learnt, product, jnp.ones_like(product))
        v = tree.scale(jnp.where(learnt, scale, 0 * scale), tree.where(learnt, w, s))
        u = tree.where(learnt, u, tree.zeros_like(u))

        # From the trial, or from where it was tried.
        retreat = (norm > self.growth * memory.norm) & (memory.retreats < MAX_RETREATS)
        value = tree.where(retreat, memory.value, f)
        applied = tree.where(retreat, old, new)
        applied = tree.axpy(tree.vdot(v, value).real, u, applied)  # H₊ f
        point = tree.where(retreat, memory.point, trial.point)
        one = jnp.ones_like(norm)
        step_length = jnp.where(retreat, 0.5 * memory.length, one)
        inverse = inverse.learning(slot, u, v, learnt)
        after = BroydenMemory(
            point=point,
            value=value,
            applied=applied,
            norm=jnp.where(retreat, memory.norm, norm),
            length=step_length,
            retreats=jnp.where(retreat, memory.retreats + 1, 0),
            inverse=inverse,
        )
        held, rest = after._replace(inverse=None), memory._replace(inverse=None)
        inverse = eqx.tree_at(lambda h: h.written, inverse, inverse.written + 1)
        memory = tree.where(wanted, held, rest)._replace(inverse=inverse)
        step = tree.axpy(-step_length, applied, point)
        return Proposal(step, memory, refused=wanted & retreat)

    def report(self, memory: BroydenMemory) -> dict[str, Any]:
        """The approximate inverse at the end."""
        return {"inverse": memory.inverse}


class Broyden(AbstractBroyden):
    """Broyden's first ("good") method, with limited memory.

    H ← H + (s − H d) (Hᵀs)ᵀ/(sᵀH d), s = Δy, d = ΔF: of all J₊ with J₊ s = d, the nearest in the
    Frobenius norm to J = H⁻¹. One evaluation a step and no linearisation; superlinear near a root,
    and on n linear equations exact after 2n steps.

    **Arguments:**

    - `rtol`, `atol`: success is ‖F‖ ≤ atol + rtol ‖F₀‖ at the returned point.
    - `damping`: β of H₀ = −β I. The default suits F = g(y) − y; for another residual β ∂F/∂y must
      be about −I in size and sign.
    - `rank`: most terms of H + β I.
    - `forgetting`: what happens when there are so many: `nks.Restart()`, `nks.DropOldest()` or
      `nks.RankReduction()`.
    - `growth`: a trial with ‖F‖₂ over so many times that of the last point is not gone on from;
      infinite to go on from all.
    - `inverse`: H₀ in place of −β I, as a solve before left it in `stats["inverse"]`; see
      `starting_from`.
    - `norm`: the norm of the residual test; the 2-norm by default.
    - `convergence`: the residual test and when to give up; without a bound on ‖F‖, which `growth`
      looks after.
    - `linear_solver`: for derivatives.
    - `policy`: what a linearisation stores, for derivatives.
    - `history_length`, `progress_meter`, `verbose`: as for `nks.NewtonKrylov`.

    `stats["inverse"]` is H at the end, with `mv` and `transpose_mv`. A pair whose |sᵀH d| is below
    √ε ‖s‖ ‖H d‖ is not learnt.

    Storage: 2·rank + 5 vectors (H; y, F and H F at the last point; the proposed and the best
    point). Work of a step: one evaluation, four passes over `rank` vectors, five reductions.

    Source: Broyden, Math. Comp. 19, 1965; finite termination: Gay, SIAM J. Numer. Anal. 16, 1979;
    Kelley, Iterative Methods for Linear and Nonlinear Equations, SIAM 1995, chapter 7.
    """

    rtol: ScalarLike
    atol: ScalarLike
    damping: ScalarLike = 1.0
    rank: int = eqx.field(static=True, default=20)
    forgetting: AbstractForgetting = Restart()
    growth: float = eqx.field(static=True, default=2.0)
    inverse: LowRankInverse | None = None
    norm: Norm = tree.norm2
    convergence: AbstractConvergenceTest = ResidualTest(divergence=math.inf)
    linear_solver: AbstractKrylovSolver = GMRES()
    policy: AbstractPolicy = Linearise()
    history_length: int | PerLeaf = eqx.field(static=True, default=0)
    progress_meter: AbstractProgressMeter = NoProgressMeter()
    verbose: bool | Callable[[StepReport], None] = eqx.field(static=True, default=False)

    def weight(
        self, inverse: LowRankInverse, s: Vector, d: Vector, hd: Vector
    ) -> tuple[Vector, Scalar, Flag]:
        """Hᵀs."""
        product = tree.vdot(s, hd).real
        return inverse.adjoint_mv(s), product, relative_size(product, tree.norm2(hd))


class BadBroyden(AbstractBroyden):
    """Broyden's second ("bad") method, with limited memory.

    H ← H + (s − H d) dᵀ/(dᵀd), s = Δy, d = ΔF: of all H₊ with H₊ d = s, the nearest to H in the
    Frobenius norm. Half the passes of `nks.Broyden`, and no denominator that may vanish; often as
    many evaluations for maps that nearly contract, and more far from a root.

    **Arguments:** those of `nks.Broyden`.

    `stats["inverse"]` is H at the end, with `mv` and `transpose_mv`.

    Storage: 2·rank + 5 vectors. Work of a step: one evaluation, two passes over `rank` vectors,
    five reductions.

    Source: Broyden, Math. Comp. 19, 1965, method 2.
    """

    rtol: ScalarLike
    atol: ScalarLike
    damping: ScalarLike = 1.0
    rank: int = eqx.field(static=True, default=20)
    forgetting: AbstractForgetting = Restart()
    growth: float = eqx.field(static=True, default=2.0)
    inverse: LowRankInverse | None = None
    norm: Norm = tree.norm2
    convergence: AbstractConvergenceTest = ResidualTest(divergence=math.inf)
    linear_solver: AbstractKrylovSolver = GMRES()
    policy: AbstractPolicy = Linearise()
    history_length: int | PerLeaf = eqx.field(static=True, default=0)
    progress_meter: AbstractProgressMeter = NoProgressMeter()
    verbose: bool | Callable[[StepReport], None] = eqx.field(static=True, default=False)

    def weight(
        self, inverse: LowRankInverse, s: Vector, d: Vector, hd: Vector
    ) -> tuple[Vector, Scalar, Flag]:
        """d."""
        product = tree.vdot(d, d).real
        return d, product, product > 0


def _told(inverse: LowRankInverse) -> str:
    return str(tree.structure(inverse.left.row(jnp.zeros((), jnp.int32))))


@refusal.register
def _(part: AbstractBroyden, congruent: bool) -> str | None:
    if part.inverse is None:
        return None
    return "its `inverse` is that of a solve in the units of the problem."

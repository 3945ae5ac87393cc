"""Nonlinear GMRES."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .. import tree
from ..history import PerLeaf
from ..krylov.base import AbstractKrylovSolver, check_tolerances
from ..krylov.gmres import GMRES
from ..linearise.policies import AbstractPolicy, Linearise
from ..loops import AbstractProgressMeter, NoProgressMeter, any_lane
from ..newton.convergence import AbstractConvergenceTest, ResidualTest
from ..newton.report import StepReport
from ..newton.reuse import AbstractReuse, Relinearise
from ..typing import Count, Flag, Norm, Scalar, ScalarLike, Vector
from .base import AbstractIteration, Beside, Proposal, Trial, Work
from .qr_window import AbstractColumnFilter, ConditionFilter, Window


class NGMRESMemory(NamedTuple):
    """The points selected, the newest x with F(x), and the candidate x^M with F(x^M)."""

    window: Window
    products: Float[Array, "m m"]  # ⟨Δxᵢ, Δxⱼ⟩, from the newest on
    point: Vector
    residual: Vector
    candidate: Vector
    candidate_residual: Vector
    candidate_norm: Scalar
    least: Scalar  # the least ‖F‖₂ of all points, candidates included
    moved: Scalar  # ‖x^A − x^M‖
    nearest: Scalar  # the least ‖x^A − xᵢ‖
    stalled: Count  # steps in a row that called for a restart
    restarts: Count
    points: Count


class NGMRES(AbstractIteration):
    """Nonlinear GMRES: a plain step to a candidate x^M, mixed with the points before it.

    x^M = x + β F(x), and x^A = x^M + Σ αᵢ (xᵢ − x^M) for the α that makes
    ‖F(x^M) + Σ αᵢ (F(xᵢ) − F(x^M))‖₂ least. x^A is taken if its residual is below γ_A times the
    least one so far and it is not too near to an old point, else x^M. Two evaluations a step, where
    `nks.Anderson` needs one: it pays where mixed points are often bad ones, since the candidate is
    there to go on from.

    **Arguments:**

    - `rtol`, `atol`: success is ‖F‖ ≤ atol + rtol ‖F₀‖ at the returned point.
    - `depth`: the most points kept, m.
    - `damping`: β; β ∂F/∂y should be near −I, as in `nks.Picard`.
    - `gamma_a`, `epsilon_b`, `delta_b`: x^A is taken if ‖F^A‖ < γ_A ‖F‖_min and if
      ε_B ‖x^A − x^M‖ < min ‖x^A − xᵢ‖ or ‖F^A‖ < δ_B ‖F‖_min.
    - `gamma_c`, `restart_after`: the points are forgotten after so many steps in a row with
      ‖F^A‖ > γ_C ‖F‖_min or without the second of the conditions above.
    - `filter`: which differences take part: `ConditionFilter()` or `AngleFilter()`.
    - `norm`, `convergence`, `linear_solver`, `policy`, `history_length`, `progress_meter`,
      `verbose`: as for `nks.Anderson`.

    The residual test is made at the x^A, which are what `history` shows; an x^M may be the point
    that a failure returns. `stats["num_restarts"]` counts the restarts.

    Storage: 2 m + 6 vectors. Work of a step: two evaluations, eight passes over the differences of
    residuals, three over those of points.

    Source: Washio & Oosterlee, Electron. Trans. Numer. Anal. 6, 1997; Brune, Knepley, Smith & Tu,
    SIAM Rev. 57, 2015, whose constants are the defaults here.
    """

    rtol: ScalarLike
    atol: ScalarLike
    depth: int = eqx.field(static=True, default=30)
    damping: ScalarLike = 1.0
    gamma_a: float = eqx.field(static=True, default=2.0)
    gamma_c: float = eqx.field(static=True, default=2.0)
    epsilon_b: float = eqx.field(static=True, default=0.1)
    delta_b: float = eqx.field(static=True, default=0.9)
    restart_after: int = eqx.field(static=True, default=2)
    filter: AbstractColumnFilter = ConditionFilter()
    norm: Norm = tree.norm2
    convergence: AbstractConvergenceTest = ResidualTest()
    linear_solver: AbstractKrylovSolver = GMRES()
    policy: AbstractPolicy = Linearise()
    history_length: int | PerLeaf = eqx.field(static=True, default=0)
    progress_meter: AbstractProgressMeter = NoProgressMeter()
    verbose: bool | Callable[[StepReport], None] = eqx.field(static=True, default=False)

    reuse: ClassVar[AbstractReuse] = Relinearise()

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        if self.depth < 1 or self.restart_after < 1:
            raise ValueError(
                "`depth` and `restart_after` must be at least 1, but they are "
                f"{self.depth} and {self.restart_after}."
            )
        if not (self.gamma_a > 0 and self.gamma_c > 0 and 0 < self.epsilon_b < 1):
            raise ValueError("`gamma_a` and `gamma_c` are positive, `epsilon_b` is in (0, 1).")
        if not 0 < self.delta_b < 1:
            raise ValueError(f"`delta_b` must be between 0 and 1, but it is {self.delta_b}.")
        if not isinstance(self.filter, AbstractColumnFilter):
            raise TypeError(f"`filter` must be a column filter, but it is {self.filter!r}.")

    def memory(self, variables: Vector) -> PyTree:
        """No points."""
        zero, none = tree.zeros_like(variables), jnp.zeros((), jnp.int32)
        dtype = tree.real_dtype(variables)
        infinite = jnp.full((), jnp.inf, dtype)
        window = Window.allocate(variables, self.depth)
        products = jnp.zeros((self.depth, self.depth), dtype)
        return NGMRESMemory(
            window, products, zero, zero, zero, zero, infinite, infinite, infinite, infinite,
            none, none, none,
        )  # fmt: skip

    def propose(self, memory: PyTree, trial: Trial, wanted: Flag) -> Proposal:
        """Selects x^A, the trial, or x^M, and mixes the next x^A."""
        old, accepted = memory, trial.accepted
        (x, f, norm), stalled = self._selected(old, trial)
        restart = stalled >= self.restart_after
        dx, df = tree.sub(x, old.point), tree.sub(f, old.residual)
        usable = accepted & (old.points > 0) & ~restart
        window = old.window.emptied(restart)
        window, _ = window.append(df, dx, f, usable, self.filter)
        products = _shifted(old.products, window.products(tree.where(usable, dx, tree.sub(x, x))))

        candidate = tree.axpy(self.damping, f, x)
        shown = lambda lin: Beside(candidate, lin.value, lin.aux)
        beside = lax.cond(
            any_lane(wanted),
            lambda: shown(trial.linearise(candidate)),
            lambda: shown(trial.linearisation),
        )
        value, value_norm = beside.value, tree.norm2(beside.value)
        finite = jnp.isfinite(value_norm)
        value = tree.where(finite, value, f)
        step, change = tree.sub(candidate, x), tree.sub(value, f)
        _, factor = window.append(change, step, value, finite, self.filter)
        gamma = factor.solution
        older = jnp.concatenate([gamma[1:], jnp.zeros_like(gamma[:1])])
        away = tree.axpy(gamma[0], step, window.combine(older, step))
        mixed = tree.where(finite, tree.sub(candidate, away), candidate)

        first = old.points == 0
        new = NGMRESMemory(
            window=window,
            products=products,
            point=x,
            residual=f,
            candidate=candidate,
            candidate_residual=value,
            candidate_norm=jnp.where(finite, value_norm, jnp.inf),
            least=jnp.fmin(jnp.fmin(old.least, norm), value_norm),
            moved=tree.norm2(away),
            nearest=_nearest(window, products, tree.sub(mixed, x)),
            stalled=jnp.where(restart | first, 0, stalled).astype(jnp.int32),
            restarts=old.restarts + tree.count(restart & wanted),
            points=old.points + tree.count(accepted),
        )
        # A refused trial leaves everything but the ring, where it took an empty place.
        ring = (new.window, new.products)
        new = tree.where(accepted, new._replace(window=None, products=None),
                         old._replace(window=None, products=None))  # fmt: skip
        new = new._replace(window=ring[0], products=ring[1])
        return Proposal(mixed, new, Work(num_fn_evals=1), beside=beside)

    def report(self, memory: PyTree) -> dict[str, Any]:
        """How often the points were forgotten."""
        return {"num_restarts": memory.restarts}

    def _selected(
        self, old: NGMRESMemory, trial: Trial
    ) -> tuple[tuple[Vector, Vector, Scalar], Count]:
        """x, F(x) and its norm; and how many steps in a row have called for a restart."""
        residual, accepted = trial.linearisation.value, trial.accepted
        norm = tree.norm2(residual)
        first = old.points == 0
        near = (self.epsilon_b * old.moved >= old.nearest) & ~(norm < self.delta_b * old.least)
        mixed = (norm < self.gamma_a * old.least) & ~near
        mixed = first | mixed | ~jnp.isfinite(old.candidate_norm)
        poor = (near | (norm > self.gamma_c * old.least)) & ~first
        taken = tree.where(
            mixed,
            (trial.point, residual, norm),
            (old.candidate, old.candidate_residual, old.candidate_norm),
        )
        x, f = tree.where(accepted, taken[:2], (old.point, old.residual))
        return (x, f, taken[2]), jnp.where(accepted & poor, old.stalled + 1, 0)


def _shifted(products: Float[Array, "m m"], newest: Float[Array, " m"]) -> Float[Array, "m m"]:
    """The products with a new first column, the last one gone."""
    m = newest.size
    rest = jnp.concatenate([newest[None, 1:], products[: m - 1, : m - 1]])
    return jnp.concatenate([newest[:, None], rest], axis=1)


def _nearest(window: Window, products: Float[Array, "m m"], away: Vector) -> Scalar:
    """The least ‖x + away − xᵢ‖, x = x₀ included: xᵢ = x − Δx₁ − … − Δxᵢ, by inner products."""
    upto = jnp.tril(jnp.ones_like(products))
    square = tree.vdot(away, away).real.astype(products.dtype)
    along = upto @ window.products(away)
    between = jnp.sum((upto @ products) * upto, axis=1)
    squares = jnp.where(window.used, square + 2 * along + between, jnp.inf)
    return jnp.sqrt(jnp.maximum(jnp.minimum(square, jnp.min(squares)), 0))

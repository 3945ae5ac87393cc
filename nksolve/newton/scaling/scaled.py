"""A root finder in units of typical sizes of the unknowns and the residual."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import PyTree

from ...linearise.tags import holomorphic_tag
from ...typing import Args, Aux, Flag, Fn, Y
from ..base import AbstractRootFinder, AbstractWrapper
from .sizes import (
    AbstractResidualSizes,
    AbstractSizes,
    Congruent,
    EntrySizes,
    RowSizes,
    Start,
    as_sizes,
)
from .units import ScaledResidual, Scaling, refusal, solver_in_units


class ScaledState(NamedTuple):
    """The state of the solver, and the sizes."""

    inner: PyTree
    scaling: Scaling


class Scaled(AbstractWrapper):
    """Solves F̂(û) = S_F⁻¹ F(S_u û) = 0 by any of nksolve's root finders, and returns u = S_u û.

    S_u and S_F are diagonals of typical sizes of the unknowns and of the equations (KINSOL's D_u
    and D_F are their inverses). Everything inside the solver is of scaled quantities: the norm of
    the residual test with `rtol` and `atol`, forcing terms, line searches, trust radii, Krylov
    inner products, least-squares problems, the increments of `nks.FiniteDifference`. F and J are
    evaluated at u, as often as without scaling, and every residual norm in `stats`, the history
    and printed reports is one of S_F⁻¹ F.

    Success is ‖S_F⁻¹ F‖ ≤ atol + rtol ‖S_F⁻¹ F₀‖ at the returned point.

    **Arguments:**

    - `solver`: `nks.NewtonKrylov(...)`, or another. What it holds in the units of the problem keeps
      them: a preconditioner sees the J, y and args that the user knows (those that know J by its
      products alone are made of the scaled J), a mass matrix is that of u.
    - `variables`: S_u. A number, or a PyTree that is a prefix of y, whose arrays broadcast to the
      leaves of y: *typical sizes*, 3e4 for an unknown of some 30,000. Or what finds them at the
      initial point: `nks.EntrySizes()`, the default, or `nks.LeafSizes()`.
    - `residual`: S_F in the same way, or `nks.RowSizes()`, the default, `nks.Similar()`,
      `nks.Congruent()`.

    S_u, and S_F where it is found from data, are rounded to powers of two: scaling with those makes
    no rounding error, and S_u = S_F = 1 is the solver as it stands. Sizes are found once, at the
    initial point, and stand in `stats["scaling"]`.

    The adjoint is at fn as the user wrote it, with its own tolerances in the units of the problem.
    What a solver leaves for later solves (a recycled Krylov space, an approximate inverse) is in
    scaled units and is not handed on.

    Raises `TypeError` or `ValueError` for sizes that are not positive or do not fit, and for what
    cannot be scaled: `nks.Recorded` (record the scaled solver instead), `nks.Deflated` (solve
    `nks.deflate(fn, roots)`), solvers with residuals of their own (`nks.FAS`), and `nks.CG` or
    `nks.MINRES` unless S_F = S_u⁻¹.

    Storage: 2 vectors (S_u, S_F). Work: none beyond the solver's with given sizes; else one
    evaluation of `fn` at the start, with `nks.RowSizes` its probes too (in `num_probes`).

    Source: Brown & Saad, SIAM J. Sci. Stat. Comput. 11(3), 1990, §5; Hindmarsh et al., ACM Trans.
    Math. Softw. 31(3), 2005 (KINSOL).
    """

    solver: AbstractRootFinder
    variables: AbstractSizes = eqx.field(default=EntrySizes(), converter=as_sizes)  # pyright: ignore
    residual: AbstractResidualSizes = eqx.field(default=RowSizes(), converter=as_sizes)

    def __check_init__(self):
        if not isinstance(self.solver, AbstractRootFinder):
            raise TypeError(
                f"`Scaled` wraps nksolve's root finders, such as `nks.NewtonKrylov`, but got "
                f"{self.solver!r}."
            )
        if not isinstance(self.variables, AbstractSizes):
            raise TypeError(
                f"`Scaled(variables=...)`: {type(self.variables).__name__} finds sizes of a "
                "residual only. Give sizes, or `nks.EntrySizes()` or `nks.LeafSizes()`."
            )
        _check_parts(self.solver, isinstance(self.residual, Congruent))

    def init(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: frozenset[object],
    ) -> ScaledState:
        if options:
            raise ValueError(f"`Scaled` takes no options, but got {sorted(options)}.")
        variables = eqx.filter(y, eqx.is_inexact_array)
        unknowns = self.variables.of_unknowns(variables)
        ones = jtu.tree_map(lambda x: jnp.ones(x.shape, jnp.finfo(x.dtype).dtype), f_struct)
        scaling = Scaling(unknowns, ones)
        start = None
        if self.residual.needs_linearisation:
            residual = ScaledResidual(fn, args, scaling, self.policy, tags)
            start = residual.linearise(scaling.scaled(y), frozenset())
        sizes = self.residual.of_residual(Start(unknowns, f_struct, start))
        scaling = Scaling(unknowns, sizes).checked()
        solver, residual, kept = self._at(fn, args, scaling, tags)
        scaled = scaling.scaled(y)
        inner = solver.init(residual, scaled, args, options, f_struct, aux_struct, kept)
        return ScaledState(inner, scaling)

    def step(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: ScaledState,
        tags: frozenset[object],
    ) -> tuple[Y, ScaledState, Aux]:
        """A step of the solver from û."""
        scaling = state.scaling
        solver, residual, kept = self._at(fn, args, scaling, tags)
        scaled = scaling.scaled(y)
        scaled, inner, aux = solver.step(residual, scaled, args, options, state.inner, kept)
        return scaling.plain(scaled), ScaledState(inner, scaling), aux

    def terminate(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: ScaledState,
        tags: frozenset[object],
    ) -> tuple[Flag, optx.RESULTS]:
        solver, residual, kept = self._at(fn, args, state.scaling, tags)
        scaled = state.scaling.scaled(y)
        return solver.terminate(residual, scaled, args, options, state.inner, kept)

    def postprocess(
        self,
        fn: Fn,
        y: Y,
        aux: Aux,
        args: Args,
        options: dict[str, Any],
        state: ScaledState,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        solver, residual, kept = self._at(fn, args, state.scaling, tags)
        scaled = state.scaling.scaled(y)
        scaled, aux, stats = solver.postprocess(
            residual, scaled, aux, args, options, state.inner, kept, result
        )
        return state.scaling.plain(scaled), aux, self._reported(stats, state.scaling)

    def _at(
        self, fn: Fn, args: Args, scaling: Scaling, tags: frozenset[object]
    ) -> tuple[AbstractRootFinder, ScaledResidual, frozenset[object]]:
        """The solver and the residual in scaled units, and what is promised of the scaled J."""
        residual = ScaledResidual(fn, args, scaling, self.policy, tags)
        congruent = isinstance(self.residual, Congruent)
        kept = tags - {lx.unit_diagonal_tag} if congruent else tags & {holomorphic_tag}
        return solver_in_units(self.solver, scaling), residual, kept

    def _reported(self, stats: dict[str, Any], scaling: Scaling) -> dict[str, Any]:
        stats = {k: v for k, v in stats.items() if k not in ("recycled", "inverse")}
        stats["scaling"] = scaling
        if not self.residual.needs_linearisation:
            return stats
        probes = self.residual.num_probes
        stats["num_linearisations"] += 1
        stats["num_probes"] += probes
        stats["num_fn_evals"] += 1 + self.policy.evals_per_matvec * probes
        return stats


def _check_parts(solver: AbstractRootFinder, congruent: bool) -> None:
    """Refuses what cannot be scaled."""
    parts = jtu.tree_leaves(solver, is_leaf=lambda part: refusal(part, congruent) is not None)
    for part in parts:
        if why := refusal(part, congruent):
            raise ValueError(f"`Scaled` does not go with `{type(part).__name__}`: {why}")


@refusal.register
def _(part: Scaled, congruent: bool) -> str:
    return "that would scale twice."

"""Adjoints without a linear solve: one step, or a few terms of a Neumann series."""

from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx

from .. import tree
from ..krylov.system import KrylovState
from ..newton.reuse import AbstractReuse
from ..precondition.base import AbstractPreconditioner
from ..typing import Args, ScalarLike, Vector, Y
from .base import AbstractImplicitAdjoint, AbstractImplicitSolve, stop_gradient
from .report import Receiver, tell_approximation
from .splitting import (
    NegativeIdentity,
    check_count,
    check_preconditioner,
    resolved_preconditioner,
    split_state,
)


class OneStep(AbstractImplicitAdjoint):
    """The Jacobian-free adjoint: J⁻¹b ≈ M⁻¹b, by default −b.

    With M⁻¹ = −I the gradient is that of one more step z ← g(z*, θ) with z* held fixed: no product
    with J at all, whatever it costs. Its error is that of taking J⁻¹ for −I,
    ‖J⁻¹b + b‖ ≤ ‖∂g/∂z‖ ‖b‖ / (1 − ‖∂g/∂z‖) where the norm is below 1: a good gradient only of a
    strongly contracting cell, a descent direction under the conditions of the paper.

    **Arguments:**

    - `preconditioner`: M⁻¹: `nks.NegativeIdentity()` for problems posed as fn(y) − y, as
      `nks.fixed_point` does; `nks.ForwardPreconditioner()` for that of the forward solver, or any
      linear preconditioner.
    - `reuse`: as for `nks.KrylovAdjoint`.
    - `report`: as for `nks.KrylovAdjoint`, with an estimate of the error ‖x − J⁻¹b‖.
    - `estimate_steps`: matvecs that a report spends on this estimate, beside one for the residual.

    Storage: 1 vector. Work: one application of M⁻¹, no matvec.

    Source: Fung, Heaton, Li, McKenzie, Osher & Yin, *JFB: Jacobian-free backpropagation for
    implicit networks*, AAAI 2022.
    """

    preconditioner: AbstractPreconditioner = NegativeIdentity()
    reuse: AbstractReuse | None = None
    report: Receiver = eqx.field(static=True, default=None)
    estimate_steps: int = eqx.field(static=True, default=20)

    def __check_init__(self):
        check_preconditioner(self.preconditioner, "OneStep")
        check_count(self.estimate_steps, 1, "OneStep(estimate_steps)")

    def resolved(
        self, solver: Any, args: Args, tags: frozenset[object], *, throw: bool
    ) -> "NeumannSolve":
        del throw
        preconditioner = resolved_preconditioner(self.preconditioner, solver, "OneStep")
        solve = NeumannSolve(
            preconditioner=preconditioner,
            damping=1.0,
            args=args,
            num_terms=1,
            tags=tags,
            report=self.report,
            estimate_steps=self.estimate_steps,
        )
        return stop_gradient(solve)


class Neumann(AbstractImplicitAdjoint):
    """The phantom gradient: k terms of the damped Neumann series for J⁻¹b.

        x₁ = λ M⁻¹b,   x_{i+1} = x_i + λ M⁻¹(b − J x_i),   J⁻¹b ≈ x_k

    With M⁻¹ = −I this is the gradient through k damped steps z ← (1 − λ) z + λ g(z, θ) from the
    root. Its error falls by the spectral radius of I − λM⁻¹J a term in the long run (for λ = 1 and
    M⁻¹ = −I by that of ∂g/∂z), and grows where that exceeds 1: ρ = 0.99 takes 230 terms for one
    digit. Linear in b, and its transpose is the same series with Jᵀ.

    **Arguments:**

    - `num_terms`: k; 1 with `damping` = 1 is `nks.OneStep`.
    - `damping`: λ > 0. Below 1 it makes a series converge whose ∂g/∂z has eigenvalues below −1.
    - the rest: as for `nks.OneStep`.

    Storage: 2 vectors. Work: k − 1 matvecs (the first term needs none), k applications of M⁻¹.

    Source: Geng, Zhang, Bai, Wang & Lin, *On training implicit models*, NeurIPS 2021.
    """

    num_terms: int = eqx.field(static=True)
    damping: ScalarLike = 1.0
    preconditioner: AbstractPreconditioner = NegativeIdentity()
    reuse: AbstractReuse | None = None
    report: Receiver = eqx.field(static=True, default=None)
    estimate_steps: int = eqx.field(static=True, default=20)

    def __check_init__(self):
        check_count(self.num_terms, 1, "Neumann(num_terms)")
        if isinstance(self.damping, (int, float)) and not self.damping > 0:
            raise ValueError(f"`Neumann(damping)` must be positive, but it is {self.damping}.")
        check_preconditioner(self.preconditioner, "Neumann")
        check_count(self.estimate_steps, 1, "Neumann(estimate_steps)")

    def resolved(
        self, solver: Any, args: Args, tags: frozenset[object], *, throw: bool
    ) -> "NeumannSolve":
        del throw
        preconditioner = resolved_preconditioner(self.preconditioner, solver, "Neumann")
        solve = NeumannSolve(
            preconditioner=preconditioner,
            damping=self.damping,
            args=args,
            num_terms=self.num_terms,
            tags=tags,
            report=self.report,
            estimate_steps=self.estimate_steps,
        )
        return stop_gradient(solve)


class NeumannSolve(AbstractImplicitSolve):
    """The sum of `num_terms` terms."""

    preconditioner: AbstractPreconditioner
    damping: ScalarLike
    args: Args
    num_terms: int = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True)
    report: Receiver = eqx.field(static=True)
    estimate_steps: int = eqx.field(static=True)

    def prepare(self, operator: lx.AbstractLinearOperator, y: Y, *, real: bool) -> KrylovState:
        del real
        return split_state(self.preconditioner, operator, y, self.args)

    def run(self, prepared: KrylovState, b: Vector, *, real: bool, transposed: bool) -> Vector:
        mv, psolve = prepared.operator.mv, prepared.preconditioner.mv
        damping = jnp.asarray(self.damping)

        def term(_, x):
            return tree.axpy(damping, psolve(tree.sub(b, mv(x))), x)

        x = tree.scale(damping, psolve(b))
        if self.num_terms > 1:
            x = lax.fori_loop(1, self.num_terms, term, x)
        tell_approximation(
            self.report,
            prepared,
            b,
            x,
            estimate_steps=self.estimate_steps,
            num_matvecs=self.num_terms - 1,
            real=real,
            transposed=transposed,
        )
        return x

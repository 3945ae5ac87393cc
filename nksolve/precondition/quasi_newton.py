"""A preconditioner kept up to date by secant updates between Newton steps."""

from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Inexact

from .. import tree
from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..typing import Args, Count, Vector, Y
from .base import AbstractPreconditioner, Identity
from .composite import OperatorMap
from .nystrom import check_one_field


class QuasiNewton(AbstractPreconditioner):
    """P_{k+1}⁻¹ = P_k⁻¹ − (P_k⁻¹y − s) sᴴP_k⁻¹ / (sᴴP_k⁻¹y): Broyden's update of an approximate
    inverse, with s = y_{k+1} − y_k and the exact y = J_{k+1}s.

    P₀⁻¹ is made at the first linearisation and not again until `memory` updates were made; then
    it is made anew and the updates are dropped. For a preconditioner that is dear to make and a
    Jacobian that changes little, or along few directions. A pair with |sᴴP_k⁻¹y| below a
    thousandth of ‖s‖‖P_k⁻¹y‖ leaves P_k⁻¹ as it is. In the adjoint it is P₀⁻¹, made at the root.

    **Arguments:**

    - `preconditioner`: P₀⁻¹; linear.
    - `memory`: updates before a restart.

    Storage: 2·memory + 1 vectors and the state of P₀⁻¹, carried by the Newton loop. Work: at each
    linearisation one matvec (`num_probes`; at a restart those of P₀⁻¹) and one application; for
    each application one of P₀⁻¹ and, for each update, a dot product and an axpy.

    Source: Bergamaschi, Bru, Martínez & Putti, ETNA 23, 2006, equation 2.2.
    """

    preconditioner: AbstractPreconditioner = Identity()
    memory: int = eqx.field(static=True, default=5)

    def __check_init__(self):
        if self.memory < 1:
            raise ValueError(f"`QuasiNewton(memory)` must be at least 1, but it is {self.memory}.")
        if self.preconditioner.is_variable:
            raise ValueError(
                "`QuasiNewton(preconditioner)` needs a linear one: `nks.InnerKrylov` is not."
            )

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> "QuasiNewtonState":
        structure = operator.in_structure()
        check_one_field(structure)
        rows = jax.tree.map(lambda x: jnp.zeros((self.memory, *x.shape), x.dtype), structure)
        none = jnp.zeros((), jnp.int32)
        scalars = jnp.zeros(self.memory, tree.scalar_dtype(structure))
        return QuasiNewtonState(
            base=self.preconditioner.init(operator, y, args),
            point=_point(y, structure),
            steps=rows,
            corrections=rows,
            coefficients=scalars,
            count=none,
            structures=tree.freeze((structure, operator.out_structure())),
        )

    def update(
        self, state: "QuasiNewtonState", operator: lx.AbstractLinearOperator, y: Y, args: Args
    ) -> "QuasiNewtonState":
        static = eqx.partition(state, eqx.is_array)[1]
        restarted = lambda: eqx.filter(self.init(operator, y, args), eqx.is_array)
        updated = lambda: eqx.filter(self._updated(state, operator, y), eqx.is_array)
        new = lax.cond(state.count >= self.memory, restarted, updated)
        return eqx.combine(new, static)

    def _updated(
        self, state: "QuasiNewtonState", operator: lx.AbstractLinearOperator, y: Y
    ) -> "QuasiNewtonState":
        point = _point(y, operator.in_structure())
        s = tree.sub(point, state.point)
        norm = tree.norm2(s)
        s = tree.scale(1 / jnp.where(norm > 0, norm, jnp.ones_like(norm)), s)
        z = self.as_operator(state).mv(operator.mv(s))  # P_k⁻¹ y
        product = tree.vdot(s, z)
        sound = (jnp.abs(product) > 1e-3 * tree.norm2(z)) & (norm > 0)
        sound = sound & jnp.isfinite(tree.norm2(z))
        ones = jnp.ones_like(product)
        coefficient = jnp.where(sound, 1 / jnp.where(sound, product, ones), 0 * ones)
        correction = tree.where(sound, tree.sub(z, s), tree.zeros_like(z))
        i = state.count
        set_row = lambda rows, row: lax.dynamic_update_index_in_dim(rows, row, i, 0)
        return QuasiNewtonState(
            base=state.base,
            point=point,
            steps=jax.tree.map(set_row, state.steps, s),
            corrections=jax.tree.map(set_row, state.corrections, correction),
            coefficients=set_row(state.coefficients, coefficient.astype(state.coefficients.dtype)),
            count=i + 1,
            structures=state.structures,
        )

    def as_operator(self, state: "QuasiNewtonState") -> lx.AbstractLinearOperator:
        base = OperatorMap(self.preconditioner.as_operator(state.base))
        in_structure, out_structure = tree.thaw(state.structures)
        updated = _Updated(base, state.steps, state.corrections, state.coefficients)
        return JacobianOperator(updated, out_structure, in_structure)

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        return self.preconditioner.num_probes(operator, y, args)

    def num_update_probes(
        self, state: "QuasiNewtonState", operator: lx.AbstractLinearOperator, y: Y, args: Args
    ) -> Count:
        restart = self.preconditioner.num_probes(operator, y, args)
        # An update applies P_k⁻¹ once: its matvecs count, too.
        own = 1 + self.preconditioner.matvecs_per_application(operator)
        return jnp.where(state.count >= self.memory, restart, own).astype(jnp.int32)

    def matvecs_per_application(self, operator: lx.AbstractLinearOperator) -> int:
        return self.preconditioner.matvecs_per_application(operator)

    @property
    def keeps_symmetry(self) -> bool:
        return False  # Broyden's updates are not symmetric

    @property
    def needs_transpose(self) -> bool:
        return self.preconditioner.needs_transpose

    def check(self) -> None:
        self.preconditioner.check()


class QuasiNewtonState(eqx.Module):
    """P₀⁻¹, and row by row s/‖s‖, P_k⁻¹y − s and 1/(sᴴP_k⁻¹y) (zero where there is no update)."""

    base: Any
    point: Vector
    steps: Vector
    corrections: Vector
    coefficients: Inexact[Array, " memory"]
    count: Count
    structures: tuple = eqx.field(static=True)


class _Updated(AbstractLinearMap):
    """v → (I − u_m s_mᴴ/ρ_m) … (I − u₁s₁ᴴ/ρ₁) P₀⁻¹ v."""

    base: AbstractLinearMap
    steps: Vector
    corrections: Vector
    coefficients: Inexact[Array, " memory"]

    def mv(self, vector: Vector) -> Vector:
        rows = (self.steps, self.corrections, self.coefficients)
        return self._factors(rows, self.base.mv(vector), reverse=False)

    def transpose_mv(self, vector: Vector) -> Vector:
        # (I − u sᴴ/ρ)ᵀ = I − conj(s) uᵀ/ρ
        rows = (tree.conj(self.corrections), tree.conj(self.steps), self.coefficients)
        return self.base.transpose_mv(self._factors(rows, vector, reverse=True))

    def _factors(self, rows: tuple, z: Vector, *, reverse: bool) -> Vector:
        def step(z, row):
            left, right, coefficient = row
            c = -coefficient * tree.vdot(left, z)
            return jax.tree.map(lambda x, u: x + c.astype(x.dtype) * u, z, right), None

        return lax.scan(step, z, rows, reverse=reverse)[0]


def _point(y: Y, structure: tree.Structure) -> Vector:
    """The variables of y, in the dtypes of the operator."""
    if y is None:  # in `lx.linear_solve`, where nothing is updated
        return tree.zeros_like(structure)
    variables = eqx.filter(y, eqx.is_inexact_array)
    shapes = jax.tree.map(lambda x: x.shape, variables)
    if shapes != jax.tree.map(lambda s: s.shape, structure):
        raise ValueError(
            "`QuasiNewton` updates a preconditioner of the whole Jacobian, but this operator is on "
            "other vectors than y: put it around the field split, not inside."
        )
    return jax.tree.map(lambda x, s: x.astype(s.dtype), variables, structure)

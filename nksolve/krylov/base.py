"""What a Krylov method is: a Lineax solver that Newton can also call directly."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from equinox import AbstractVar
from jaxtyping import PyTree

from .. import tree
from ..linearise.lower import working
from ..precondition.base import AbstractPreconditioner, Identity
from ..typing import Args, Scalar, ScalarLike, Vector, Y
from .basis import as_real_space
from .mixed import solve_mixed
from .system import KrylovResult, KrylovState, LinearSystem


class AbstractKrylovSolver(lx.AbstractLinearSolver):
    """A Krylov method: a `lineax.AbstractLinearSolver` for square, matrix-free operators.

    As a Lineax solver (`lx.linear_solve(operator, vector, solver)`) it solves to
    ‖b − A x‖ ≤ atol + rtol ‖b‖, checked on the true residual. Newton calls `solve` directly, with a
    tolerance of its own and a workspace that is allocated once.

    Laws: `transpose(init(A))` is `init(A.T)`, with the transposed preconditioner; `rtol` and `atol`
    may be traced.

    Options of `lx.linear_solve`: `y0`, an initial guess, and `preconditioner`, an operator that
    replaces that of the `preconditioner` field; no others.
    """

    rtol: AbstractVar[ScalarLike]
    atol: AbstractVar[ScalarLike]
    preconditioner: AbstractVar[AbstractPreconditioner]
    is_flexible: ClassVar[bool] = False  # whether M⁻¹ may change from iteration to iteration

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        name, preconditioner = type(self).__name__, self.preconditioner
        preconditioner.check()
        if preconditioner.is_variable and not self.is_flexible:
            raise ValueError(
                f"`{name}` needs a linear preconditioner, the same at every iteration; "
                f"`{type(preconditioner).__name__}` holds an inner Krylov solve, which is not: "
                "take `nks.FGMRES` or `nks.GCRODR`."
            )
        if self.needs_symmetry and not preconditioner.keeps_symmetry:
            raise ValueError(
                f"`{name}` needs a symmetric M⁻¹, which this `{type(preconditioner).__name__}` "
                "does not give for a symmetric J: take another preconditioner, or `nks.GMRES`, "
                "which asks for no symmetry."
            )

    @property
    def needs_symmetry(self) -> bool:
        """Whether A and M⁻¹ must be symmetric (Hermitian, of complex vectors)."""
        return False

    @property
    def needs_transpose(self) -> bool:
        """Whether a solve multiplies by Aᵀ."""
        return self.preconditioner.needs_transpose

    @abc.abstractmethod
    def workspace(self, vector: Vector, *, real: bool) -> PyTree:
        """The memory of a solve with right-hand sides like `vector`, to be passed to `solve`."""

    @abc.abstractmethod
    def solve(
        self,
        system: LinearSystem,
        vector: Vector,
        *,
        tolerance: ScalarLike,
        workspace: PyTree,
        norm: Scalar | None = None,
        guess: Vector | None = None,
        verify: bool = False,
    ) -> KrylovResult:
        """Solves A x = vector until the residual norm is at most `tolerance` (absolute).

        With an infinite tolerance it does nothing and returns zero. `verify` holds success back
        until the true residual, recomputed by one further matvec, passes the test; without it the
        method's own estimate decides.
        """

    def chosen(
        self, operator: Callable[[], lx.AbstractLinearOperator], y: Y, args: Args
    ) -> "AbstractKrylovSolver":
        """The method to use with such an operator: this one, but for `nks.AutoLinear`, and with its
        preconditioner chosen. Decided by all that is static, never by values."""
        preconditioner = self.preconditioner.chosen(operator, y, args)
        if preconditioner is self.preconditioner:
            return self
        return eqx.tree_at(lambda s: s.preconditioner, self, preconditioner)

    def why(self, operator: Callable[[], lx.AbstractLinearOperator], y: Y, args: Args) -> str:
        """What `chosen` chose and for which reason; empty where there was no choice."""
        return self.preconditioner.why(operator, y, args)

    def prepare(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> KrylovState:
        """The state of a linear solve at a linearisation: the operator and its preconditioner."""
        chosen = working(operator)
        state = self.preconditioner.init(chosen, y, args)
        inverse = self.preconditioner.as_operator(state)
        return KrylovState(chosen, inverse, None if chosen is operator else operator)

    def run(
        self,
        state: KrylovState,
        vector: Vector,
        *,
        tolerance: ScalarLike,
        real: bool,
        workspace: PyTree = None,
        norm: Scalar | None = None,
        guess: Vector | None = None,
        verify: bool = False,
    ) -> KrylovResult:
        """`solve` with a state, in its precision and refined where that is a lower one."""
        if workspace is None:
            workspace = self.workspace(tree.zeros_like(state.operator.out_structure()), real=real)
        keywords: dict[str, Any] = {
            "tolerance": tolerance,
            "workspace": workspace,
            "norm": norm,
            "guess": guess,
            "verify": verify,
        }
        # The workspace has room for what M⁻¹ makes, though that may be the identity.
        preconditioned = not isinstance(self.preconditioner, Identity)
        system = state.system(real, preconditioned=preconditioned)
        if state.wide is not None:
            return solve_mixed(self, system, state, vector, real=real, **keywords)
        return self.solve(system, vector, **keywords)

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> KrylovState:
        unknown = set(options) - {"preconditioner", "y0"}
        if unknown:
            raise ValueError(
                f"{type(self).__name__} does not know the options {sorted(unknown)}; it takes "
                "`y0` and `preconditioner`. Everything else is a field of the solver."
            )
        self.check_operator(operator)
        if "preconditioner" in options:
            return KrylovState(lx.linearise(operator), options["preconditioner"])
        return self.prepare(lx.linearise(operator), None, None)

    def check_operator(self, operator: lx.AbstractLinearOperator) -> None:
        """Raises for operators that the method does not solve with."""
        if operator.in_structure() != operator.out_structure():
            raise ValueError(
                f"{type(self).__name__} solves square systems whose unknown and right-hand side "
                f"have the same structure; got {operator.in_structure()} and "
                f"{operator.out_structure()}."
            )
        if self.needs_symmetry and not _may_be_hermitian(operator):
            raise ValueError(
                f"`{type(self).__name__}` solves symmetric systems, and nothing promises that this "
                "one is. Where it is, say so: `tags=frozenset({lx.symmetric_tag})`, or "
                "`lx.positive_semidefinite_tag`, in `nks.root_find` or of the operator. Where it "
                "is not, take `nks.GMRES`, `nks.BiCGStab` or `nks.IDR`."
            )

    def compute(
        self, state: KrylovState, vector: Vector, options: dict[str, Any]
    ) -> tuple[Vector, lx.RESULTS, dict[str, Any]]:
        out = self.run(
            state,
            vector,
            tolerance=self.tolerance(vector),
            real=as_real_space(vector, holomorphic=True),
            guess=options.get("y0"),
            verify=True,
        )
        stats = {
            "num_steps": out.num_steps,
            "num_matvecs": out.num_matvecs,
            "num_transposed_matvecs": out.num_transposed_matvecs,
            "num_preconditioner_applications": out.num_preconditioner_applications,
            "num_restarts": out.num_restarts,
            "residual_norm": out.residual_norm,
            **self.report(out.workspace),
        }
        return out.value, out.result, stats

    @property
    def underlying(self) -> "AbstractKrylovSolver":
        """The method that a user chose, where this is the same one ended by another rule."""
        return self

    def for_derivatives(self) -> "AbstractKrylovSolver":
        """The method for the systems of derivatives, which are equations: without what serves the
        steps of a nonlinear solve alone."""
        return self

    def report(self, workspace: PyTree) -> dict[str, Any]:
        """What a workspace holds after a solve that is worth a place in the stats."""
        del workspace
        return {}

    def tolerance(self, vector: Vector) -> Scalar:
        """atol + rtol ‖vector‖₂."""
        norm = tree.norm2(vector)
        return _cast(self.atol, norm) + _cast(self.rtol, norm) * norm

    def transpose(
        self, state: KrylovState, options: dict[str, Any]
    ) -> tuple[KrylovState, dict[str, Any]]:
        return state.transpose(), {}

    def conj(
        self, state: KrylovState, options: dict[str, Any]
    ) -> tuple[KrylovState, dict[str, Any]]:
        return state.conj(), {}

    def assume_full_rank(self) -> bool:
        return True


def _may_be_hermitian(operator: lx.AbstractLinearOperator) -> bool:
    """Whether a tag promises it; of complex operators, for which Lineax has no such tag but
    semidefiniteness, always."""
    leaves = jtu.tree_leaves((operator.in_structure(), operator.out_structure()))
    is_complex = any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in leaves)
    return is_complex or lx.is_symmetric(operator)


def check_tolerances(rtol: Any, atol: Any) -> None:
    """Raises for tolerances that are known to be negative or NaN."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"`{name}` must not be negative, but it is {value}.")


def _cast(value: ScalarLike, like: Scalar) -> Scalar:
    return jnp.asarray(value).astype(like.dtype)

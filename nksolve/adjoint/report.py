"""Tell the user how each solve for a derivative went; absent from the program unless asked for.

A cotangent has no auxiliary output, so that what is known of it leaves by a callback.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import lineax as lx

from .. import tree
from ..krylov.gmres import GMRES
from ..krylov.system import KrylovState
from ..typing import Count, Flag, Scalar, Vector

_RESULTS = ("successful", "at_floor", "approximate", "stagnation", "max_steps", "breakdown")


class AdjointReport(NamedTuple):
    """One linear solve for a derivative, as host scalars.

    **Attributes:**

    - `transposed`: whether it was Jᵀλ = ȳ (reverse mode) or J ẏ = b (forward mode).
    - `residual_norm`: ‖ȳ − Jᵀλ‖₂, or ‖b − J ẏ‖₂, computed from λ itself by one matvec.
    - `rhs_norm`, `solution_norm`: ‖ȳ‖₂ and ‖λ‖₂, or those of b and ẏ.
    - `num_matvecs`: products with J or Jᵀ, those of the report included.
    - `result`: `"successful"`: the tolerance is met; `"at_floor"`: it is not, but the residual is
      at the rounding level of Jᵀλ; `"approximate"`: of an adjoint that makes no promise; and
      `"stagnation"`, `"max_steps"`, `"breakdown"` of a failed solve.
    - `error_estimate`: of ‖λ − J⁻ᵀȳ‖₂, by the adjoints that approximate; NaN by `KrylovAdjoint`.
    """

    transposed: bool
    residual_norm: float
    rhs_norm: float
    solution_norm: float
    num_matvecs: int
    result: str
    error_estimate: float

    @property
    def failed(self) -> bool:
        """Whether the solve failed."""
        return self.result in _RESULTS[3:]


#: `None` (nothing), `True` (print a line) or a function of an `AdjointReport`.
Receiver: TypeAlias = bool | Callable[[AdjointReport], Any] | None


def print_adjoint_report(report: AdjointReport) -> None:
    """Prints one line."""
    name = "Jᵀλ = ȳ" if report.transposed else "J ẏ = b"
    relative = report.residual_norm / report.rhs_norm if report.rhs_norm > 0 else 0.0
    line = (
        f"derivative   {name}   residual {report.residual_norm:.3e} ({relative:.1e} relative)   "
        f"matvecs {report.num_matvecs:4d}   {report.result}"
    )
    estimate = report.error_estimate
    print(line if estimate != estimate else f"{line}   error ≈ {estimate:.1e}")


APPROXIMATE = _RESULTS.index("approximate")


def code_of(result: lx.RESULTS, at_floor: Flag) -> Count:
    """A Krylov method's result as a position in the names of results."""
    index = _RESULTS.index
    code = jnp.where(result == lx.RESULTS.breakdown, index("breakdown"), index("stagnation"))
    code = jnp.where(result == lx.RESULTS.max_steps_reached, index("max_steps"), code)
    code = jnp.where(at_floor, index("at_floor"), code)
    return jnp.where(result == lx.RESULTS.successful, index("successful"), code).astype(jnp.int32)


def tell(
    receiver: Receiver,
    *,
    transposed: bool,
    residual_norm: Scalar,
    rhs_norm: Scalar,
    solution_norm: Scalar,
    num_matvecs: Count | int,
    code: Count | int,
    error_estimate: Scalar | float = float("nan"),
) -> None:
    """Calls the receiver on the host, once for each lane of a batch."""
    if not receiver:
        return
    receive = print_adjoint_report if receiver is True else receiver

    def call(residual_norm, rhs_norm, solution_norm, num_matvecs, code, error_estimate):
        receive(
            AdjointReport(
                transposed=transposed,
                residual_norm=float(residual_norm),
                rhs_norm=float(rhs_norm),
                solution_norm=float(solution_norm),
                num_matvecs=int(num_matvecs),
                result=_RESULTS[int(code)],
                error_estimate=float(error_estimate),
            )
        )

    jax.debug.callback(
        call, residual_norm, rhs_norm, solution_norm, num_matvecs, code, error_estimate
    )


def tell_approximation(
    receiver: Receiver,
    state: KrylovState,
    b: Vector,
    x: Vector,
    *,
    estimate_steps: int,
    num_matvecs: Count | int,
    real: bool,
    transposed: bool,
) -> None:
    """Reports x ≈ J⁻¹b with its true residual (one matvec) and an estimate of its error."""
    if not receiver:
        return
    r = tree.sub(b, state.operator.mv(x))
    estimate, more = estimated_error(state, r, steps=estimate_steps, real=real)
    tell(
        receiver,
        transposed=transposed,
        residual_norm=tree.norm2(r),
        rhs_norm=tree.norm2(b),
        solution_norm=tree.norm2(x),
        num_matvecs=num_matvecs + 1 + more,
        code=APPROXIMATE,
        error_estimate=estimate,
    )


def estimated_error(
    state: KrylovState, r: Vector, *, steps: int, real: bool
) -> tuple[Scalar, Count]:
    """An estimate of ‖J⁻¹r‖, and the matvecs that it took.

    With e from `steps` iterations of GMRES on M⁻¹J e = M⁻¹r and what they leave, r₁ = r − J e,

        ‖J⁻¹r‖ ≤ ‖e‖ + ‖(M⁻¹J)⁻¹‖ ‖M⁻¹r₁‖ ≈ ‖e‖ + 4 ‖M⁻¹r₁‖ / σ_min(H̄)

    where M⁻¹J V = V H̄. σ_min(H̄) ≥ σ_min(M⁻¹J), with equality once the space holds the smallest
    singular vector; hence the factor 4.
    """
    if tree.size(r) == 0:
        return tree.norm2(r), jnp.zeros((), jnp.int32)
    solver = GMRES(restart=steps, max_steps=steps, side="left")
    workspace = solver.workspace(tree.zeros_like(r), real=real)
    norm = tree.norm2(r)
    out = solver.solve(state.system(real), r, tolerance=0.01 * norm, workspace=workspace)
    record = out.workspace.record
    # Columns that were not made would be singular values 0: units outside the others instead.
    rows, columns = record.matrix.shape
    missing = jnp.arange(columns, dtype=jnp.int32) >= record.columns
    size = jnp.sqrt(jnp.sum((record.matrix * record.matrix.conj()).real))
    padding = jnp.eye(rows, columns, -1, dtype=record.matrix.dtype) * size.astype(
        record.matrix.dtype
    )
    matrix = jnp.where(missing[None], padding, record.matrix)
    finite = jnp.isfinite(size)
    matrix = jnp.where(finite, matrix, jnp.zeros_like(matrix))
    least = jnp.linalg.svd(matrix, compute_uv=False)[-1]
    rest = jnp.where(out.residual_norm > 0, 4 * out.residual_norm / least, 0)
    estimate = jnp.where(finite, tree.norm2(out.value) + rest, jnp.nan)
    return estimate.astype(norm.dtype), out.num_matvecs

"""What the minimal-residual iteration carries, and how it begins."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from .. import tree
from ..typing import Count, Flag, LinearFn, Scalar, ScalarLike, Vector
from .basis import Basis
from .hessenberg import Hessenberg
from .orthogonalise import AbstractOrthogonalisation
from .recycling import Directions, Space, carried_over
from .ritz import ArnoldiRecord
from .system import LinearSystem


class Workspace(eqx.Module):
    """The Arnoldi basis [C V], the search basis [U Z], and what the last cycle left.

    Without a recycled space (`space` is `None`) these are V and Z, or `None` without Z.
    """

    arnoldi: Basis
    search: Basis | None
    record: ArnoldiRecord
    space: Space | None = None

    @property
    def recycled(self) -> int:
        """k, the number of rows of C and U."""
        return 0 if self.space is None else self.space.size

    @property
    def length(self) -> int:
        """Most columns of a cycle."""
        return self.arnoldi.size - 1 - self.recycled


class Cycle(NamedTuple):
    """The Arnoldi process. Norms are in units of ‖b‖."""

    j: Count  # column, −1 for the restart step; the same for every lane
    workspace: Workspace
    hessenberg: Hessenberg
    coupling: Array | None  # Cᴴ of b − A x and, from column 1, of A Z
    start: Scalar  # residual norm at the start of the cycle
    beta: Scalar  # the same of its part outside C, which is what remains with the best U
    null_square: Scalar  # ‖u‖²: the residual norm now is β/‖u‖; NaN where A v was not finite
    columns: Count  # of this lane
    matvecs: Count
    running: Flag  # still extending the space


class Solve(NamedTuple):
    """The cycles."""

    cycle: Cycle
    x: Vector
    residual: Scalar
    previous_x: Vector  # at the start of the cycle before
    previous_start: Scalar  # its residual norm; infinite before the first restart
    cycles: Count  # that made columns
    restart_steps: Count
    done: Flag
    broken: Flag  # b or A v was not finite


class Limits(NamedTuple):
    target: Scalar  # stop at ‖r‖ ≤ target
    max_steps: int
    verify: bool
    eps: float


def scaled(
    system: LinearSystem,
    vector: Vector,
    norm: Scalar | None,
    tolerance: ScalarLike,
) -> tuple[LinearFn, LinearFn | None, Vector, Scalar, Scalar, Scalar]:
    """(A, M⁻¹, b, unit, ‖b‖, target), b and what follows it in units of `unit`.

    ‖b‖ is 1, or 0, or NaN where the vector is not finite.
    """
    norm = tree.norm2(vector) if norm is None else norm
    unit = or_one(norm)
    target = jnp.asarray(tolerance).astype(norm.dtype) / unit
    beta = jnp.where(jnp.isfinite(norm), norm / unit, jnp.nan)
    return system.mv, system.psolve, tree.scale(1 / unit, vector), unit, beta, target


def or_one(norm: Scalar) -> Scalar:
    """The norm, or 1 where it is 0 or not finite."""
    return jnp.where((norm > 0) & jnp.isfinite(norm), norm, jnp.ones_like(norm))


def begin(
    mv: LinearFn,
    orthogonalisation: AbstractOrthogonalisation,
    b: Vector,
    beta: Scalar,
    unit: Scalar,
    guess: Vector | None,
    workspace: Workspace,
    limits: Limits,
) -> tuple[Solve, Count]:
    """Before the first cycle, and the matvecs that moved the recycled space to this operator."""
    basis, recycled = workspace.arnoldi, workspace.recycled
    dtype = tree.real_dtype(b) if basis.real else tree.scalar_dtype(b)
    j, x, residual = jnp.zeros((), jnp.int32), tree.zeros_like(b), beta
    none = jnp.zeros_like(beta, jnp.int32)
    done = ~(beta > limits.target)
    if guess is not None:  # worth nothing where b = 0, whose solution is known
        j = j - 1
        done = ~(beta > 0) | jnp.isinf(limits.target)
        x = tree.where(done, x, tree.scale(1 / unit, guess))
    running, moved, coupling, outside = ~done, none, None, beta
    search, space = workspace.search, workspace.space
    if space is not None and search is not None:
        old = Directions(search.head(recycled), basis.head(recycled), space)
        new, moved = carried_over(mv, old, ~done, basis.real)
        basis, search, space = basis.with_head(new.image), search.with_head(new.search), new.space
        coupling = jnp.zeros((recycled, workspace.length + 1), dtype)
    if guess is None:
        finite = jnp.isfinite(beta)
        b = tree.where(finite, b, tree.zeros_like(b))
        if coupling is None:
            basis = basis.set_row(j, b)
        else:
            first = orthogonalisation.append(basis, b, j + recycled)
            basis = first.basis
            coupling = coupling.at[:, 0].set(first.coefficients[:recycled])
            outside = jnp.where(finite, first.norm, beta)
            running = running & (outside > limits.target)
    cycle = Cycle(
        j=j,
        workspace=Workspace(basis, search, workspace.record, space),
        hessenberg=Hessenberg.empty(workspace.length, dtype),
        coupling=coupling,
        start=beta,
        beta=outside,
        null_square=jnp.ones_like(beta),
        columns=none,
        matvecs=none,
        running=running,
    )
    infinite = jnp.full_like(beta, jnp.inf)
    return Solve(cycle, x, residual, x, infinite, none, none, done, ~jnp.isfinite(beta)), moved


def coupled(coupling: Array, columns: Count) -> Array:
    """The coupling, zero where no column of this lane is."""
    filled = jnp.arange(coupling.shape[1], dtype=jnp.int32) <= columns
    return jnp.where(filled[None], coupling, jnp.zeros_like(coupling))

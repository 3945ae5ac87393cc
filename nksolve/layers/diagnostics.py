"""How fast a fixed-point map contracts at a point: estimates of ρ(∂g/∂z) with their errors."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Inexact, PRNGKeyArray

from .. import tree
from ..adjoint.base import stop_gradient
from ..krylov.basis import Basis, as_real_space
from ..krylov.orthogonalise import CGS2
from ..krylov.ritz import ArnoldiRecord
from ..linearise.linearisation import linearise
from ..linearise.policies import AbstractPolicy, Linearise
from ..linearise.tags import holomorphic_tag
from ..loops import any_lane
from ..typing import Args, Count, Fn, LinearFn, Scalar, Vector, Y
from ..verbs.fixed_point import displacement

# Over 640 records (docs/theory/implicit-diagnostics.md) estimates that called themselves within 10%
# were up to 25% off with fewer columns than this, up to 12% with as many or more.
_FEWEST = 6


class ContractionEstimate(eqx.Module):
    """An estimate of the spectral radius ρ of ∂g/∂z, the rate at which z ← g(z) contracts.

    **Attributes:**

    - `value`: the estimate. NaN where there was nothing to estimate from.
    - `error`: how far it may be off, as the function that made it explains; infinite where nothing
      is known.
    - `num_matvecs`: products with ∂g/∂z that it cost.
    """

    value: Scalar
    error: Scalar
    num_matvecs: Count

    def within(self, rtol: float) -> Bool[Array, "..."]:
        """Whether the error is at most `rtol` of the value."""
        return self.error <= jnp.asarray(rtol).astype(self.value.dtype) * self.value


def krylov_contraction(record: ArnoldiRecord) -> ContractionEstimate:
    """ρ(∂g/∂z) from what the last Krylov solve of a Newton iteration left: no further matvec.

    With J = ∂g/∂z − I the Hessenberg matrix of ∂g/∂z is the record's plus I. Its m columns give two
    estimates, and the larger is taken: the largest Ritz value |θ|, and the last growth factor
    r_m = ‖Gᵐv‖/‖Gᵐ⁻¹v‖ of the power iteration from the same start. Ritz values find outliers and
    the ends of a nearly symmetric spectrum, growth factors the rim of a disc, where Ritz values
    stay inside. For a normal ∂g/∂z neither exceeds ρ.

    The error is, for a Ritz value, its residual ‖G y − θ y‖ = h_{m+1,m} |y_m|: a normal matrix has
    an eigenvalue that near, any matrix becomes one with the eigenvalue θ by a change of that norm.
    For a growth factor it is |r_m − r_{m/2}|. No estimate sees an eigenvalue whose eigenvector is
    all but absent from the right-hand side of the solve: an earlier direction may have removed it.
    So the error is infinite for fewer than six columns. Test `estimate.within(0.1)`.

    It belongs to the point of the last direction, one Newton step before the root.

    **Arguments:**

    - `record`: `stats["arnoldi"]` of a fixed-point solve by `nks.NewtonKrylov` with `nks.GMRES` or
      `nks.FGMRES` and **no preconditioner**; H̄ otherwise belongs to another operator, and so it
      does with `nks.GCRODR`. Under `vmap` one record a lane: `jax.vmap(krylov_contraction)`.

    Work: one m × m eigenproblem (LAPACK on the CPU; none for a TPU).

    Source: Saad, Numerical Methods for Large Eigenvalue Problems, 2nd ed., section 6.2
    (the residual of a Ritz value).
    """
    shifted = record.matrix + jnp.eye(*record.matrix.shape, dtype=record.matrix.dtype)
    inside = jnp.arange(record.matrix.shape[1], dtype=jnp.int32) < record.columns
    shifted = jnp.where(inside[None], shifted, jnp.zeros_like(shifted))
    value, error = _radius(lax.stop_gradient(shifted), record.columns)
    enough = record.columns >= min(_FEWEST, record.matrix.shape[1])
    error = jnp.where(enough, error, jnp.inf)
    return ContractionEstimate(value, error, jnp.zeros_like(record.columns))


def spectral_radius(
    fn: Fn,
    z: Y,
    args: Args = None,
    *,
    key: PRNGKeyArray,
    num_matvecs: int = 20,
    record: ArnoldiRecord | None = None,
    rtol: float = 0.1,
    policy: AbstractPolicy = Linearise(),
    tags: frozenset[object] = frozenset(),
) -> ContractionEstimate:
    """ρ(∂fn/∂z) at a point, by a few steps of Arnoldi's process from a random vector.

    Values and errors as in `nks.krylov_contraction`, without its weakness that the start is the
    residual of a solve: a random vector has a part of every eigenvector. For a strongly non-normal
    ∂fn/∂z the value is the rate over the next `num_matvecs` steps of z ← fn(z), which may be far
    above ρ for longer than that.

    **Arguments:**

    - `fn`: the map, `fn(z, args)`, such as the cell of an `nks.ImplicitLayer` with args = x.
    - `z`: the point, usually a root; `args`: passed on to `fn`.
    - `key`: for the start.
    - `num_matvecs`: most matvecs; at most as many as unknowns are used.
    - `record`: `stats["arnoldi"]` of the solve. Its estimate is returned where it is within `rtol`,
      and the matvecs are saved (in a batch by `vmap` where it is so in every lane).
    - `policy`: what the linearisation stores; `tags`: `nks.holomorphic_tag` for a complex-linear
      derivative.

    Nothing here has a derivative. Storage: `num_matvecs` + 1 vectors. Work: one evaluation of `fn`,
    `num_matvecs` matvecs, an eigenproblem of that size.

    Source: Saad, Numerical Methods for Large Eigenvalue Problems, 2nd ed., algorithm 6.1.
    """
    if num_matvecs < 1:
        raise ValueError(f"`num_matvecs` must be at least 1, but it is {num_matvecs}.")
    z, args = stop_gradient((z, args))
    known = None if record is None else krylov_contraction(record)

    def measured() -> ContractionEstimate:
        lin = linearise(fn, z, args, policy=policy, tags=tags)
        displacement(lin.value, z)  # for its check
        variables = eqx.filter(z, eqx.is_inexact_array)
        real = as_real_space(variables, holomorphic_tag in tags)
        if tree.size(variables) == 0:
            nothing = jnp.zeros((), tree.real_dtype(variables))
            return ContractionEstimate(nothing, nothing, jnp.zeros((), jnp.int32))
        hessenberg = _arnoldi(lin.operator.mv, _random(key, variables), num_matvecs, real)
        columns = jnp.full((), hessenberg.shape[1], jnp.int32)
        value, error = _radius(lax.stop_gradient(hessenberg), columns)
        return ContractionEstimate(value, error, columns)

    if known is None:
        return measured()
    trusted = known.within(rtol)
    dtype = tree.real_dtype(eqx.filter(z, eqx.is_inexact_array))
    known = jtu.tree_map(lambda x: tree.cast(x, dtype), known)
    needed = any_lane(~trusted)
    return tree.where(trusted, known, lax.cond(needed, measured, lambda: known))


def history_contraction(norms: Float[Array, " length"], window: int = 8) -> ContractionEstimate:
    """The rate of a plain iteration from its residual norms: (‖f_k‖/‖f_{k−w}‖)^{1/w}.

    For `nks.Picard` without damping this tends to ρ(∂g/∂z), with damping β to ρ(I + β J). Of an
    accelerated iteration or Newton's it is only the speed at which that went. The error is the
    difference between the rates of the two halves of the window: small once the slowest mode is
    all that is left.

    **Arguments:**

    - `norms`: ‖f₀‖, ‖f₁‖, …; what is not finite is left out, as in the unused rows of
      `stats["history"].norm`.
    - `window`: w, the ratios that count; fewer are used where there are fewer. With fewer than two
      the error is infinite.
    """
    if window < 2:
        raise ValueError(f"`window` must be at least 2, but it is {window}.")
    norms = lax.stop_gradient(norms)
    used = jnp.isfinite(norms)
    norms = norms[jnp.argsort(~used, stable=True)]
    last = jnp.sum(used, dtype=jnp.int32) - 1
    count = jnp.clip(last, 0, window)
    logs = jnp.log(jnp.maximum(norms, jnp.finfo(norms.dtype).tiny))

    def rate(end: Count, steps: Count) -> Scalar:
        start = logs[jnp.maximum(end - steps, 0)]
        change = (logs[jnp.maximum(end, 0)] - start) / steps.astype(norms.dtype)
        return jnp.exp(jnp.where(steps > 0, change, jnp.nan))

    half = count // 2
    spread = jnp.abs(rate(last, half) - rate(last - half, count - half))
    error = jnp.where(half > 0, spread, jnp.inf)
    return ContractionEstimate(rate(last, count), error, jnp.zeros((), jnp.int32))


def _random(key: PRNGKeyArray, variables: Vector) -> Vector:
    """A vector of independent normal entries."""
    leaves, treedef = jtu.tree_flatten(variables)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jtu.tree_unflatten(treedef, drawn)


def _arnoldi(mv: LinearFn, start: Vector, steps: int, real: bool) -> Inexact[Array, "rows columns"]:
    """H̄ of so many steps, or as many as there are dimensions; from v / ‖v‖."""
    dimension = tree.size(start)
    if real:
        dimension += sum(x.size for x in jtu.tree_leaves(start) if jnp.iscomplexobj(x))
    steps = min(steps, dimension)
    dtype = tree.real_dtype(start) if real else tree.scalar_dtype(start)
    norm = tree.norm2(start)
    basis = Basis.allocate(start, steps + 1, real=real)
    basis = basis.set_row(jnp.zeros((), jnp.int32), tree.scale(1 / norm, start))

    def extend(basis: Basis, j: Count) -> tuple[Basis, Array]:
        new = CGS2().append(basis, mv(basis.row(j)), j + 1)
        column = jnp.where(
            jnp.arange(steps + 1, dtype=jnp.int32) == j + 1,
            new.norm.astype(dtype),
            new.coefficients.astype(dtype),
        )
        return new.basis, column

    return lax.scan(extend, basis, jnp.arange(steps, dtype=jnp.int32))[1].T


def _radius(hessenberg: Inexact[Array, "rows columns"], columns: Count) -> tuple[Scalar, Scalar]:
    """(estimate of the spectral radius, its error) from H̄, which is zero beyond `columns`."""
    eps = jnp.finfo(hessenberg.dtype).eps
    finite = jnp.all(jnp.isfinite(hessenberg))
    hessenberg = jnp.where(finite, hessenberg, jnp.zeros_like(hessenberg))
    last = jnp.maximum(columns - 1, 0)
    values, vectors = jnp.linalg.eig(hessenberg[:-1])
    i = jnp.argmax(jnp.abs(values))
    ritz = jnp.abs(values)[i]
    residual = jnp.abs(hessenberg[last + 1, last]) * jnp.abs(vectors[last, i])

    # Gᵏv = V (H̄ … H̄ e₁) for k up to the number of columns.
    def power(c: Array, _: None) -> tuple[Array, Scalar]:
        image = hessenberg @ c[:-1]
        growth = jnp.sqrt(jnp.sum((image * image.conj()).real))
        return image / jnp.where(growth > 0, growth, 1).astype(image.dtype), growth

    unit = jnp.zeros_like(hessenberg[:, 0]).at[0].set(1)
    _, growths = lax.scan(power, unit, None, length=hessenberg.shape[1])
    growth = growths[last]
    value = jnp.maximum(ritz, growth)
    earlier = jnp.where(last > 0, growths[last // 2], 0)
    error = jnp.where(ritz >= growth, residual, jnp.abs(growth - earlier))
    error = error + eps * columns.astype(value.dtype) * value
    known = finite & (columns > 0)
    return jnp.where(known, value, jnp.nan), jnp.where(known, error, jnp.inf)

"""The sparse LU factorisation of J on the CPU, by KLU."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jec
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, Inexact

from .. import tree
from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..linearise.probing import compressed, ravel, unravel
from ..linearise.sparsity import Pattern, find_pattern
from ..typing import Args, Vector, Y
from .base import AbstractPreconditioner


class SparseLU(AbstractPreconditioner):
    """M = J, assembled by its sparsity pattern and factored by KLU: M⁻¹v = J⁻¹v to round-off.

    The pattern is found once (`nks.find_pattern`, while tracing), its entries are read off one
    batched push of the seeds through the linearisation. The state is those entries, an array and
    nothing else: no handle to a factorisation, so that a step that is rolled back or replayed sees
    what it saw. The price is that each application analyses, factors and solves.

    In float64 and complex128 whatever the dtype of J (cast to and fro). A complex J that is only
    real-linear is taken as the real matrix of twice the size.

    A singular J, on which KLU would raise, and one with entries that are not finite give NaN, so
    that the solver ends with a reason. For that a real matrix is factored in complex arithmetic,
    with imaginary parts of 1e-100 of its largest entry: they do not touch the real part of the
    solution, keep a zero pivot from being one, and show it in the imaginary part. The entries of a
    complex matrix are changed by up to 64 units of round-off instead, which makes an exact zero
    pivot unlikely, not impossible.

    **Arguments:**

    - `pattern`: a `Pattern`; found by asdex if not given. It must hold every nonzero of J.

    **Raises:** (while tracing, each with the way out) `ImportError` without klujax or asdex,
    `RuntimeError` where JAX's default backend is no CPU or where JAX has no float64, `ValueError`
    where the pattern is not J's size or cannot be found.

    Storage: nnz numbers. While it runs: the entries as (colours × n) products, and KLU's factors.
    Work: `num_colours` matvecs (2 `num_colours` for a real-linear complex J) in one batch at each
    linearisation; a factorisation and two triangular solves an application.

    Source: Davis & Palamadai Natarajan, Algorithm 907: KLU, ACM Trans. Math. Softw. 37(3), 2010;
    Curtis, Powell & Reid, J. Inst. Maths Applics 13, 1974 (entries from coloured products).
    """

    pattern: Pattern | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if not isinstance(self.pattern, Pattern | None):
            raise TypeError(
                "`pattern` must be a `nks.Pattern` (`Pattern.from_coo(rows, cols, n)`, "
                "`Pattern.from_scipy(matrix)` or `nks.find_pattern(operator)`), but it is a "
                f"{type(self.pattern).__name__}."
            )

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        del y, args
        _check_machine()
        pattern, in_parts = self.resolved(operator)
        structure, out_structure = operator.in_structure(), operator.out_structure()
        if in_parts:
            values = _values_in_parts(pattern, operator)
            pattern = _in_parts(pattern)
        else:
            values = pattern.values(operator)
        inverse = _Inverse(values, pattern, in_parts, structure, out_structure)
        return JacobianOperator(inverse, out_structure, structure)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

    def num_probes(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> int:
        del y, args
        pattern, in_parts = self.resolved(operator)
        return pattern.num_colours * (1 + in_parts)

    def resolved(self, operator: lx.AbstractLinearOperator) -> tuple[Pattern, bool]:
        """The pattern, and whether J is taken by real and imaginary parts."""
        leaves = jtu.tree_leaves((operator.in_structure(), operator.out_structure()))
        is_complex = {jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in leaves}
        if len(is_complex) > 1:
            raise ValueError(
                "`SparseLU` takes unknowns that are all real or all complex; these are mixed. "
                "Write the complex ones as two real ones."
            )
        pattern = find_pattern(operator) if self.pattern is None else self.pattern
        pattern.check_size(operator)
        return pattern, is_complex == {True} and not _is_complex_linear(operator)


class _Inverse(AbstractLinearMap):
    """v → J⁻¹v."""

    values: Array
    pattern: Pattern = eqx.field(static=True)
    in_parts: bool = eqx.field(static=True)
    structure: tuple = eqx.field(static=True, converter=tree.freeze)
    out_structure: tuple = eqx.field(static=True, converter=tree.freeze)

    def mv(self, vector: Vector) -> Vector:
        return self._solve(vector, self.pattern.rows, self.pattern.cols, self.structure)

    def transpose_mv(self, vector: Vector) -> Vector:
        # JAX's transpose pairs complex numbers by Re(w v): that of parts, between conjugations.
        vector = tree.conj(vector) if self.in_parts else vector
        out = self._solve(vector, self.pattern.cols, self.pattern.rows, self.out_structure)
        return tree.conj(out) if self.in_parts else out

    def _solve(
        self, vector: Vector, rows: np.ndarray, cols: np.ndarray, structure: tuple
    ) -> Vector:
        flat = ravel(vector)
        if flat.size == 0:
            return vector
        if self.in_parts:
            real, imag = jnp.split(_solved(self.values, rows, cols, _parts(flat)), 2)
            out = lax.complex(real, imag)
        else:
            out = _solved(self.values, rows, cols, flat)
        return unravel(out.astype(flat.dtype), tree.thaw(structure))


def _solved(
    values: Inexact[Array, " nnz"], rows: np.ndarray, cols: np.ndarray, b: Inexact[Array, " n"]
) -> Array:
    """A⁻¹b for the matrix with those entries, in float64 or complex128."""
    klujax = _klujax()
    n = b.size
    is_complex = jnp.iscomplexobj(values) or jnp.iscomplexobj(b)
    finite = jnp.isfinite(values).all()
    kept = jnp.where(finite, values, jnp.zeros_like(values))
    rows, cols, shake, missing = _plan(rows.tobytes(), cols.tobytes(), n)
    scale = jnp.max(jnp.abs(kept), initial=0).astype(jnp.float64)
    scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    kept = jnp.concatenate([kept.astype(jnp.complex128), jnp.zeros((missing,), jnp.complex128)])
    shake = shake.astype(np.float64)
    tiny = 1e-100 * scale * shake
    if is_complex:
        kept = kept * (1 + 128 * np.finfo(np.float64).eps * (shake - 1.5)).astype(np.complex128)
    kept = kept + lax.complex(jnp.zeros_like(tiny), tiny)
    rhs = b.astype(jnp.complex128)[None, :, None]

    # The primitive, not `klujax.solve`, which would sort the pattern at each call. In a program of
    # its own, to which the pattern belongs: as an operand of a `cond`, which under `vmap` batches
    # all of them, it would get an axis that the primitive refuses.
    @jax.jit
    def solve(kept, rhs):
        places = jnp.asarray(rows), jnp.asarray(cols)
        return klujax.solve_c128.bind(*places, kept[None, :], rhs)

    x = solve(kept, rhs)[0, :, 0]
    if not is_complex:
        # Imaginary parts are 1e-100 times a condition number, unless a pivot was imaginary only.
        x, imaginary = x.real, x.imag
        finite = finite & (jnp.max(jnp.abs(imaginary)) <= 1e-50 * jnp.max(jnp.abs(x)))
    return jnp.where(finite, x, jnp.full_like(x, jnp.nan))


@ft.lru_cache(maxsize=64)
def _plan(rows: bytes, cols: bytes, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Places with the missing ones of the diagonal behind them, a number from 1 to 2 for each, and
    how many were missing: with a full diagonal the matrix has full structural rank."""
    i, j = np.frombuffer(rows, np.int32), np.frombuffer(cols, np.int32)
    missing = np.setdiff1d(np.arange(n, dtype=np.int32), i[i == j])
    i, j = np.concatenate([i, missing]), np.concatenate([j, missing])
    shake = np.random.default_rng(907).uniform(1.0, 2.0, i.size).astype(np.float32)
    return i, j, shake, missing.size


def _parts(flat: Inexact[Array, " n"]) -> Float[Array, " m"]:
    return jnp.concatenate([flat.real, flat.imag])


@ft.lru_cache(maxsize=64)
def _in_parts(pattern: Pattern) -> Pattern:
    """The pattern of (Re, Im) → (Re, Im)."""
    rows, cols, n = pattern.rows, pattern.cols, pattern.n
    i = np.concatenate([rows, rows, rows + n, rows + n])
    j = np.concatenate([cols, cols + n, cols, cols + n])
    return Pattern(i, j, 2 * n)


def _values_in_parts(pattern: Pattern, operator: lx.AbstractLinearOperator) -> Array:
    """Entries of the real matrix of twice the size: J e_j on the left, J i e_j on the right."""
    times = lambda unit, v: jtu.tree_map(lambda x: unit.astype(x.dtype) * x, v)
    turned = lambda unit: lx.FunctionLinearOperator(
        lambda v: operator.mv(times(unit, v)), operator.in_structure()
    )
    dtype = tree.scalar_dtype(operator.in_structure())
    units = jnp.asarray(np.array([1, 1j], dtype))
    if pattern.nnz == 0:
        return jnp.zeros((0,), units.real.dtype)
    push = lambda unit: compressed(turned(unit), pattern.colours, pattern.num_colours)
    products = jax.vmap(push)(units)
    both = _in_parts(pattern)
    n = pattern.n
    imaginary = (both.rows >= n).astype(np.int32)
    place = (both.cols // n) * pattern.num_colours + pattern.colours[both.cols % n]
    index = (imaginary * 2 * pattern.num_colours + place) * n + both.rows % n
    return jnp.stack([products.real, products.imag]).reshape(-1)[jnp.asarray(index)]


#: What a complex-linear program need not do to a complex number.
_PARTING = frozenset({"conj", "real", "imag", "abs", "sign"})


def _is_complex_linear(operator: lx.AbstractLinearOperator) -> bool:
    """Whether v → J v is seen to be complex-linear: its program takes no number apart."""
    # Not the bound method, which JAX would compare by the arrays of its operator.
    product = lambda v: operator.mv(v)
    return not _parts_numbers(jax.make_jaxpr(product)(operator.in_structure()).jaxpr)


def _parts_numbers(jaxpr: jec.Jaxpr) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _PARTING:
            return True
        for inner in jec.jaxprs_in_params(eqn.params):
            if _parts_numbers(inner):
                return True
    return False


def _check_machine() -> None:
    if jax.default_backend() != "cpu":
        raise RuntimeError(
            f"`SparseLU` factors on the CPU, but JAX's default backend is {jax.default_backend()}. "
            "Set JAX_PLATFORMS=cpu, or use a preconditioner that runs anywhere: `nks.Banded` or "
            "`nks.BlockTridiagonal` for one space dimension, multigrid for more."
        )
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise RuntimeError(
            "`SparseLU` factors in float64, which JAX has switched off. Switch it on, "
            "`jax.config.update('jax_enable_x64', True)` (unknowns may stay float32), or use "
            "`nks.Banded` or `nks.BlockTridiagonal`, which work in any precision."
        )
    _klujax()


@ft.cache
def _klujax() -> Any:
    names = ("jax_enable_x64", "jax_platform_name")
    chosen = {name: jax.config.values[name] for name in names}  # pyright: ignore
    try:
        import klujax
    except ImportError as error:
        raise ImportError(
            "`SparseLU` factors by KLU, which needs klujax: `pip install 'nksolve[sparse]'`. "
            "Without it, `nks.Banded` and `nks.BlockTridiagonal` factor in JAX."
        ) from error
    # Importing klujax chooses float64 and the CPU for the whole process.
    for name, value in chosen.items():
        jax.config.update(name, value)
    return klujax

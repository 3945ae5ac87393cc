"""How large the unknowns and the residuals of a problem typically are: given, or from data."""

import abc
import functools as ft
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PyTree

from ... import tree
from ...linearise.linearisation import Linearisation
from ...typing import Vector


class Start(NamedTuple):
    """What the sizes of the residual may be found from.

    **Attributes:**

    - `unknowns`: S_u.
    - `structure`: that of F.
    - `linearisation`: F and J S_u at the initial point; `None` where nobody needs it.
    """

    unknowns: Vector
    structure: tree.Structure
    linearisation: Linearisation | None

    @property
    def at_start(self) -> Linearisation:
        """The linearisation, for who has said that it is needed."""
        assert self.linearisation is not None
        return self.linearisation


class AbstractResidualSizes(eqx.Module):
    """Finds S_F, the typical sizes of the equations."""

    #: Whether the initial point must be linearised for that, which costs one evaluation of fn.
    needs_linearisation: ClassVar[bool] = False

    @abc.abstractmethod
    def of_residual(self, start: Start) -> Vector:
        """S_F, positive."""

    @property
    def num_probes(self) -> int:
        """Matvecs that `of_residual` makes."""
        return 0


class AbstractSizes(AbstractResidualSizes):
    """Finds S_u, the typical sizes of the unknowns, or those of a residual in the same way."""

    @abc.abstractmethod
    def of_unknowns(self, variables: Vector) -> Vector:
        """S_u at the initial point: powers of two."""


class GivenSizes(AbstractSizes):
    """Sizes that the user knows: what numbers, arrays and PyTrees of them become.

    Those of the unknowns are rounded to powers of two. A traced size that is not positive and
    finite becomes NaN, and the solve fails with `nonfinite` at its start.
    """

    sizes: PyTree

    def __init__(self, sizes: PyTree):
        # A `None` within the tree stands where y has a leaf that is no unknown.
        for size in [None] if sizes is None else jtu.tree_leaves(sizes):
            if not isinstance(size, int | float | np.generic | np.ndarray | jax.Array):
                raise TypeError(_NOT_SIZES.format(size))
            if isinstance(size, bool) or np.dtype(jnp.result_type(size)).kind not in "fiu":
                raise TypeError(_NOT_SIZES.format(size))
            if isinstance(size, Tracer):
                continue  # `of_unknowns` and `of_residual` see to its value
            values = np.asarray(size, np.float64)
            if not np.all(np.isfinite(values) & (values > 0)):
                raise ValueError(
                    f"Sizes must be positive and finite, but got {size}. Give the typical size of "
                    "each unknown or equation, not its inverse; 1.0 leaves it as it is."
                )
        self.sizes = jtu.tree_map(lambda x: jnp.asarray(x, tree.float_dtype()), sizes)

    def of_unknowns(self, variables: Vector) -> Vector:
        sizes = _spread(self.sizes, variables, "variables", "the unknowns")
        return jtu.tree_map(lambda x: jnp.where(_usable(x), _power_of_two(x), jnp.nan), sizes)

    def of_residual(self, start: Start) -> Vector:
        sizes = _spread(self.sizes, start.structure, "residual", "the residual")
        return jtu.tree_map(lambda x: jnp.where(_usable(x), x, jnp.nan), sizes)


class EntrySizes(AbstractSizes):
    """Of each entry its magnitude at the initial point, rounded to a power of two.

    An entry that is zero there, or below the round-off of the largest of its leaf, tells nothing:
    it gets the root mean square of the leaf's other entries; a leaf of such entries gets 1.

    For unknowns of different units within one array. A profile that comes close to zero here and
    there is better served by `nks.LeafSizes`.

    As `residual=`: magnitudes of F₀, at one evaluation of `fn`.
    """

    needs_linearisation: ClassVar[bool] = True

    def of_unknowns(self, variables: Vector) -> Vector:
        return jtu.tree_map(lambda x: _completed(jnp.abs(x), tree.eps(x)), variables)

    def of_residual(self, start: Start) -> Vector:
        return self.of_unknowns(start.at_start.value)


class LeafSizes(AbstractSizes):
    """Of each leaf the root mean square at the initial point, rounded to a power of two; 1 for a
    leaf of zeros.

    **Arguments:**

    - `axes`: axes of the leaves along which sizes differ: with `axes=(-1,)` the entries along the
      last axis, say the species at a node, each have a size of their own.

    As `residual=`: root mean squares of F₀, at one evaluation of `fn`.
    """

    axes: tuple[int, ...] = eqx.field(
        default=(), static=True, converter=lambda x: (x,) if isinstance(x, int) else tuple(x)
    )
    needs_linearisation: ClassVar[bool] = True

    def of_unknowns(self, variables: Vector) -> Vector:
        return jtu.tree_map(self._of_leaf, variables)

    def of_residual(self, start: Start) -> Vector:
        return self.of_unknowns(start.at_start.value)

    def _of_leaf(self, x: Array) -> Array:
        if any(not -x.ndim <= axis < x.ndim for axis in self.axes):
            raise ValueError(
                f"`LeafSizes(axes={self.axes})`: a leaf of shape {x.shape} has no such axes. Give "
                "sizes by hand, or `LeafSizes()` for one size a leaf."
            )
        kept = {axis % x.ndim for axis in self.axes}
        others = tuple(axis for axis in range(x.ndim) if axis not in kept)
        return jnp.broadcast_to(_power_of_two(_root_mean_square(jnp.abs(x), others)), x.shape)


class RowSizes(AbstractResidualSizes):
    """Of each equation the norm of its row of J S_u at the initial point: how much it changes when
    the unknowns change by their sizes. Estimated, and rounded to a power of two.

    A row norm is √E (J S_u z)_i² over random z with independent entries of variance 1, here uniform
    in (−√3, √3). With k probes the estimate is off by at most 1/√(2k) of itself (one standard
    deviation). A row of zeros gets the root mean square of the other rows of its leaf.

    **Arguments:**

    - `probes`: k.
    - `seed`: of the probes, the same in every solve.

    Work: one evaluation of `fn` and `probes` matvecs in one batch, once a solve.

    Source: the estimator of Bekas, Kokiopoulou & Saad, Appl. Numer. Math. 57, 2007, for the
    diagonal of (J S_u)(J S_u)ᵀ.
    """

    probes: int = eqx.field(static=True, default=8)
    seed: int = eqx.field(static=True, default=0)
    needs_linearisation: ClassVar[bool] = True

    def __check_init__(self):
        if self.probes < 1:
            raise ValueError(f"`probes` must be at least 1, but it is {self.probes}.")

    @property
    def num_probes(self) -> int:
        return self.probes

    def of_residual(self, start: Start) -> Vector:
        lin = start.at_start
        leaves, treedef = jtu.tree_flatten(lin.operator.in_structure())
        if not leaves:
            return lin.value
        draws = [
            _uniform(self.seed + i, (self.probes, *leaf.shape)).astype(leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        images = jax.vmap(lin.operator.mv)(jtu.tree_unflatten(treedef, draws))
        return jtu.tree_map(
            lambda w: _completed(_root_mean_square(jnp.abs(w), (0,))[0], 0.0), images
        )


class Similar(AbstractResidualSizes):
    """S_F = S_u: the scaled Jacobian S_u⁻¹ J S_u keeps the spectrum of J.

    For F(u) = g(u) − u, whose plain iteration u + F(u), and everything that accelerates it, is then
    the same in scaled unknowns.
    """

    def of_residual(self, start: Start) -> Vector:
        return start.unknowns


class Congruent(AbstractResidualSizes):
    """S_F = S_u⁻¹: the scaled Jacobian S_u J S_u keeps symmetry and definiteness of J.

    For F = ∇E: F̂ is then the gradient of E in the scaled unknowns. The one choice that goes with
    `nks.CG` and `nks.MINRES`.
    """

    def of_residual(self, start: Start) -> Vector:
        return jtu.tree_map(lambda x: 1 / x, start.unknowns)


_NOT_SIZES = (
    "Sizes are positive numbers, arrays or PyTrees of them, or a class that finds them "
    "(`nks.EntrySizes()`, `nks.LeafSizes()`, for the residual `nks.RowSizes()`), but got {!r}. "
    "Where nothing is to be scaled say 1.0."
)


def as_sizes(sizes: Any) -> AbstractResidualSizes:
    """What finds sizes: itself, or given ones."""
    return sizes if isinstance(sizes, AbstractResidualSizes) else GivenSizes(sizes)


def _spread(sizes: PyTree, like: Vector | tree.Structure, name: str, what: str) -> Vector:
    """The sizes for each entry, from a prefix of the tree with arrays that broadcast."""
    try:
        jtu.tree_map(lambda *_: None, sizes, like)
    except ValueError as error:
        raise ValueError(
            f"`Scaled({name}=...)`: the sizes must be one number, or a PyTree that is a prefix of "
            f"{what}. The sizes are {jtu.tree_structure(sizes)}, {what} {jtu.tree_structure(like)}."
        ) from error

    def one(size, x):
        if not _fits(size.shape, x.shape):
            raise ValueError(
                f"`Scaled({name}=...)`: sizes of shape {size.shape} do not broadcast to a leaf of "
                f"shape {x.shape} of {what}."
            )
        return jnp.broadcast_to(size.astype(jnp.finfo(x.dtype).dtype), x.shape)

    return jtu.tree_map(lambda size, part: jtu.tree_map(ft.partial(one, size), part), sizes, like)


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, wanted) == wanted
    except ValueError:
        return False


def _uniform(seed: int, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniform in (−√3, √3), by a hash of the position: ten operations, where a generator of
    `jax.random` is a program of its own to compile.

    Source: the integer hash of Wellons, "Prospecting for hash functions", 2018 (lowbias32).
    """
    size = int(np.prod(shape))
    h = lax.iota(jnp.uint32, size) + np.uint32((seed + 1) * 0x9E3779B9 % 2**32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    unit = (h >> np.uint32(8)).astype(jnp.float32) * np.float32(2**-23) + np.float32(2**-24 - 1)
    return (np.float32(3**0.5) * unit).reshape(shape)


def _root_mean_square(
    magnitudes: Float[Array, "..."], axes: tuple[int, ...]
) -> Float[Array, "..."]:
    """Over some axes, which stay with length 1; free of overflow and underflow in the squares."""
    largest = jnp.max(magnitudes, axis=axes, keepdims=True, initial=0)
    usable = (largest > 0) & jnp.isfinite(largest)
    divisor = jnp.where(usable, largest, jnp.ones_like(largest))
    count = max(1, int(np.prod([magnitudes.shape[axis] for axis in axes])))
    squares = jnp.sum((magnitudes / divisor) ** 2, axis=axes, keepdims=True)
    return largest * jnp.sqrt(squares / count)


def _completed(magnitudes: Float[Array, "..."], floor: float) -> Float[Array, "..."]:
    """Powers of two near them; near their root mean square where they are at most `floor` times the
    largest."""
    told = magnitudes > floor * jnp.max(magnitudes, initial=0)
    every = tuple(range(magnitudes.ndim))
    mean = _root_mean_square(jnp.where(told, magnitudes, jnp.zeros_like(magnitudes)), every)
    share = jnp.mean(told.astype(magnitudes.dtype)) if magnitudes.size else 1.0
    return _power_of_two(jnp.where(told, magnitudes, mean / jnp.sqrt(share)))


def _usable(sizes: Float[Array, "..."]) -> Bool[Array, "..."]:
    return (sizes > 0) & jnp.isfinite(sizes)


def _power_of_two(sizes: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest power of two, so that scaling makes no rounding errors; 1 for zero, infinity and
    NaN."""
    info = jnp.finfo(sizes.dtype)
    unsigned = np.dtype(f"uint{info.bits}")
    exponent = unsigned.type((2 ** (info.bits - 1) - 1) ^ (2**info.nmant - 1))
    usable = _usable(sizes)
    # Their inverses and a few such factors stay within range too.
    low, high = float(info.tiny) * 16, float(info.max) / 16
    sizes = jnp.clip(jnp.where(usable, sizes, jnp.ones_like(sizes)), low, high)
    bits = lax.bitcast_convert_type(2**0.5 * sizes, unsigned)
    return lax.bitcast_convert_type(bits & exponent, sizes.dtype)

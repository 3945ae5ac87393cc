"""Constant-coefficient operators on a grid, inverted by fast transforms."""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.scipy.fft as jsf
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, Inexact, PyTree

from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..typing import Args, Vector, Y
from .base import AbstractPreconditioner

#: A number or an array over the component axes, or a function of (y, args) that returns one.
Coefficient: TypeAlias = Any


class AbstractBoundary(eqx.Module):
    """The nodes of an axis and what lies beyond its ends: which transform diagonalises −∂²."""

    @abc.abstractmethod
    def angles(self, n: int) -> np.ndarray:
        """θ_k, so that −∂² has the eigenvalues (2 − 2 cos θ_k)/h² on n nodes."""

    @abc.abstractmethod
    def forward(self, x: Array, axis: int) -> Array:
        """From nodes to coefficients, for real x."""

    @abc.abstractmethod
    def backward(self, x: Array, axis: int) -> Array:
        """From coefficients to nodes."""

    def weights(self, n: int) -> np.ndarray | None:
        """w, so that diag(w) (−∂²) is symmetric; `None` where −∂² is."""
        del n
        return None


class Dirichlet(AbstractBoundary):
    """Interior nodes i h, i = 1 … n, h = L/(n + 1), zero at both ends; sine transform (DST-I)."""

    def angles(self, n: int) -> np.ndarray:
        return np.pi * np.arange(1, n + 1) / (n + 1)

    def forward(self, x: Array, axis: int) -> Array:
        # Σ_j x_j sin(π j k/(n + 1)), from the odd continuation of x.
        x = jnp.moveaxis(x, axis, -1)
        zero = jnp.zeros_like(x[..., :1])
        odd = jnp.concatenate([zero, x, zero, -x[..., ::-1]], axis=-1)
        return jnp.moveaxis(-0.5 * jnp.fft.rfft(odd).imag[..., 1:-1], -1, axis)

    def backward(self, x: Array, axis: int) -> Array:
        return (2 / (x.shape[axis] + 1)) * self.forward(x, axis)


class NeumannNodes(AbstractBoundary):
    """Nodes i h, i = 0 … n − 1, h = L/(n − 1), both ends among them; mirrored there, u₋₁ = u₁
    (DCT-I). The first and last rows of −∂² are (2u₀ − 2u₁)/h² and likewise."""

    def angles(self, n: int) -> np.ndarray:
        return np.pi * np.arange(n) / max(n - 1, 1)

    def forward(self, x: Array, axis: int) -> Array:
        if x.shape[axis] == 1:
            return x
        x = jnp.moveaxis(x, axis, -1)
        even = jnp.concatenate([x, x[..., -2:0:-1]], axis=-1)
        return jnp.moveaxis(jnp.fft.rfft(even).real, -1, axis)

    def backward(self, x: Array, axis: int) -> Array:
        return self.forward(x, axis) / max(2 * (x.shape[axis] - 1), 1)

    def weights(self, n: int) -> np.ndarray | None:
        return None if n == 1 else np.r_[0.5, np.ones(n - 2), 0.5]


class NeumannCells(AbstractBoundary):
    """Cell centres (i + ½) h, i = 0 … n − 1, h = L/n, no flux through the ends, u₋₁ = u₀ (DCT-II).
    The first and last rows of −∂² are (u₀ − u₁)/h² and likewise."""

    def angles(self, n: int) -> np.ndarray:
        return np.pi * np.arange(n) / n

    def forward(self, x: Array, axis: int) -> Array:
        return jsf.dct(x, axis=axis, norm="ortho")

    def backward(self, x: Array, axis: int) -> Array:
        return jsf.idct(x, axis=axis, norm="ortho")


class Periodic(AbstractBoundary):
    """Nodes i h, i = 0 … n − 1, h = L/n, u_n = u₀; Fourier transform."""

    def angles(self, n: int) -> np.ndarray:
        return 2 * np.pi * np.fft.fftfreq(n)

    def forward(self, x: Array, axis: int) -> Array:
        return jnp.fft.fft(x, axis=axis)

    def backward(self, x: Array, axis: int) -> Array:
        return jnp.fft.ifft(x, axis=axis)


class Spectral(AbstractPreconditioner):
    """M = c₀ I − Σᵢ cᵢ ∂ᵢ² + Σᵢ bᵢ ∂ᵢ on a uniform grid, with constant coefficients, inverted.

    ∂ᵢ² is the three-point and ∂ᵢ the centred difference, whose eigenvalues (2 cos θ − 2)/h² and
    i sin θ/h are used, not those of the differential operator: where J is such an operator, M = J.
    A mode of eigenvalue zero (c₀ = 0 with `NeumannNodes` or `Periodic` on all axes) is projected
    out: M⁻¹ is then the pseudo-inverse. Where J is not singular too, give a shift.

    **Arguments:**

    - `boundary`: `Dirichlet()`, `NeumannNodes()`, `NeumannCells()` or `Periodic()`, for every axis
      of every leaf; or a tuple of them, one for each of the leading axes of a leaf: the axes that
      follow are components.
    - `diffusion`: c; a number, an array over the component axes, or a tuple of such, one for each
      axis; or a function `(y, args)` that returns one.
    - `shift`: c₀, likewise but without the tuple: the mean of a reaction, say.
    - `convection`: b as c, for `Periodic` axes.
    - `spacing`: h, or a tuple with one for each axis. The default, 1, is that of a residual that
      was multiplied by h²: 4u − Σ neighbours in two dimensions.

    Every leaf of y has the same coefficients; `nks.FieldSplit` gives each its own.

    Storage: one vector at most (two with convection), the eigenvalues. Work: two transforms along
    each axis and a multiplication, O(n log n); no matvec.

    Source: Swarztrauber, SIAM Review 19(3), 1977; Van Loan, Computational Frameworks for the Fast
    Fourier Transform, SIAM 1992, section 4.5.
    """

    boundary: AbstractBoundary | tuple[AbstractBoundary, ...] = eqx.field(
        static=True, default=Dirichlet()
    )
    diffusion: Coefficient = 1.0
    shift: Coefficient = 0.0
    convection: Coefficient = None
    spacing: Any = 1.0

    def __check_init__(self):
        boundary = self.boundary if isinstance(self.boundary, tuple) else (self.boundary,)
        if not boundary or not all(isinstance(b, AbstractBoundary) for b in boundary):
            raise TypeError(
                "`Spectral(boundary)`: give `nks.Dirichlet()`, `nks.NeumannNodes()`, "
                "`nks.NeumannCells()` or `nks.Periodic()`, or a tuple of them, one for each axis "
                f"of the grid; got {self.boundary!r}."
            )

    def init(self, operator: lx.AbstractLinearOperator, y: Y, args: Args) -> Any:
        at = lambda c: c(y, args) if callable(c) else c
        diffusion, shift, convection = at(self.diffusion), at(self.shift), at(self.convection)
        structure = operator.in_structure()
        leaves, treedef = jtu.tree_flatten(structure)
        axes = [_Axes.of(self.boundary, leaf) for leaf in leaves]
        symbols = [a.symbols(shift, diffusion, convection, self.spacing) for a in axes]
        inverse = jtu.tree_unflatten(treedef, [s[0] for s in symbols])
        transposed = None
        if convection is not None:
            transposed = jtu.tree_unflatten(treedef, [s[1] for s in symbols])
        symmetric = transposed is None and not any(a.weighted for a in axes)
        tags = frozenset({lx.symmetric_tag} if symmetric else ())
        linear_map = _Spectral(inverse, transposed, tuple(axes))
        return JacobianOperator(linear_map, operator.out_structure(), structure, tags)

    def as_operator(self, state: Any) -> lx.AbstractLinearOperator:
        return state

    @property
    def keeps_symmetry(self) -> bool:
        boundary = self.boundary if isinstance(self.boundary, tuple) else (self.boundary,)
        weighted = any(type(b).weights is not AbstractBoundary.weights for b in boundary)
        return self.convection is None and not weighted


class _Axes(eqx.Module):
    """The grid of one leaf: its leading axes."""

    boundaries: tuple[AbstractBoundary, ...] = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)  # of the transforms

    @staticmethod
    def of(boundary: Any, leaf: Any) -> "_Axes":
        boundaries = boundary if isinstance(boundary, tuple) else (boundary,) * leaf.ndim
        if leaf.ndim < len(boundaries) or leaf.ndim == 0:
            raise ValueError(
                f"`Spectral`: a leaf of shape {leaf.shape} is no grid of {len(boundaries)} axes. "
                "Precondition other leaves by other means: see `nks.FieldSplit`."
            )
        return _Axes(boundaries, leaf.shape, np.dtype(np.promote_types(leaf.dtype, np.float32)))

    @property
    def weighted(self) -> bool:
        """Whether −∂² is not symmetric on some axis."""
        return any(
            b.weights(n) is not None for b, n in zip(self.boundaries, self.shape, strict=False)
        )

    @property
    def periodic(self) -> tuple[int, ...]:
        return tuple(i for i, b in enumerate(self.boundaries) if isinstance(b, Periodic))

    @property
    def complex(self) -> bool:
        return np.issubdtype(self.dtype, np.complexfloating)

    def symbols(self, shift, diffusion, convection, spacing) -> tuple[Array, Array | None]:
        """1/λ of M and of its transpose, on the grid of coefficients."""
        d = len(self.boundaries)
        even, odd = self._expanded("shift", shift), None
        halved = self.periodic[-1:] if not self.complex else ()  # real vectors: half the modes
        for i, (boundary, n) in enumerate(zip(self.boundaries, self.shape, strict=False)):
            theta = boundary.angles(n)
            theta = theta[: n // 2 + 1] if i in halved else theta
            along = [1] * len(self.shape)
            along[i] = len(theta)
            h = self._expanded("spacing", _for_axis(spacing, i, d, "spacing"))
            c = self._expanded("diffusion", _for_axis(diffusion, i, d, "diffusion"))
            even = even + c / h**2 * self._real(4 * np.sin(theta / 2) ** 2).reshape(along)
            b = None if convection is None else _for_axis(convection, i, d, "convection")
            if b is None:
                continue
            if not isinstance(boundary, Periodic):
                if isinstance(b, (int, float)) and b == 0:
                    continue
                raise ValueError(
                    "`Spectral(convection)` is for periodic axes: sines and cosines do not "
                    f"diagonalise ∂ on axis {i}, {boundary}. Give 0 there, and leave that term "
                    "to the Krylov method."
                )
            term = self._expanded("convection", b) / h * self._real(np.sin(theta)).reshape(along)
            odd = term if odd is None else odd + term
        if odd is None:
            inverse = self._reciprocal(even)
            return inverse, inverse
        imaginary = jnp.asarray(1j, np.promote_types(self.dtype, np.complex64))
        even, odd = even.astype(imaginary.dtype), imaginary * odd.astype(imaginary.dtype)
        return self._reciprocal(even + odd), self._reciprocal(even - odd)

    def transform(self, x: Array, inverse: Array) -> Array:
        """M⁻¹ x."""
        dtype, x = x.dtype, x.astype(self.dtype)
        others = [i for i in range(len(self.boundaries)) if i not in self.periodic]
        for i in others:
            x = _by_parts(self.boundaries[i].forward, x, i)
        if self.periodic and not self.complex:
            sizes = [self.shape[i] for i in self.periodic]
            modes = jnp.fft.rfftn(x, axes=self.periodic) * inverse.astype(_complex(self.dtype))
            x = jnp.fft.irfftn(modes, s=sizes, axes=self.periodic)
        else:
            for i in self.periodic:
                x = self.boundaries[i].forward(x, i)
            x = x * inverse.astype(self.dtype)
            for i in self.periodic:
                x = self.boundaries[i].backward(x, i)
        for i in others:
            x = _by_parts(self.boundaries[i].backward, x, i)
        return x.astype(dtype)

    def weigh(self, x: Array, power: int) -> Array:
        """W^power x, where W M is symmetric but for convection."""
        for i, (boundary, n) in enumerate(zip(self.boundaries, self.shape, strict=False)):
            weights = boundary.weights(n)
            if weights is not None:
                along = [1] * x.ndim
                along[i] = n
                x = x * jnp.asarray(weights**power, x.dtype).reshape(along)
        return x

    def _real(self, values: np.ndarray) -> Array:
        return jnp.asarray(values, np.finfo(self.dtype).dtype).astype(self.dtype)

    def _expanded(self, name: str, c: Any) -> Inexact[Array, "..."]:
        """A coefficient with the leaf's number of axes."""
        c, d = jnp.asarray(c), len(self.boundaries)
        if jnp.iscomplexobj(c) and not self.complex:
            raise ValueError(f"`Spectral({name})` is complex, but the unknown is real.")
        components = self.shape[d:]
        try:
            fits = np.broadcast_shapes(c.shape, components) == components
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"`Spectral({name})` has shape {c.shape}, which does not fit the component axes "
                f"{components} of a leaf of shape {self.shape} whose first {d} axes are the grid. "
                "Give one boundary for each axis of the grid, in a tuple, to say which these are."
            )
        return c.astype(self.dtype).reshape((1,) * (len(self.shape) - c.ndim) + c.shape)

    def _reciprocal(self, symbol: Array) -> Array:
        size = jnp.abs(symbol)
        null = size <= 10 * np.finfo(self.dtype).eps * jnp.max(size)
        return jnp.where(null, jnp.zeros_like(symbol), 1 / jnp.where(null, 1, symbol))


class _Spectral(AbstractLinearMap):
    """v → M⁻¹v."""

    inverse: PyTree[Array]  # 1/λ
    transposed: PyTree[Array] | None  # that of Mᵀ, where it is another
    axes: tuple[_Axes, ...]

    def mv(self, vector: Vector) -> Vector:
        return self._each(lambda axes, x, inverse: axes.transform(x, inverse), vector, self.inverse)

    def transpose_mv(self, vector: Vector) -> Vector:
        inverse = self.inverse if self.transposed is None else self.transposed

        def apply(axes, x, inverse):  # W M = MᵀW but for convection
            return axes.weigh(axes.transform(axes.weigh(x, -1), inverse), 1)

        return self._each(apply, vector, inverse)

    def _each(self, apply: Callable[..., Array], vector: Vector, inverse: PyTree) -> Vector:
        leaves, treedef = jtu.tree_flatten(vector)
        inverses = jtu.tree_leaves(inverse)
        return jtu.tree_unflatten(
            treedef, [apply(*each) for each in zip(self.axes, leaves, inverses, strict=True)]
        )


def _for_axis(value: Any, i: int, d: int, name: str) -> Any:
    if not isinstance(value, (tuple, list)):
        return value
    if len(value) != d:
        raise ValueError(
            f"`Spectral({name})` has {len(value)} entries for a grid of {d} axes: give one for "
            "each axis, or a single one for all."
        )
    return value[i]


def _by_parts(transform: Callable[[Array, int], Array], x: Array, axis: int) -> Array:
    """A real transform of real or complex values."""
    if not jnp.iscomplexobj(x):
        return transform(x, axis)
    real, imaginary = transform(x.real, axis), transform(x.imag, axis)
    return lax.complex(real, imaginary)


def _complex(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.promote_types(dtype, np.complex64))

"""`deflate`: take known roots out of a residual, to find others from the same start."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from .. import tree
from ..typing import Args, Flag, Fn, Scalar, Vector, Y


def deflate(
    fn: Fn,
    roots: Any,
    *,
    power: float = 2.0,
    shift: float = 1.0,
    scale: Any = 1.0,
    has_aux: bool = False,
) -> "DeflatedResidual":
    """The residual G(y) = m(y) F(y), m(y) = Π (‖(y − rᵢ)/scale‖₂^−power + shift).

    G has the roots of F but for the known ones rᵢ, near which it grows without bound, so that a
    solver that makes ‖G‖ smaller does not come back to them. Far from all rᵢ, m ≈ shift^(number of
    roots).

    `nks.root_find(nks.deflate(fn, roots), solver, y0, args)` works with any solver. Its Jacobian
    m J + F (∇m)ᵀ is dense whatever J is, which a preconditioner that probes J
    by colours does not survive; `nks.Deflated(solver, roots)` solves with J instead.

    **Arguments:**

    - `fn`: the residual F(y, args); with `has_aux` a pair.
    - `roots`: the known roots: a list or tuple of points like y, or one point with a further first
      axis in every leaf. A root with a NaN or an infinity in it is left out, so that a buffer of
      fixed size can be filled as roots are found, without compiling again.
    - `power`: p; the rate at which G grows near a root. It must exceed the multiplicity of the
      root, or G goes to 0 there: 2 does for simple roots.
    - `shift`: σ; with 0 the residual falls off away from the known roots, and solvers run there.
    - `scale`: a number, or a PyTree like y with one for each leaf or each entry, in whose units
      distances are measured.

    At a known root G is infinite, never 0/0: a start there fails with `nonfinite`, and a line
    search steps back from one.

    The roots take part in no derivative: that of a root of G is that of the same root of F, since
    ∂G = m ∂F wherever F = 0.

    Storage: the roots. Work: one evaluation of `fn`, and one distance for each root.

    Source: Farrell, Birkisson & Funke, SIAM J. Sci. Comput. 37(4), 2015, §2–3.
    """
    return DeflatedResidual(fn, Deflation(roots, power, shift, scale), has_aux)


class DeflatedResidual(eqx.Module):
    """What `nks.deflate` returns: `(y, args) -> m(y) fn(y, args)`."""

    fn: Fn
    deflation: "Deflation"
    has_aux: bool = eqx.field(static=True)

    def __call__(self, y: Y, args: Args) -> Any:
        out = self.fn(y, args)
        value, aux = out if self.has_aux else (out, None)
        at = self.deflation(eqx.filter(y, eqx.is_inexact_array))
        value = at.times(value)
        return (value, aux) if self.has_aux else value


class Factor(NamedTuple):
    """m at a point."""

    value: Scalar
    log_gradient: Vector  # ∇m/m
    at_root: Flag

    def times(self, vector: Vector) -> Vector:
        """m v; infinite at a known root."""
        infinite = jnp.full_like(self.value, jnp.inf)

        def one(x):
            x = jnp.asarray(x)
            product = self.value.astype(x.dtype) * x
            return jnp.where(self.at_root, infinite.astype(x.dtype), product)

        return jtu.tree_map(one, vector)


class Deflation(eqx.Module):
    """m(y) = Π (‖(y − rᵢ)/scale‖₂^−p + σ) and its gradient."""

    roots: Any
    power: float
    shift: float
    scale: Any

    def __init__(self, roots: Any, power: float = 2.0, shift: float = 1.0, scale: Any = 1.0):
        if isinstance(power, int | float) and not power > 0:
            raise ValueError(f"`power` must be positive, but it is {power}.")
        if isinstance(shift, int | float) and not shift >= 0:
            raise ValueError(f"`shift` must not be negative, but it is {shift}.")
        self.roots = jtu.tree_map(_as_array, roots)
        self.power, self.shift = power, shift
        self.scale = jtu.tree_map(_as_array, scale)

    def __call__(self, y: Vector) -> Factor:
        """m and ∇m/m at y."""
        dtype = tree.real_dtype(y)
        roots = lax.stop_gradient(self._stacked(y))
        count = jtu.tree_leaves(roots)[0].shape[0] if jtu.tree_leaves(roots) else 0
        one = jnp.ones((), dtype)
        if count == 0:
            return Factor(one, tree.zeros_like(y), jnp.zeros((), bool))
        scales = self._scales(y)
        known = jnp.stack([_finite_rows(r) for r in jtu.tree_leaves(roots)]).all(axis=0)
        away = jtu.tree_map(lambda x, r, s: _units(x[None] - r, s), y, roots, scales)
        away = jtu.tree_map(lambda d: jnp.where(_rows(known, d), d, jnp.zeros_like(d)), away)
        squares = sum(_squares(d, dtype) for d in jtu.tree_leaves(away))
        at_root = jnp.any(known & (squares == 0))
        squares = jnp.where(squares > 0, squares, jnp.ones_like(squares))
        power, shift = (jnp.asarray(x).astype(dtype) for x in (self.power, self.shift))
        near = squares ** (-0.5 * power)  # d⁻ᵖ
        value = jnp.prod(jnp.where(known, near + shift, jnp.ones_like(near)))
        # ∇ log(d⁻ᵖ + σ) = −p (y − r)/(d² (1 + σ dᵖ)).
        weights = -power / (squares * (1 + shift * squares ** (0.5 * power)))

        def gradient(d, s):
            return _units(jnp.tensordot(weights.astype(d.dtype), d, 1), s)

        return Factor(value, jtu.tree_map(gradient, away, scales), at_root)

    def _stacked(self, y: Vector) -> Vector:
        """The roots along a new first axis."""
        shapes = tree.structure(y)

        def fits(candidate, lead):
            if jtu.tree_structure(candidate) != jtu.tree_structure(shapes):
                return False
            pairs = zip(jtu.tree_leaves(candidate), jtu.tree_leaves(shapes), strict=True)
            return all(x.ndim >= lead and x.shape[lead:] == s.shape for x, s in pairs)

        stacked = eqx.filter(self.roots, eqx.is_inexact_array)
        if fits(stacked, 1):
            lengths = {leaf.shape[0] for leaf in jtu.tree_leaves(stacked)}
            if len(lengths) == 1:
                return tree.cast_like(stacked, y)
        if isinstance(self.roots, list | tuple):
            points = [eqx.filter(r, eqx.is_inexact_array) for r in self.roots]
            if all(fits(point, 0) for point in points):
                if not points:
                    return jtu.tree_map(lambda x: jnp.zeros((0, *x.shape), x.dtype), y)
                cast = [tree.cast_like(point, y) for point in points]
                return jtu.tree_map(lambda *leaves: jnp.stack(leaves), *cast)
        told = jtu.tree_map(lambda x: f"{x.dtype}{list(x.shape)}", shapes)
        raise ValueError(
            "`roots` must be a list of points like y, or one such point with a further first axis "
            f"in every leaf. y is {told}, `roots` is "
            f"{jtu.tree_map(lambda x: getattr(x, 'shape', x), self.roots)}."
        )

    def _scales(self, y: Vector) -> PyTree:
        """One scale for each leaf, a number or an array like it."""
        shapes = [x.shape for x in jtu.tree_leaves(y)]
        leaves, treedef = jtu.tree_flatten(y)
        given = jtu.tree_leaves(self.scale)
        if len(given) == 1 and given[0].ndim == 0:
            given = given * len(leaves)
        elif jtu.tree_structure(self.scale) != treedef or any(
            s.shape not in ((), shape) for s, shape in zip(given, shapes, strict=True)
        ):
            raise ValueError(
                "`scale` must be a number, or a PyTree like y with a number or an array of the "
                f"leaf's shape for each leaf; y has shapes {shapes}, "
                f"`scale` {[s.shape for s in given]}."
            )
        return jtu.tree_unflatten(treedef, [lax.stop_gradient(s) for s in given])


def _as_array(leaf: Any) -> Any:
    number = isinstance(leaf, int | float | complex | np.ndarray | np.generic)
    return jnp.asarray(leaf) if number and not isinstance(leaf, bool) else leaf


def _units(x: Array, scale: Array) -> Array:
    """x/scale, for x with or without the axis of the roots."""
    scale = scale.astype(x.dtype)
    return x / (scale if scale.ndim in (0, x.ndim) else scale[None])


def _squares(d: Array, dtype: Any) -> Float[Array, " roots"]:
    return jnp.sum((d * d.conj()).real.astype(dtype).reshape(d.shape[0], -1), axis=1)


def _finite_rows(x: Array) -> Bool[Array, " roots"]:
    return jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1)


def _rows(flags: Bool[Array, " roots"], x: Array) -> Array:
    return flags.reshape(-1, *([1] * (x.ndim - 1)))

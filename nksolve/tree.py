"""A PyTree of inexact arrays as a vector of a real or complex space.

Leaves may differ in dtype. Scalars (inner products, norms) are computed in the real dtype that
holds every leaf, at least float32, and are cast back to a leaf's own dtype where they multiply it,
so that nothing here depends on implicit dtype promotion.
"""

import functools as ft
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .typing import Count, Flag, NumberLike, Scalar, Vector

#: The shapes and dtypes of a `Vector`.
Structure: TypeAlias = PyTree[jax.ShapeDtypeStruct]


def real_dtype(tree: Vector | Structure) -> np.dtype:
    """The real dtype in which scalars over `tree` are computed; at least float32."""
    dtypes = [jnp.finfo(leaf.dtype).dtype for leaf in jtu.tree_leaves(tree)]
    return ft.reduce(np.promote_types, dtypes, np.dtype(np.float32 if dtypes else float_dtype()))


def scalar_dtype(tree: Vector | Structure) -> np.dtype:
    """The dtype of inner products over `tree`: complex if a leaf is."""
    real = real_dtype(tree)
    if any(jnp.iscomplexobj(leaf) for leaf in jtu.tree_leaves(tree)):
        return np.result_type(real, np.complex64)
    return real


def float_dtype() -> np.dtype:
    """JAX's default floating-point dtype."""
    return np.dtype(np.float64 if jax.config.jax_enable_x64 else np.float32)  # pyright: ignore


def eps(tree: Vector | Structure) -> float:
    """Unit round-off of the coarsest leaf: what a residual over `tree` can be resolved to."""
    return max([float(jnp.finfo(leaf.dtype).eps) for leaf in jtu.tree_leaves(tree)] or [0.0])


def size(tree: Vector | Structure) -> int:
    """Number of entries."""
    return sum(leaf.size for leaf in jtu.tree_leaves(tree))


def vdot(a: Vector, b: Vector) -> Array:
    """aᴴ b, conjugating the first argument."""
    dtype = scalar_dtype(a)
    products = jtu.tree_map(lambda x, y: jnp.vdot(x.astype(dtype), y.astype(dtype)), a, b)
    return ft.reduce(jnp.add, jtu.tree_leaves(products), jnp.zeros((), dtype))


def norm2(a: Vector) -> Scalar:
    """‖a‖₂, free of overflow and underflow in the squares."""
    scale = max_norm(a)
    divisor = jnp.where((scale > 0) & jnp.isfinite(scale), scale, jnp.ones_like(scale))

    def squares(x):
        x = jnp.abs(x).astype(divisor.dtype) / divisor
        return jnp.sum(x * x)

    total = sum((squares(x) for x in jtu.tree_leaves(a)), jnp.zeros((), divisor.dtype))
    return divisor * jnp.sqrt(total)


def max_norm(a: Vector) -> Scalar:
    """‖a‖∞."""
    dtype = real_dtype(a)
    maxima = [jnp.max(jnp.abs(x)).astype(dtype) for x in jtu.tree_leaves(a) if x.size > 0]
    return ft.reduce(jnp.maximum, maxima, jnp.zeros((), dtype))


def scale(c: NumberLike, a: Vector) -> Vector:
    """c a."""
    return jtu.tree_map(lambda x: jnp.asarray(c).astype(x.dtype) * x, a)


def axpy(c: NumberLike, a: Vector, b: Vector) -> Vector:
    """c a + b."""
    return jtu.tree_map(lambda x, y: jnp.asarray(c).astype(x.dtype) * x + y, a, b)


def add(a: Vector, b: Vector) -> Vector:
    """a + b."""
    return jtu.tree_map(jnp.add, a, b)


def sub(a: Vector, b: Vector) -> Vector:
    """a − b."""
    return jtu.tree_map(jnp.subtract, a, b)


def neg(a: Vector) -> Vector:
    """−a."""
    return jtu.tree_map(jnp.negative, a)


def conj(a: Vector) -> Vector:
    """The complex conjugate."""
    return jtu.tree_map(jnp.conj, a)


def narrow(dtype: Any, low: np.dtype) -> np.dtype:
    """The dtype that stands for `dtype` where `low` is the widest real one."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        widest = np.result_type(low, np.complex64)
    elif jnp.issubdtype(dtype, jnp.floating):
        widest = np.dtype(low)
    else:
        return np.dtype(dtype)
    return widest if np.dtype(dtype).itemsize > widest.itemsize else np.dtype(dtype)


def cast(a: PyTree, low: np.dtype) -> PyTree:
    """The vector (or tree of `jax.ShapeDtypeStruct`s) with dtypes no wider than `low`."""

    def one(x):
        dtype = narrow(x.dtype, low)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, dtype)
        return x.astype(dtype)

    return jtu.tree_map(one, a)


def cast_like(a: Vector, b: Vector | Structure) -> Vector:
    """a in the dtypes of b."""
    return jtu.tree_map(lambda x, y: x.astype(y.dtype), a, b)


def zeros_like(a: PyTree) -> PyTree:
    """The zero vector of a's space (a may also be a tree of `jax.ShapeDtypeStruct`s)."""
    return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), a)


def where(condition: Flag, a: PyTree, b: PyTree) -> PyTree:
    """a if `condition` else b, leaf by leaf, for one scalar condition (any array dtype)."""
    return jtu.tree_map(lambda x, y: jnp.where(condition, x, y), a, b)


def count(flag: Flag) -> Count:
    """1 where the flag holds, else 0: for counters."""
    return flag.astype(jnp.int32)


def structure(a: Vector | Structure) -> Structure:
    """The tree of `jax.ShapeDtypeStruct`s of a vector."""
    return jtu.tree_map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), a)


def freeze(structure: Structure) -> tuple:
    """A tree of structs as a hashable value, for a static field; `thaw` undoes it."""
    leaves, treedef = jtu.tree_flatten(structure)
    return tuple(leaves), treedef


def thaw(frozen: tuple) -> Structure:
    """The tree that was frozen."""
    leaves, treedef = frozen
    return jtu.tree_unflatten(treedef, leaves)

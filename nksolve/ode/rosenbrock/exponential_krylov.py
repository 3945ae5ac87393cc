"""Krylov spaces that grow until functions of a matrix times a vector are found in them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from ... import tree
from ...loops import any_lane
from ...typing import Count, Scalar, Vector
from ..esdirk import combined, put
from .arnoldi import next_vector, normalised
from .phi import first_columns

# Vectors before the first look at the estimate, which takes a small exponential; then half as many
# as there are.
_FIRST = 4
# Parts of an interval: more than these mean a matrix that no step has.
_MOST_PARTS = 1000


class Space(NamedTuple):
    """A K_m(A, b) with A V_m = V_{m+1} H, rows beyond m + 1 zero, and what was wanted in it."""

    basis: Vector  # (size + 1, …)
    hessenberg: Array  # (size + 1, size + 1): H, its last column zero
    norm: Scalar  # ‖b‖
    num: Count  # m
    weights: Array  # (wanted, size + 1): V_{m+1}-coordinates, for b of norm 1
    estimate: Scalar  # of the largest error
    span: Scalar  # the part of the interval that it serves


def grown(
    mv: Callable[[Vector], Vector],
    start: Vector,
    weigh: Callable[[Array, Scalar], Array],
    norm_of: Callable[[Vector], Scalar],
    *,
    size: int,
    span: Scalar,
    least_span: Scalar,
    allowed: Scalar,
) -> Space:
    """A space in which `weigh(H, span)` is found to `allowed`, in at most `size` products.

    With the square matrix H of m + 1 rows, its last column zero, the coordinate of φ_k(H)e₁ along
    v_{m+1} is h_{m+1,m} e_mᵀφ_{k+1}(H_m)e₁: the leading term of the error that V_m leaves, which
    is the estimate, and which is taken into the result. Where the space is full and that is too
    large, the span is halved down to `least_span`. The estimate is NaN if products are.

    Source: Saad, Analysis of some Krylov subspace approximations to the matrix exponential
    operator, SIAM J. Numer. Anal. 29 (1992), Theorem 5.1 and §5.2.
    """
    dtype = span.dtype
    nowhere = size + 2
    first, norm = normalised(start, jnp.zeros((), dtype))
    basis = jtu.tree_map(lambda x: jnp.zeros((size + 1, *x.shape), x.dtype), start)
    hessenberg = jnp.zeros((size + 1, size + 1), dtype)
    unknown = jnp.where(jnp.isfinite(tree.norm2(start)), jnp.inf, jnp.nan).astype(dtype)

    def running(at: Space) -> Any:
        return (at.estimate > allowed) & ((at.num < size) | (at.span > least_span))

    def body(at: Space) -> Space:
        active = running(at)
        growing = active & (at.num < size)

        num = jnp.minimum(at.num + jnp.maximum(_FIRST, at.num // 2), size)
        num = jnp.where(growing, num, at.num)

        def extended(both):
            j, basis, h = both
            new, column, norm = next_vector(mv, basis, j)
            # A lane that is done is left alone: its places do not exist.
            here = j < num
            column = column.at[j + 1].set(norm, mode="drop")
            h = h.at[:, jnp.where(here, j, nowhere)].set(column, mode="drop")
            place = jnp.where(here, j + 1, nowhere)
            put_there = lambda rows, x: rows.at[place].set(x, mode="drop")
            return jnp.minimum(j + 1, num), jtu.tree_map(put_there, basis, new), h

        _, basis, hessenberg = lax.while_loop(
            lambda both: any_lane(both[0] < num), extended, (at.num, at.basis, at.hessenberg)
        )
        span = jnp.where(active & ~growing, jnp.maximum(at.span / 2, least_span), at.span)
        weights = weigh(hessenberg, span)
        beyond = jtu.tree_map(lambda rows: rows[num], basis)
        left = norm * jnp.max(jnp.abs(weights[:, num])) * norm_of(beyond).astype(dtype)
        return Space(
            basis,
            hessenberg,
            norm,
            num,
            jnp.where(active, weights, at.weights),
            jnp.where(active, left, at.estimate),
            span,
        )

    wanted = jax.eval_shape(weigh, hessenberg, span).shape
    at = Space(
        basis=put(basis, 0, first),
        hessenberg=hessenberg,
        norm=norm,
        num=jnp.zeros((), jnp.int32),
        weights=jnp.zeros(wanted, dtype),
        estimate=jnp.where(norm > 0, unknown, jnp.where(jnp.isnan(unknown), unknown, 0)),
        span=span,
    )
    return lax.while_loop(lambda at: any_lane(running(at)), body, at)


def propagated(
    mv: Callable[[Vector], Vector],
    start: Vector,
    end: Scalar,
    visit: Callable[[Any, Space, Scalar], Any],
    carry: Any,
    *,
    size: int,
    rtol: Scalar,
) -> tuple[Vector, Any]:
    """(exp(end A) start, carry), in as many parts as spaces of `size` vectors ask for.

    `visit(carry, space, left)` sees each part: `space.span` of the interval of length `left` that
    was left before it, with exp(span H)e₁ in `space.weights[1]`.

    Source: Sidje, Expokit, ACM Trans. Math. Softw. 24 (1998), §3, with halving.
    """

    def weigh(h, span):
        return first_columns(span * h, 1)[:, 0]

    def body(at):
        v, left, carry, parts = at
        active = left > 0
        space = grown(
            mv,
            tree.where(active, v, tree.zeros_like(v)),
            weigh,
            tree.norm2,
            size=size,
            span=left,
            least_span=left * 2.0**-40,
            allowed=rtol * tree.norm2(v).astype(left.dtype),
        )
        new = tree.scale(space.norm, combined(space.weights[1], space.basis))
        lost = jnp.isnan(space.estimate)
        rest = jnp.where(lost, 0, left - space.span)
        new = jtu.tree_map(lambda x: jnp.where(lost, jnp.nan, x), new)
        carry = tree.where(active, visit(carry, space, left), carry)
        return tree.where(active, new, v), jnp.where(active, rest, left), carry, parts + 1

    left = jnp.where(tree.norm2(start) > 0, end, jnp.zeros_like(end))
    nothing = jnp.zeros((), jnp.int32)
    v, left, carry, _ = lax.while_loop(
        lambda at: any_lane((at[1] > 0) & (at[3] < _MOST_PARTS)),
        body,
        (start, left, carry, nothing),
    )
    v = jtu.tree_map(lambda x: jnp.where(left > 0, jnp.nan, x), v)
    return v, carry

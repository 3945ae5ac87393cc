"""φ-functions of h f_y times a vector, as differentiable functions of both."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from ... import tree
from ...adjoint.base import anchored
from ...linearise.linearisation import Linearisation
from ...loops import any_lane
from ...rule import ForwardRule
from ...typing import Scalar, Vector
from ..attach import Increment
from ..esdirk import combined
from .exponential_krylov import Space, propagated
from .phi import augmented, exponentials


class Frame(eqx.Module):
    """Real coordinates in which the weights of the error norm are one: D⁻¹y, complex entries as
    pairs; and a scaled time."""

    scale: Vector  # D
    per_time: Scalar  # a scaled time of one, in units of t

    def inward(self, y: Vector) -> Vector:
        """D⁻¹ y, in real arrays."""

        def one(x, d):
            if jnp.iscomplexobj(x):
                return jnp.stack([x.real, x.imag]) / d.astype(x.real.dtype)[None]
            return x / d.astype(x.dtype)

        return jtu.tree_map(one, y, self.scale)

    def outward(self, v: Vector) -> Vector:
        """D v, in arrays like y's."""

        def one(x, d):
            if x.ndim > d.ndim:
                d = d.astype(x.dtype)
                return lax.complex(x[0] * d, x[1] * d)
            return x * d.astype(x.dtype)

        return jtu.tree_map(one, v, self.scale)


class Point(eqx.Module):
    """Where the matrix is taken: A = D⁻¹ (∂F/∂y) D at (t0, y0), and what else it depends on."""

    increment: Increment
    t0: Scalar
    y0: Vector

    def product(self, frame: Frame, x: tuple[Vector, Scalar]) -> Vector:
        """A v + s D⁻¹(∂F/∂t) for x = (v, s)."""
        v, s = x
        at = (jnp.asarray(self.t0), self.y0)
        by = ((s * frame.per_time).astype(at[0].dtype), frame.outward(v))
        return frame.inward(jax.jvp(self.increment, at, by)[1])


class Wanted(NamedTuple):
    """Σ_k weights[r, k] cᵏφ_k(cA) v for every r, with c = ends[r]."""

    ends: Array  # (R,), each ½ or 1
    weights: Array  # (R, p + 1), for φ₀ … φ_p


class Held(eqx.Module):
    """With what derivatives are found; not differentiated."""

    space: Space
    wanted: Wanted
    frame: Frame
    lin: Linearisation
    rtol: Scalar
    size: int = eqx.field(static=True)

    def matvec(self, v: Vector) -> Vector:
        """A v."""
        return self.frame.inward(self.lin.operator.mv(self.frame.outward(v)))

    def transposed_matvec(self, v: Vector) -> Vector:
        """Aᵀ v."""
        return jax.linear_transpose(self.matvec, v)(v)[0]


@ForwardRule
def attach(point: Point, v: Vector, *, found: Vector, held: Held) -> Vector:
    """`held.wanted` as rows, which were `found` beforehand."""
    del point, v, held
    return found


@attach.def_jvp
def _attach_jvp(primals, tangents, *, found, held):
    """u = cᵏφ_k(cA)v is u(c) with u' = A u + s^{k−1}/(k−1)! v, so that
    u̇' = A u̇ + Ȧ u + s^{k−1}/(k−1)! v̇.

    u(s) is in the space that was found: Ȧ u = Σ_j x_j(s) Ȧ v_j with the basis v_j held. What
    remains is linear in all Ȧ v_j and v̇, and is solved by Krylov spaces of its own, of Aᵀ in
    reverse mode: the derivative is that of φ_k(cA) v, not that of the Arnoldi process, which knows
    nothing of what leaves its space.
    """
    (point, v), (t_point, t_v) = primals, tangents
    out = attach(point, v, found=found, held=held)
    point, v = _once((point, v))
    frame, space = held.frame, held.space
    leaves, treedef = jtu.tree_flatten(point)
    d_leaves = treedef.flatten_up_to(t_point)
    chosen = [x for x, d in zip(leaves, d_leaves, strict=True) if d is not None]
    d_chosen = [
        jnp.asarray(d, x.dtype) for x, d in zip(leaves, d_leaves, strict=True) if d is not None
    ]

    def product(x, *moving):
        moving = iter(moving)
        merged = [x if d is None else next(moving) for x, d in zip(leaves, d_leaves, strict=True)]
        return jtu.tree_unflatten(treedef, merged).product(frame, x)

    def change(at):
        j, row = at
        moved = lambda: jax.jvp(lambda *m: product(row, *m), tuple(chosen), tuple(d_chosen))[1]
        nothing = lambda: tree.zeros_like(row[0])
        return lax.cond(j <= space.num, moved, nothing)

    num_rows = space.hessenberg.shape[0]
    if chosen:
        forcing = lax.map(change, (jnp.arange(num_rows, dtype=jnp.int32), space.basis))
    else:
        forcing = tree.zeros_like(space.basis[0])
    d_v = jtu.tree_map(
        lambda x, d: jnp.zeros_like(x) if d is None else jnp.asarray(d, x.dtype),
        v,
        t_v,
        is_leaf=lambda x: x is None,
    )
    count = held.wanted.ends.shape[0]
    rows = max(num_rows, count)
    inputs = (_resized(forcing, rows), d_v)
    moving = [*d_chosen, *(d for d in jtu.tree_leaves(t_v) if d is not None)]
    inputs = anchored(inputs, [False] * len(jtu.tree_leaves(inputs)), moving)

    # A linear map of inputs to results of another shape, which are put where the inputs were.
    def solve(_, b):
        return _resized(_forward(held, b), rows), tree.zeros_like(b[1])

    def transpose_solve(_, b):
        forcing, start = _transposed(held, _resized(b[0], count))
        return _resized(forcing, rows), start

    solved, _ = lax.custom_linear_solve(lambda x: x, inputs, solve, transpose_solve)
    return out, _resized(solved, count)


class _Small(NamedTuple):
    """q' = T q: q = (ξ, μ), of which Σ_j ξ_j Ȧv_j β + μ₀ v̇ is the inhomogeneity."""

    matrix: Array
    starts: Array  # (R, …): q(0)
    num_rows: int


def _small(held: Held) -> _Small:
    weights = held.wanted.weights
    num_rows = held.space.hessenberg.shape[0]
    matrix = augmented(held.space.hessenberg, weights.shape[1] - 1)
    first = jnp.zeros((weights.shape[0], num_rows), weights.dtype).at[:, 0].set(weights[:, 0])
    return _Small(matrix, jnp.concatenate([first, weights[:, 1:]], axis=1), num_rows)


def _forward(held: Held, inputs: tuple[Vector, Vector]) -> Vector:
    """Rows of u̇, by the exponential of [[A, B], [0, T]]."""
    forcing, v = inputs
    small, beta = _small(held), held.space.norm
    forcing = jtu.tree_map(lambda x: x[: small.num_rows], forcing)
    # In units in which B has the norm one.
    unit = beta * tree.norm2(forcing).astype(beta.dtype) + tree.norm2(v).astype(beta.dtype)
    per_unit = jnp.where(unit > 0, 1 / jnp.where(unit > 0, unit, 1), 0)

    def mv(x):
        z, q = x
        by = tree.scale(per_unit * beta, combined(q[: small.num_rows], forcing))
        by = tree.axpy(per_unit * q[small.num_rows], v, by)
        product = jnp.matmul(small.matrix, q, precision=lax.Precision.HIGHEST)
        return tree.add(held.matvec(z), by), product

    def one(row):
        end, weights, start = row
        start = tree.scale(per_unit * weights[0], v), jnp.where(unit > 0, start, 0)
        size = min(held.size, tree.size(start))
        visit = lambda carry, space, left: carry
        (z, _), _ = propagated(mv, start, end, visit, None, size=size, rtol=held.rtol)
        return tree.scale(unit, z)

    return lax.map(one, (*held.wanted, small.starts))


def _transposed(held: Held, cotangents: Vector) -> tuple[Vector, Vector]:
    """Cotangents of (β B, v̇): ∫ λ(s) q(s)ᵀ ds with λ(s) = exp((c − s)Aᵀ) μ, in the space of λ."""
    small = _small(held)

    def one(carry, row):
        (end, weights, start), mu = row

        def visit(both, space, left):
            before = left - space.span

            def then():
                at = exponentials(before * small.matrix)[1]
                return jnp.matmul(at, start, precision=lax.Precision.HIGHEST)

            q = lax.cond(any_lane(before > 0), then, lambda: start)
            n = space.hessenberg.shape[0]
            block = jnp.zeros((n + q.size, n + q.size), q.dtype)
            block = block.at[:n, :n].set(space.hessenberg).at[0, n:].set(q)
            block = block.at[n:, n:].set(small.matrix.T)
            found = space.norm * exponentials(space.span * block)[1][:n, n:]
            forcing, start_ct = both
            by = lambda c, rows, to: jtu.tree_map(
                lambda t, r: t + jnp.tensordot(c.astype(r.dtype), r, 1), to, rows
            )
            forcing = by(held.space.norm * found[:, : small.num_rows].T, space.basis, forcing)
            return forcing, by(found[:, small.num_rows], space.basis, start_ct)

        size = min(held.size, tree.size(mu))
        last, (forcing, start_ct) = propagated(
            held.transposed_matvec, mu, end, visit, carry, size=size, rtol=held.rtol
        )
        return (forcing, tree.axpy(weights[0], last, start_ct)), None

    v = jtu.tree_map(lambda x: x[0], cotangents)
    none = jtu.tree_map(lambda x: jnp.zeros((small.num_rows, *x.shape), x.dtype), v)
    rows = ((*held.wanted, small.starts), cotangents)
    return lax.scan(one, (none, tree.zeros_like(v)), rows)[0]


def _resized(rows: Vector, count: int) -> Vector:
    """The first `count` rows, zeros where there are fewer."""

    def one(x):
        more = jnp.zeros((max(count - x.shape[0], 0), *x.shape[1:]), x.dtype)
        return jnp.concatenate([x[:count], more])

    return jtu.tree_map(one, rows)


@ForwardRule
def _once(value):
    """The value, whose derivative is refused."""
    return value


@_once.def_jvp
def _once_jvp(primals, tangents):
    raise NotImplementedError(
        "`Exprb32` and `Exprb43` have first derivatives only. For second ones take "
        "`nks.ode.Rodas5P`, `nks.ode.ROK4` or `nks.ode.Kvaerno5`."
    )

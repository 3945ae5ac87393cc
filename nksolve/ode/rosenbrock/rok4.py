"""The Rosenbrock–Krylov method ROK4."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import jax.tree_util as jtu

from ... import tree
from ...adjoint.base import stop_gradient
from ...linearise.linearisation import linearise
from ...rule import ForwardRule
from ...typing import Args, Flag, Scalar, Vector, Y
from ..attach import Increment
from ..esdirk import combined, put
from ..stepper import check_state, result_of
from ..work import Work
from .arnoldi import arnoldi, projected
from .tableau import RosenbrockTableau
from .tableaus import ROK4 as _TABLEAU


class ROK4State(NamedTuple):
    """What a step hands to the next."""

    work: Work  # of the accepted steps


class _Stages(NamedTuple):
    """What a stage hands to the next."""

    ks: Vector  # (s, …): k_i so far
    inside: Vector  # (s, size): their parts in the Krylov space
    ok: Flag


class ROK4(dfx.AbstractAdaptiveSolver):
    """Tranquilli & Sandu's 4(3) method of 4 stages: k_i = h f(t_i, z_i) + A Σ_{j≤i} γ_ij k_j with
    z_i = y0 + Σ_{j<i} α_ij k_j, y1 = y0 + Σ b_i k_i, where A = V H Vᵀ stands for h f_y.

    V is an orthonormal basis of the Krylov space of h f_y that h f(t0, y0) spans, H = Vᵀ(h f_y)V.
    It is made once in a step, from one linearisation; the stages then solve systems of `size`
    unknowns. Time is an unknown of its own, so that the order holds with an explicit t.

    **Arguments:**

    - `size`: vectors in V. Four make it of order four; more make it stable for more eigenvalues: it
      is implicit in that space and explicit in all others. Steps of a stiffer problem stay as
      small as an explicit method's.

    There is no linear solver, no tolerance and no preconditioner. Scales matter, as V is orthogonal
    in the Euclidean inner product: bring unknowns of different units to one size. Derivatives are
    those of the discrete step, the Arnoldi process included. No mass matrix.

    Storage: `size` + 8 vectors; in reverse mode `size`² for the step that is differentiated. Work:
    `size` products with the Jacobian, 4 orthogonalisations each; one linearisation and 5
    evaluations. Dense output: cubic Hermite.

    Source: Tranquilli & Sandu, Rosenbrock–Krylov methods for large systems of differential
    equations, SIAM J. Sci. Comput. 36 (2014), A1313–A1338: ROK4a.
    """

    size: int = eqx.field(static=True, default=4)

    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = dfx.ThirdOrderHermitePolynomialInterpolation
    tableau: ClassVar[RosenbrockTableau] = _TABLEAU

    def __check_init__(self):
        if self.size < 1:
            raise ValueError(f"`size` must be positive, but it is {self.size}.")

    def order(self, terms: Any) -> int:
        del terms
        return max(self.tableau.w_order, min(self.size, self.tableau.krylov_order))

    def error_order(self, terms: Any) -> float:
        """One more than the lower of the orders of the step and of what it is compared with."""
        return 1.0 + min(self.order(terms), self.tableau.embedded_order, self.size)

    def func(self, terms: dfx.AbstractTerm, t0: Any, y0: Y, args: Args) -> Any:
        return terms.vf(t0, y0, args)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Args) -> ROK4State:
        del terms, t0, t1, args
        check_state(y0)
        return ROK4State(Work.of())

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        args: Args,
        solver_state: ROK4State,
        made_jump: Any,
    ) -> tuple[Any, Any, dict, ROK4State, dfx.RESULTS]:
        del made_jump
        row = self.tableau.row_form()
        dtype = tree.real_dtype(y0)
        t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
        h = t1 - t0
        increment = Increment.of(terms, args, t0, t1, y0)
        held = stop_gradient((increment, t0, y0))

        lin = linearise(lambda z, t: increment(t, z), y0, t0)
        tau = h.astype(dtype)

        def mv(x):
            v, s = x
            return lin.joint.mv((v, s.astype(t0.dtype))), jnp.zeros_like(s)

        basis, hessenberg = arnoldi(mv, (lin.value, tau), self.size)
        gamma = jnp.asarray(self.tableau.gamma, dtype)
        factors = jsl.lu_factor(jnp.eye(self.size, dtype=dtype) - gamma * hessenberg)

        def one_stage(at: _Stages, row: Any) -> tuple[_Stages, None]:
            i, a, c, alpha_i = row
            z = tree.add(y0, combined(a, at.ks))
            t = jnp.where(alpha_i == 1, t1, t0 + alpha_i * h)
            value, ok = evaluated(increment, t, z, at.ok, held)
            part = projected(basis, (value, tau))
            inside = jsl.lu_solve(factors, part + hessenberg @ (c @ at.inside))
            k = tree.add(value, combined(inside - part, basis[0]))
            return _Stages(put(at.ks, i, k), at.inside.at[i].set(inside), ok), None

        s = self.tableau.stages
        rows = (
            jnp.arange(s),
            jnp.asarray(row.alpha, dtype),
            jnp.tril(jnp.asarray(row.gamma, dtype), -1),
            jnp.asarray(row.alpha.sum(axis=1), h.dtype),
        )
        start = _Stages(
            ks=jtu.tree_map(lambda x: jnp.zeros((s, *jnp.shape(x)), x.dtype), y0),
            inside=jnp.zeros((s, self.size), dtype),
            ok=_moderate(lin.value) & jnp.all(jnp.isfinite(hessenberg)),
        )
        end, _ = lax.scan(one_stage, start, rows)
        y1 = tree.add(y0, combined(jnp.asarray(row.b, dtype), end.ks))
        last, ok = evaluated(increment, t1, y1, end.ok, held)
        error = combined(jnp.asarray(row.b - row.b_hat, dtype), end.ks)
        error = jtu.tree_map(lambda e: jnp.where(ok, e, jnp.inf), error)
        work = Work.of(
            num_fn_evals=2 + s,
            num_linearisations=1,
            num_matvecs=self.size,
            num_convergence_failures=tree.count(~ok),
        )
        state = ROK4State(solver_state.work.plus(work))
        return y1, error, dict(y0=y0, y1=y1, k0=lin.value, k1=last), state, result_of(ok)


def evaluated(
    increment: Increment, t: Scalar, z: Vector, ok: Flag, held: Any
) -> tuple[Vector, Flag]:
    """(F(t, z), whether it and all before it is moderate). Where not, the value is zero and its
    derivatives are those at the step's start, which reverse mode multiplies by zero."""
    frozen, t_held, y_held = held
    value = frozen(*stop_gradient((t, z)))
    ok = ok & _moderate(value)
    value = tree.where(ok, value, tree.zeros_like(value))
    t, z = jnp.where(ok, t, t_held), tree.where(ok, z, y_held)
    return _value(increment, t, z, found=stop_gradient(value)), ok


@ForwardRule
def _value(increment, t, z, *, found):
    del increment, t, z
    return found


@_value.def_jvp
def _value_jvp(primals, tangents, *, found):
    leaves, treedef = jtu.tree_flatten(primals)
    d_leaves = treedef.flatten_up_to(tangents)

    def fn(*moving):
        moving = iter(moving)
        merged = [x if d is None else next(moving) for x, d in zip(leaves, d_leaves, strict=True)]
        increment, t, z = jtu.tree_unflatten(treedef, merged)
        return increment(t, z)

    pairs = [
        (x, jnp.asarray(d, x.dtype)) for x, d in zip(leaves, d_leaves, strict=True) if d is not None
    ]
    chosen, d_chosen = zip(*pairs, strict=True)
    _, out = jax.jvp(fn, tuple(chosen), tuple(d_chosen))
    return _value(*primals, found=found), out


def _moderate(v: Vector) -> Flag:
    """Whether every entry is a number whose square is one."""
    ok = [jnp.all(jnp.abs(x) < jnp.sqrt(jnp.finfo(x.dtype).max)) for x in jtu.tree_leaves(v)]
    return jnp.all(jnp.stack(ok)) if ok else jnp.array(True)

"""How a linearisation is made: what is stored, what is computed again at each matvec."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .. import tree
from ..typing import Aux, LinearFn, Vector
from .operator import AbstractLinearMap, FunctionMap
from .split import evaluate_linear

#: `(y, params) -> (value, aux)`, a PyTree: what it closes over stands in its leaves.
JointFn: TypeAlias = Callable[[Vector, Vector], tuple[Vector, Aux]]


class Linearised(NamedTuple):
    """What a policy returns: the value, aux, δy → J δy, and (δy, δparams) → J δy + K δparams."""

    value: Vector
    aux: Aux
    jacobian: AbstractLinearMap
    joint: AbstractLinearMap


class AbstractPolicy(eqx.Module):
    """Makes the linear maps of a function of PyTrees, jointly in y and in parameters.

    Laws: `map.mv(v)` equals `jax.jvp` and `map.transpose_mv(w)` the VJP (to rounding;
    `FiniteDifference` to its differencing error). Every array that a map needs is a leaf of it.
    `evals_per_matvec` says how often a map evaluates `fn` at each application, `mode` which rules
    of differentiation are used, and `stores` whether intermediate values are kept (which a loop of
    unknown length does not allow).
    """

    evals_per_matvec: ClassVar[int]
    mode: ClassVar[Literal["forward", "reverse", "none"]]
    stores: ClassVar[bool]

    @abc.abstractmethod
    def linearise(self, fn: JointFn, y: Vector, params: Vector) -> Linearised:
        """The maps at `(y, params)`, with one evaluation of `fn`."""

    def solve_space(self, y: Vector) -> Vector:
        """A vector like those of the linear solves."""
        return y


class Linearise(AbstractPolicy):
    """Store: `jax.linearize`. The default.

    Keeps every intermediate value that the tangent map needs (as much as reverse mode does); a
    matvec evaluates `fn` no further.
    """

    evals_per_matvec = 0
    mode = "forward"
    stores = True

    def linearise(self, fn: JointFn, y: Vector, params: Vector) -> Linearised:
        return _stored(fn, y, params)


class Recompute(AbstractPolicy):
    """Store nothing but y: a forward-mode derivative of `fn` at each matvec.

    Least storage. A matvec costs one evaluation of `fn` together with its tangent; this is what
    Newton–Krylov codes on top of AD do when they call `jax.jvp` per direction.
    """

    evals_per_matvec = 1
    mode = "forward"
    stores = False

    def linearise(self, fn: JointFn, y: Vector, params: Vector) -> Linearised:
        value, aux = fn(y, params)
        point = (fn, y, params)
        jacobian = FunctionMap(_Bound(_jvp_y, point), tree.structure(y))
        joint = FunctionMap(_Bound(_jvp_joint, point), tree.structure((y, params)))
        return Linearised(value, aux, jacobian, joint)


class Transposed(AbstractPolicy):
    """Store by reverse mode: `jax.vjp`, whose transpose is the matvec.

    For residuals that have a reverse rule only (`jax.custom_vjp`). One set of stored values serves
    J v and Jᵀ w; a matvec evaluates `fn` no further.
    """

    evals_per_matvec = 0
    mode = "reverse"
    stores = True

    def linearise(self, fn: JointFn, y: Vector, params: Vector) -> Linearised:
        value, vjp, aux = jax.vjp(fn, y, params, has_aux=True)
        structure = tree.structure(value)
        jacobian = _PulledBackMap(_Bound(_first_cotangent, vjp), structure)
        return Linearised(value, aux, jacobian, _PulledBackMap(vjp, structure))


class FiniteDifference(AbstractPolicy):
    """Forward differences, for residuals that cannot be differentiated.

    J v ≈ (fn(y + h v) − fn(y))/h with h = √ε √(1 + ‖y‖)/‖v‖ (Pernice & Walker, SIAM J. Sci.
    Comput. 19(1), 1998, as in PETSc's `wp`; ε the unit round-off of y). One evaluation of `fn` a
    matvec, relative accuracy about √ε, so GMRES stagnates near 1e-8 κ in float64. There is no
    transpose, hence no adjoint: asking for a gradient raises `NotImplementedError`.

    **Arguments:**

    - `relative_step`: replaces √ε when given.
    """

    relative_step: float | None = None
    evals_per_matvec = 1
    mode = "none"
    stores = False

    def linearise(self, fn: JointFn, y: Vector, params: Vector) -> Linearised:
        value, aux = fn(y, params)
        step = tree.eps(y) ** 0.5 if self.relative_step is None else self.relative_step
        jacobian = _DifferenceMap(_Bound(_at_params, (fn, params)), y, value, step)
        joint = _DifferenceMap(_Bound(_at_pair, fn), (y, params), value, step)
        return Linearised(value, aux, jacobian, joint)


#: The name under which `nks.checkpoint_layers` marks the inputs of layers.
LAYER_INPUT = "nksolve.layer_input"

#: The `jax.checkpoint` policy that keeps what `nks.checkpoint_layers` marks and nothing else.
save_layer_inputs = jax.checkpoint_policies.save_only_these_names(LAYER_INPUT)


class Checkpointed(AbstractPolicy):
    """Store layer by layer: `jax.linearize` of `jax.checkpoint(fn, policy=policy)`.

    Keeps what `policy` saves (by default the inputs of layers marked by `nks.checkpoint_layers`)
    and computes the rest again inside each matvec.

    **Arguments:**

    - `policy`: any policy of `jax.checkpoint_policies`.
    """

    policy: Callable[..., Any] = eqx.field(static=True, default=save_layer_inputs)
    evals_per_matvec = 1
    mode = "forward"
    stores = True

    def linearise(self, fn: JointFn, y: Vector, params: Vector) -> Linearised:
        call = eqx.filter_checkpoint(_call, policy=self.policy)
        return _stored(lambda y, params: call(fn, y, params), y, params)


def _floating(dtype: Any) -> np.dtype:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"`LowerPrecision(dtype)` takes a real floating dtype, not {dtype}.")
    return np.dtype(dtype)


class LowerPrecision(AbstractPolicy):
    """Store as `Linearise` does, and solve linear systems in a lower precision.

    The residual, y and the convergence test stay in the dtype of y. The arrays of the linearisation
    are cast once a Newton step, and every Krylov vector, matvec and preconditioner is of the lower
    precision: half the memory traffic for float32 in place of float64. Where one such solve does
    not reach the tolerance, the residual b − J x is computed in the dtype of y and the correction
    solved for again (iterative refinement); where that stagnates too, the solve goes on in the
    dtype of y. Gradients are solved for in the same way, to the tolerance asked for.

    **Arguments:**

    - `dtype`: the lower precision; `float32` by default. Leaves that are no wider stay as they are.

    Storage: that of `Linearise` and its half again. Work: no evaluation of `fn` per matvec; one
    matvec in the dtype of y for each refinement.

    Source: Kelley, SIAM Rev. 64(1), 2022; Higham, Accuracy and Stability of Numerical Algorithms,
    2nd ed., SIAM 2002, §12.1.
    """

    dtype: Any = eqx.field(static=True, default=np.dtype(np.float32), converter=_floating)
    evals_per_matvec = 0
    mode = "forward"
    stores = True

    def linearise(self, fn: JointFn, y: Vector, params: Vector) -> Linearised:
        lin = _stored(fn, y, params)
        return lin._replace(jacobian=_LowMap(lin.jacobian, self.dtype))

    def solve_space(self, y: Vector) -> Vector:
        return tree.cast(y, self.dtype)


class _LowMap(AbstractLinearMap):
    """A linear map to be solved with in a lower precision."""

    linear_map: AbstractLinearMap
    dtype: np.dtype = eqx.field(static=True)

    def mv(self, vector: Vector) -> Vector:
        return self.linear_map.mv(vector)

    def transpose_mv(self, vector: Vector) -> Vector:
        return self.linear_map.transpose_mv(vector)

    @property
    def low(self) -> np.dtype | None:
        return self.dtype


def _stored(fn: JointFn, y: Vector, params: Vector) -> Linearised:
    value, lin, aux = jax.linearize(fn, y, params, has_aux=True)
    # A constant comes out of `jax.checkpoint` as a number.
    value = jtu.tree_map(jnp.asarray, value)
    joint = FunctionMap(_Bound(_apply_pair, lin), tree.structure((y, params)))
    lin_y = _pruned(lin, y, params) if jtu.tree_leaves(params) else _Bound(_apply_y, (lin, params))
    return Linearised(value, aux, FunctionMap(lin_y, tree.structure(y)), joint)


def _pruned(lin: Callable[..., Vector], y: Vector, params: Vector) -> LinearFn:
    """δy → lin(δy, 0) without what belongs to the parameters.

    Calling `lin` with zeros would multiply parameter-sized zeros at every matvec; linearising it
    once more in δy drops them.
    """
    closed, out = jax.make_jaxpr(lin, return_shape=True)(tree.structure(y), tree.structure(params))
    zeros = jtu.tree_leaves(tree.zeros_like(params))

    def run(vector):
        leaves = evaluate_linear(closed, [*jtu.tree_leaves(vector), *zeros])
        return jtu.tree_unflatten(jtu.tree_structure(out), leaves)

    return jax.linearize(run, tree.zeros_like(y))[1]


class _Bound(eqx.Module):
    """`fn(bound, …)` with `bound` as leaves."""

    fn: Callable = eqx.field(static=True)
    bound: Any

    def __call__(self, *args: Any) -> Any:
        return self.fn(self.bound, *args)


def _apply_y(lin_and_params, vector):
    lin, no_params = lin_and_params
    return lin(vector, no_params)


def _call(fn, y, params):
    return fn(y, params)


def _apply_pair(lin, pair):
    return lin(*pair)


def _first_cotangent(vjp, vector):
    return vjp(vector)[:1]


def _at_params(fn_and_params, y):
    fn, params = fn_and_params
    return fn(y, params)


def _at_pair(fn, pair):
    return fn(*pair)


def _jvp_y(point, vector):
    fn, y, params = point
    return jax.jvp(lambda x: fn(x, params)[0], (y,), (vector,))[1]


def _jvp_joint(point, pair):
    fn, y, params = point
    return jax.jvp(lambda *x: fn(*x)[0], (y, params), pair)[1]


class _PulledBackMap(AbstractLinearMap):
    """The map whose transpose is `vjp`, a function that returns a tuple of cotangents."""

    vjp: Callable
    out_structure: tuple = eqx.field(static=True, converter=tree.freeze)

    def mv(self, vector: Vector) -> Vector:
        (out,) = jax.linear_transpose(self.transpose_mv, tree.thaw(self.out_structure))(vector)
        return out

    def transpose_mv(self, vector: Vector) -> Vector:
        cotangents = self.vjp(vector)
        return cotangents if len(cotangents) > 1 else cotangents[0]


class _DifferenceMap(AbstractLinearMap):
    """v → (fn(primal + h v) − value)/h."""

    fn: Callable
    primal: Vector
    value: Vector
    relative_step: float

    def mv(self, vector: Vector) -> Vector:
        norm = tree.norm2(vector)
        one = jnp.ones_like(norm)
        length = jnp.where(norm > 0, norm, one)
        h = self.relative_step * jnp.sqrt(one + tree.norm2(self.primal)) / length
        moved, _ = self.fn(tree.axpy(h, vector, self.primal))
        return tree.scale(one / h, tree.sub(moved, self.value))

    def transpose_mv(self, vector: Vector) -> Vector:
        raise NotImplementedError(
            "`nks.FiniteDifference` approximates J v only: it has no transpose, so no adjoint and "
            "no gradient. Differentiate with `nks.Linearise()`, or with `nks.Transposed()` where "
            "the residual has a `jax.custom_vjp`."
        )

"""`linearise(fn, y, args)`: one evaluation of fn, and everything that can be had from it."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .. import tree
from ..typing import Args, Aux, Fn, Vector, Y
from .inspect import check_linearisable, check_residual, check_unknown
from .operator import AbstractLinearMap, JacobianOperator
from .policies import AbstractPolicy, Linearise


class Linearisation(eqx.Module):
    """A residual at a point, with its derivatives there.

    **Attributes:**

    - `value`: f = fn(y, args).
    - `aux`: the auxiliary output of `fn` (`None` without `has_aux`).
    - `operator`: J = ∂f/∂y, a `lineax` operator on the inexact arrays of y.
    - `joint`: (δy, δargs) → J δy + (∂f/∂args) δargs, on the inexact arrays of y and args. It keeps
      no more than the operator does as long as it is not used (under `jit`).
    """

    value: Vector
    aux: Aux
    operator: JacobianOperator
    joint: AbstractLinearMap

    def args_tangent(self, tangent: Args) -> Vector:
        """(∂f/∂args) δargs, from the same linearisation."""
        return self.joint.mv((tree.zeros_like(self.operator.in_structure()), tangent))

    def args_cotangent(self, vector: Vector) -> Args:
        """(∂f/∂args)ᵀ w on the inexact arrays of args (`None` elsewhere), likewise."""
        return self.joint.transpose_mv(vector)[1]


class AbstractLinearisable(eqx.Module):
    """A residual that brings its own way of being linearised; `nks.linearise` hands over to it."""

    def __call__(self, y: Y, args: Args) -> tuple[Vector, Aux]:
        """`(f, aux)` at y; args are those that it was made with."""
        lin = self.linearise(y, frozenset())
        return lin.value, lin.aux

    @abc.abstractmethod
    def linearise(self, y: Y, tags: frozenset[object]) -> Linearisation:
        """The linearisation at y."""


class _Residual(eqx.Module):
    """fn as a function of the inexact arrays of y and of args."""

    fn: Fn
    static_y: Any
    static_args: Any
    has_aux: bool = eqx.field(static=True)

    def __call__(self, y: Vector, args: Vector) -> tuple[Vector, Aux]:
        out = self.fn(eqx.combine(y, self.static_y), eqx.combine(args, self.static_args))
        value, aux = out if self.has_aux else (out, None)
        check_residual(value)
        return jtu.tree_map(jnp.asarray, value), aux


def linearise(
    fn: Fn | AbstractLinearisable,
    y: Y,
    args: Args = None,
    *,
    has_aux: bool = False,
    policy: AbstractPolicy = Linearise(),
    tags: frozenset[object] = frozenset(),
) -> Linearisation:
    """Evaluates fn once at (y, args) and keeps what its derivatives need.

    The result holds f = fn(y, args), the operator v → J v with its transpose, and the derivative
    with respect to args; none of them evaluates `fn` again (with the default policy).

    **Arguments:**

    - `fn`: the residual, `fn(y, args) -> f`, a PyTree of inexact arrays; with `has_aux` a pair
      `(f, aux)`.
    - `y`: the point: a PyTree whose inexact arrays are the variables. Other leaves (activation
      functions of an `eqx.Module`, …) are held fixed, so `y` may be a module, or
      `(module, input)`. Integer arrays and Python integers are refused.
    - `args`: passed on to `fn`.
    - `policy`: what is stored and what is computed again; see `nks.Linearise`.
    - `tags`: Lineax tags promised of J.

    **Returns:** `nks.Linearisation`.

    **Raises:** `TypeError` for integer leaves in y or f, and `nks.LinearisationError` for a
    residual that cannot be linearised once (a `while_loop` that depends on y, a `custom_vjp` with a
    forward-mode policy), naming the place and the ways out.
    """
    if isinstance(fn, AbstractLinearisable):
        return fn.linearise(y, tags)
    check_unknown(y)
    variables, static_y = eqx.partition(y, eqx.is_inexact_array)
    params, static_args = eqx.partition(args, eqx.is_inexact_array)
    residual = _Residual(fn, static_y, static_args, has_aux)
    check_linearisable(residual, variables, params, policy)
    value, aux, jacobian, joint = policy.linearise(residual, variables, params)
    structures = tree.structure(variables), tree.structure(value)
    return Linearisation(value, aux, JacobianOperator(jacobian, *structures, tags), joint)

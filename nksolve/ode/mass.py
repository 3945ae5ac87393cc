"""Constant mass matrices: M y' = f(t, y)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx

from .. import tree
from ..adjoint.base import stop_gradient
from ..linearise.operator import AbstractLinearMap, JacobianOperator
from ..linearise.views import transposed_mass, weighted
from ..newton.newton_krylov import NewtonKrylov
from ..typing import Args, Scalar, ScalarLike, Vector, Y
from ..verbs.root_find import root_find

#: The diagonal of M as a tree like y, or M as an operator; `None` is the identity.
Mass = Any


class MassShiftedMap(AbstractLinearMap):
    """v → M v − γ A v."""

    mass: Mass
    linear_map: AbstractLinearMap
    gamma: Scalar

    def mv(self, vector: Vector) -> Vector:
        return tree.axpy(-self.gamma, self.linear_map.mv(vector), weighted(self.mass, vector))

    def transpose_mv(self, vector: Vector) -> Vector:
        transposed = self.linear_map.transpose_mv(vector)
        return tree.axpy(-self.gamma, transposed, weighted(transposed_mass(self.mass), vector))

    @property
    def low(self) -> np.dtype | None:
        return self.linear_map.low


def mass_shifted(mass: Mass, operator: JacobianOperator, gamma: Scalar) -> JacobianOperator:
    """M − γ A, on A's linearisation."""
    structure = operator.in_structure()
    return JacobianOperator(MassShiftedMap(mass, operator.linear_map, gamma), structure, structure)


def as_mass(mass: Mass) -> Mass:
    """A user's mass matrix with JAX's arrays, whatever the numbers were."""
    if mass is None or isinstance(mass, lx.AbstractLinearOperator):
        return mass
    if callable(mass):
        raise TypeError(
            "`mass` is a constant matrix, a Lineax operator or its diagonal as a tree like the "
            "state, but it is a function. For a regular M(t, y) y' = f take the slope z as an "
            "unknown: y' = z, 0 = M(t, y) z − f(t, y), with ones and zeros for `mass`."
        )
    return jtu.tree_map(jnp.asarray, mass)


def check_mass(mass: Mass, y: Y) -> None:
    """Raises where M is not for vectors like y."""
    if mass is None:
        return
    structure = tree.structure(jtu.tree_map(jnp.asarray, y))
    if isinstance(mass, lx.AbstractLinearOperator):
        if mass.in_structure() != structure or mass.out_structure() != structure:
            raise ValueError(
                f"The mass matrix must map vectors like the state, {structure}, to themselves, "
                f"but it maps {mass.in_structure()} to {mass.out_structure()}."
            )
        return
    if jtu.tree_structure(mass) != jtu.tree_structure(structure):
        raise ValueError(
            "A mass matrix is a Lineax operator, or its diagonal as a tree like the state, "
            f"{jtu.tree_structure(structure)}, but the tree is {jtu.tree_structure(mass)}."
        )
    for m, x in zip(jtu.tree_leaves(mass), jtu.tree_leaves(structure), strict=True):
        if m.shape not in ((), x.shape):
            raise ValueError(
                "The diagonal of the mass matrix needs leaves of the state's shapes, or scalars, "
                f"but one of shape {m.shape} stands for one of shape {x.shape}."
            )
        if jnp.issubdtype(m.dtype, jnp.complexfloating) and not jnp.issubdtype(
            x.dtype, jnp.complexfloating
        ):
            raise ValueError("A real state has a real mass matrix, but this one is complex.")


def consistent(
    fn: Callable[[Any, Y, Args], Y],
    t: ScalarLike,
    y: Y,
    args: Args = None,
    *,
    mass: Mass,
    solver: optx.AbstractRootFinder | None = None,
    max_steps: int = 64,
) -> Y:
    """y with the rows of 0 = fn(t, y, args) solved whose entry of the diagonal `mass` is zero.

    The start of a semi-explicit equation of index 1 has to satisfy its algebraic rows, which
    integrators take for granted. The unknowns of the other rows stay what they are. Differentiable
    with respect to t, y and args.

    **Arguments:**

    - `fn`, `t`, `y`, `args`: a right-hand side as of `dfx.ODETerm`, and where it is taken; `y`
      holds a first guess of the algebraic unknowns.
    - `mass`: the diagonal of M as a tree like y.
    - `solver`: a root finder; `nks.NewtonKrylov(rtol=1e-10, atol=1e-10)` by default, with 1e-5 in
      the place of 1e-10 where y is of single precision.
    - `max_steps`: most steps of it.

    **Raises:** as `nks.root_find` where the algebraic rows cannot be solved.
    """
    if isinstance(mass, lx.AbstractLinearOperator) or mass is None:
        raise TypeError(
            "`consistent` tells algebraic rows by the zeros of a diagonal: give `mass` as a tree "
            "like y."
        )
    y = jtu.tree_map(jnp.asarray, y)
    mass = as_mass(mass)
    check_mass(mass, y)
    if solver is None:
        tolerance = 1e-10 if tree.real_dtype(y).itemsize == 8 else 1e-5
        solver = NewtonKrylov(rtol=tolerance, atol=tolerance)
    given = fn, jnp.asarray(t, tree.real_dtype(y)), y, mass, args
    return root_find(_rows, solver, stop_gradient(y), given, max_steps=max_steps).value


def _rows(z: Y, given: Any) -> Y:
    """The algebraic rows, and z − y in the others."""
    fn, t, y, mass, args = given
    choose = lambda m, f, z, y: jnp.where(m == 0, f, z - y)
    return jtu.tree_map(choose, mass, fn(t, z, args), z, y)

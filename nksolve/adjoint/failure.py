"""What a derivative is where its linear solve failed."""

import abc

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from ..typing import Flag, Scalar, Vector


class AbstractFailure(eqx.Module):
    """What becomes of a solve for a derivative that met neither its tolerance nor the floor."""

    @abc.abstractmethod
    def __call__(self, vector: Vector, failed: Flag, residual_norm: Scalar, advice: str) -> Vector:
        """What is used in place of `vector`, the best iterate, where `failed` holds."""


class RaiseOnFailure(AbstractFailure):
    """An error at run time, with advice; in a batch, where any lane failed."""

    def __call__(self, vector: Vector, failed: Flag, residual_norm: Scalar, advice: str) -> Vector:
        del residual_norm
        return nan_where(eqx.error_if(failed, failed, advice), vector)


class NaNOnFailure(AbstractFailure):
    """NaN, in that lane of a batch only."""

    def __call__(self, vector: Vector, failed: Flag, residual_norm: Scalar, advice: str) -> Vector:
        del residual_norm, advice
        return nan_where(failed, vector)


class BestEffort(AbstractFailure):
    """The best iterate; a `report` of the adjoint says that it is no solution.

    NaN only where its residual is not finite, since the right-hand side or J is not.
    """

    def __call__(self, vector: Vector, failed: Flag, residual_norm: Scalar, advice: str) -> Vector:
        del failed, advice
        return nan_where(~jnp.isfinite(residual_norm), vector)


def nan_where(failed: Flag, vector: Vector) -> Vector:
    """NaN in place of a vector that is not to be used.

    With a flag that has been through `eqx.error_if` this threads the error on to the vector: the
    check itself must see scalars only, since it would gather a vector that is sharded.
    """
    return jtu.tree_map(lambda x: jnp.where(failed, jnp.full_like(x, jnp.nan), x), vector)

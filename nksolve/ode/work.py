"""What a step costs, counted as SUNDIALS counts it."""

from typing import NamedTuple

import jax.numpy as jnp

from ..typing import Count


class Work(NamedTuple):
    """Counters of one attempted step, or of many."""

    num_fn_evals: Count  # of the right-hand side, those in linearisations included
    num_linearisations: Count
    num_newton_steps: Count
    num_matvecs: Count  # Krylov iterations, restarts' products included
    num_preconditioner_updates: Count  # factorisations, of a direct solver
    num_preconditioner_applications: Count  # solves, of a direct solver
    num_convergence_failures: Count  # attempts given up by Newton's iteration

    @classmethod
    def of(cls, **counts: Count | int) -> "Work":
        """Those counts, and zero for the others."""
        given = {name: jnp.asarray(count, jnp.int32) for name, count in counts.items()}
        none = jnp.zeros((), jnp.int32)
        return cls(**{name: given.pop(name, none) for name in cls._fields}, **given)

    def plus(self, other: "Work") -> "Work":
        """The sum."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

"""How algebraic multigrid finds coarse unknowns: pyamg, on the host."""

import abc
import functools as ft
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import equinox as eqx
import numpy as np


class AbstractCoarsening(eqx.Module):
    """Interpolations from coarse levels, found from the entries of a matrix."""

    @abc.abstractmethod
    def interpolations(
        self, matrix: Any, near_nullspace: np.ndarray | None, coarsest: int
    ) -> list[tuple[Any, Any]]:
        """(P, R) of each level as SciPy matrices, finest first, until at most `coarsest` unknowns
        are left or no more can be done.

        `matrix` is a real SciPy matrix (CSR, or BSR where nodes have several unknowns);
        `near_nullspace` has a column for each vector that coarse levels must represent.
        """


class SmoothedAggregation(AbstractCoarsening):
    """Unknowns are put together with their strong neighbours; P is constant (or `near_nullspace`)
    on each such aggregate, then smoothed by a step of Jacobi. R = Pᵀ for a symmetric matrix, else
    the same for Aᵀ.

    **Arguments:**

    - `theta`: a coupling counts as strong where |a_ij| ≥ θ √|a_ii a_jj|. 0.1 follows
      anisotropy and jumps; with 0 all couplings count.
    - `omega`: ω/ρ(D⁻¹A) damps the smoothing of P; 0 leaves P as it is: a coarse matrix with fewer
      entries, and a slower cycle.

    Source: Vaněk, Mandel & Brezina, Computing 56, 1996; Bell, Olson & Schroder, PyAMG, J. Open
    Source Softw. 7(72), 2022.
    """

    theta: float = eqx.field(static=True, default=0.1)
    omega: float = eqx.field(static=True, default=4.0 / 3.0)

    def interpolations(
        self, matrix: Any, near_nullspace: np.ndarray | None, coarsest: int
    ) -> list[tuple[Any, Any]]:
        with _same_random_numbers():
            found = pyamg().smoothed_aggregation_solver(
                matrix,
                B=near_nullspace,
                symmetry="hermitian" if _is_symmetric(matrix) else "nonsymmetric",
                strength=("symmetric", {"theta": self.theta}),
                smooth=("jacobi", {"omega": self.omega}) if self.omega else None,
                presmoother=None,
                postsmoother=None,
                max_levels=30,
                max_coarse=coarsest,
            )
        return _transfers(found)


class RugeStuben(AbstractCoarsening):
    """Some unknowns are kept, the others interpolated from the strongly coupled ones that are:
    classical AMG. R = Pᵀ. For one unknown a node, and matrices close to an M-matrix.

    **Arguments:**

    - `theta`: a coupling counts as strong from this part of the strongest of its row.

    Source: Ruge & Stüben, Algebraic multigrid, in McCormick (ed.), Multigrid Methods, 1987; Bell,
    Olson & Schroder, PyAMG, J. Open Source Softw. 7(72), 2022.
    """

    theta: float = eqx.field(static=True, default=0.25)

    def interpolations(
        self, matrix: Any, near_nullspace: np.ndarray | None, coarsest: int
    ) -> list[tuple[Any, Any]]:
        if near_nullspace is not None:
            raise ValueError(
                "`RugeStuben` interpolates constants only: it takes no `near_nullspace`. Use "
                "`SmoothedAggregation()`, or `components=` for several unknowns at a node."
            )
        with _same_random_numbers():
            found = pyamg().ruge_stuben_solver(
                matrix.tocsr(),
                strength=("classical", {"theta": self.theta}),
                presmoother=None,
                postsmoother=None,
                max_levels=30,
                max_coarse=coarsest,
            )
        return _transfers(found)


def _transfers(found: Any) -> list[tuple[Any, Any]]:
    pairs = [(level.P.tocsr(), level.R.tocsr()) for level in found.levels[:-1]]
    useful: list[tuple[Any, Any]] = []
    for p, r in pairs:
        # Without strong couplings pyamg makes one empty aggregate.
        if p.nnz == 0 or not 0 < p.shape[1] < p.shape[0]:
            break
        useful.append((p, r))
    return useful


def _is_symmetric(matrix: Any) -> bool:
    difference = abs(matrix - matrix.T).max() if matrix.nnz else 0.0
    return bool(difference <= 1e-5 * abs(matrix).max()) if matrix.nnz else True


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """pyamg estimates spectral radii from NumPy's global random numbers: always the same here."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


@ft.cache
def pyamg() -> Any:
    """The package."""
    try:
        import pyamg as package
    except ImportError as error:
        raise ImportError(
            "`AlgebraicMultigrid` finds its levels by pyamg: `pip install 'nksolve[sparse]'`. "
            "Without it: `nks.Multigrid` on regular grids, `nks.SparseLU`, `nks.Chebyshev`."
        ) from error
    return package

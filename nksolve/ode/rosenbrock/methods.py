"""The Rosenbrock methods."""

from typing import ClassVar

from .solver import AbstractRosenbrock
from .tableau import RosenbrockTableau
from .tableaus import RODAS4, RODAS5P, ROSENBROCK23


class Rosenbrock23(AbstractRosenbrock):
    """Shampine & Reichelt's 2(3) method of `ode23s`: 3 stages, L-stable, with the order 2 also for
    a matrix that is not quite f_y.

    The step is of order 2, what it is compared with of order 3, so that the error at the end goes
    with the power 2/3 of the tolerance: for low accuracy. Its interpolant is of order 2. M may be
    any regular matrix; for index 1 (a singular M) take `nks.ode.Rodas4` or `nks.ode.Rodas5P`.

    **Arguments:**

    - `linear_solver`: how W u = r is solved: `nks.BandedDirect(…)`, `nks.SparseDirect(…)`, or any
      Krylov method with any preconditioner, which is kept from step to step by CVODE's rules. By
      default `nks.AutoLinear()` picks one by the pattern of W.
    - `root_finder`: `nks.ode.SimplifiedNewton`, of which `rtol`, `atol` and `kappa` are used, for
      the linear solves. `SimplifiedNewton.alone()` for constant steps.
    - `mass`: the diagonal of a constant M as a tree like y, or M as a Lineax operator. The
      identity if not given. A direct solver must find M's pattern in W: bring a dense M as a
      function of its nonzeros, or use a Krylov method.
    - `adjoint_rtol`: the relative tolerance of Krylov solves for derivatives; by default a
      hundredth of the controller's `rtol`, at most 1e-6.

    Reports `nonlinear_divergence` where a stage is not finite or a linear solve misses its
    tolerance tenfold; an adaptive controller then takes a shorter step.

    Storage: 3 vectors for the stages, 1 for the interpolant, and what the linear solver keeps.
    Work: one linearisation, 3 evaluations, 3 linear solves, one factorisation or lagged
    preconditioner.

    Source: Shampine & Reichelt, The MATLAB ODE suite, SIAM J. Sci. Comput. 18 (1997), 1–22, §3.1.
    """

    tableau: ClassVar[RosenbrockTableau] = ROSENBROCK23


class Rodas4(AbstractRosenbrock):
    """Hairer & Wanner's RODAS, a 4(3) method: 6 stages, stiffly accurate, L-stable, of order 4 for
    index 1, with an interpolant of order 3.

    **Arguments:** as of `nks.ode.Rosenbrock23`; `mass` may be singular, for a semi-explicit
    equation of index 1 whose start is consistent (`nks.ode.consistent`).

    Reports as `nks.ode.Rosenbrock23`.

    Storage: 6 vectors for the stages, 2 for the interpolant, and what the linear solver keeps.
    Work: one linearisation, 6 evaluations, 6 linear solves.

    Source: Hairer & Wanner, Solving Ordinary Differential Equations II, 2nd ed., §VI.4.
    """

    tableau: ClassVar[RosenbrockTableau] = RODAS4


class Rodas5P(AbstractRosenbrock):
    """Steinebach's 5(4) method: 8 stages, stiffly accurate, L-stable, of order 5 for index 1, with
    an interpolant of order 4.

    **Arguments:** as of `nks.ode.Rosenbrock23`; `mass` may be singular, for a semi-explicit
    equation of index 1 whose start is consistent (`nks.ode.consistent`).

    Reports as `nks.ode.Rosenbrock23`.

    Storage: 8 vectors for the stages, 3 for the interpolant, and what the linear solver keeps.
    Work: one linearisation, 8 evaluations, 8 linear solves.

    Source: Steinebach, Construction of Rosenbrock–Wanner method Rodas5P and numerical benchmarks
    within the Julia Differential Equations package, BIT Numer. Math. 63 (2023), 27.
    """

    tableau: ClassVar[RosenbrockTableau] = RODAS5P

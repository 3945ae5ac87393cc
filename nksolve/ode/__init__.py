"""Stiff integrators for Diffrax, matrix-free forward and in reverse.

Floor 7, above `layers`. Everything here is a `diffrax.AbstractSolver`, a root finder, an adjoint or
a step size controller for one.
"""

try:
    import diffrax as _diffrax  # noqa: F401
except ImportError as error:
    raise ImportError(
        "`nksolve.ode` gives solvers to Diffrax, which is not installed: "
        "`pip install 'nksolve[ode]'`."
    ) from error

from .bdf import (
    BDF as BDF,
    BDFController as BDFController,
    BDFInterpolation as BDFInterpolation,
)
from .implicit_euler import ImplicitEuler as ImplicitEuler
from .kencarp import KenCarp3 as KenCarp3, KenCarp4 as KenCarp4, KenCarp5 as KenCarp5
from .kvaerno import Kvaerno3 as Kvaerno3, Kvaerno4 as Kvaerno4, Kvaerno5 as Kvaerno5
from .linear import Stage as Stage
from .mass import consistent as consistent
from .newton import SimplifiedNewton as SimplifiedNewton
from .preconditioner import StagePreconditioner as StagePreconditioner
from .root_finder import StageNewtonKrylov as StageNewtonKrylov
from .rosenbrock import (
    ROK4 as ROK4,
    Exprb32 as Exprb32,
    Exprb43 as Exprb43,
    Rodas4 as Rodas4,
    Rodas5P as Rodas5P,
    Rosenbrock23 as Rosenbrock23,
)
from .stats import WithStats as WithStats, format_stats as format_stats
from .work import Work as Work

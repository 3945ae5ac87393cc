"""Newton–Krylov solvers for JAX: linearise once, share everything."""

from .history import History as History
from .krylov.base import AbstractKrylovSolver as AbstractKrylovSolver
from .krylov.fgmres import FGMRES as FGMRES
from .krylov.gmres import GMRES as GMRES
from .krylov.orthogonalise import (
    CGS2 as CGS2,
    MGS as MGS,
    AbstractOrthogonalisation as AbstractOrthogonalisation,
)
from .linearise.inspect import LinearisationError as LinearisationError
from .linearise.layers import checkpoint_layers as checkpoint_layers
from .linearise.linearisation import Linearisation as Linearisation, linearise as linearise
from .linearise.operator import JacobianOperator as JacobianOperator
from .linearise.policies import (
    AbstractPolicy as AbstractPolicy,
    Checkpointed as Checkpointed,
    FiniteDifference as FiniteDifference,
    Linearise as Linearise,
    LowerPrecision as LowerPrecision,
    Recompute as Recompute,
    Transposed as Transposed,
)
from .linearise.tags import holomorphic_tag as holomorphic_tag
from .newton.convergence import (
    AbstractConvergenceTest as AbstractConvergenceTest,
    ResidualTest as ResidualTest,
)
from .newton.forcing import (
    AbstractForcing as AbstractForcing,
    ConstantForcing as ConstantForcing,
    EisenstatWalker1 as EisenstatWalker1,
    EisenstatWalker2 as EisenstatWalker2,
)
from .newton.line_search import (
    AbstractGlobalisation as AbstractGlobalisation,
    Backtracking as Backtracking,
    FullStep as FullStep,
    Parabolic as Parabolic,
)
from .newton.newton_krylov import NewtonKrylov as NewtonKrylov
from .newton.report import StepReport as StepReport
from .precondition.base import (
    AbstractPreconditioner as AbstractPreconditioner,
    Identity as Identity,
)
from .precondition.jacobi import Jacobi as Jacobi
from .precondition.user import UserPreconditioner as UserPreconditioner
from .results import REASONS as REASONS, reason_name as reason_name
from .verbs.adjoint import (
    KeepLinearisation as KeepLinearisation,
    KrylovAdjoint as KrylovAdjoint,
    Relinearise as Relinearise,
)
from .verbs.root_find import root_find as root_find

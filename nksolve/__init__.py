"""Newton–Krylov solvers for JAX: linearise once, share everything."""

from .accelerate.anderson import Anderson as Anderson
from .accelerate.base import AbstractIteration as AbstractIteration
from .accelerate.broyden import (
    AbstractBroyden as AbstractBroyden,
    BadBroyden as BadBroyden,
    Broyden as Broyden,
)
from .accelerate.fas import FAS as FAS
from .accelerate.low_rank import (
    AbstractForgetting as AbstractForgetting,
    DropOldest as DropOldest,
    LowRankInverse as LowRankInverse,
    RankReduction as RankReduction,
    Restart as Restart,
)
from .accelerate.ngmres import NGMRES as NGMRES
from .accelerate.nonlinear_preconditioner import NonlinearPreconditioner as NonlinearPreconditioner
from .accelerate.nonlinearly_preconditioned import (
    LeftPreconditioned as LeftPreconditioned,
    RightPreconditioned as RightPreconditioned,
)
from .accelerate.picard import Picard as Picard
from .accelerate.qr_window import (
    AbstractColumnFilter as AbstractColumnFilter,
    AngleFilter as AngleFilter,
    ConditionFilter as ConditionFilter,
)
from .accelerate.switching import Switching as Switching
from .adjoint.approximate import Neumann as Neumann, OneStep as OneStep
from .adjoint.base import AbstractImplicitAdjoint as AbstractImplicitAdjoint
from .adjoint.failure import (
    AbstractFailure as AbstractFailure,
    BestEffort as BestEffort,
    NaNOnFailure as NaNOnFailure,
    RaiseOnFailure as RaiseOnFailure,
)
from .adjoint.krylov import KrylovAdjoint as KrylovAdjoint
from .adjoint.report import AdjointReport as AdjointReport
from .adjoint.shared import Shared as Shared
from .adjoint.splitting import (
    ForwardPreconditioner as ForwardPreconditioner,
    NegativeIdentity as NegativeIdentity,
)
from .history import History as History, PerLeaf as PerLeaf
from .krylov.auto import AutoLinear as AutoLinear
from .krylov.base import AbstractKrylovSolver as AbstractKrylovSolver
from .krylov.bicgstab import BiCGStab as BiCGStab
from .krylov.cg import CG as CG, SteihaugResult as SteihaugResult
from .krylov.direct import (
    BandedDirect as BandedDirect,
    DenseDirect as DenseDirect,
    SparseDirect as SparseDirect,
)
from .krylov.fgmres import FGMRES as FGMRES
from .krylov.gcrodr import GCRODR as GCRODR
from .krylov.gmres import GMRES as GMRES
from .krylov.idr import IDR as IDR
from .krylov.inner import InnerKrylov as InnerKrylov
from .krylov.lsmr import LSMR as LSMR
from .krylov.minres import MINRES as MINRES
from .krylov.orthogonalise import (
    CGS2 as CGS2,
    MGS as MGS,
    AbstractOrthogonalisation as AbstractOrthogonalisation,
)
from .krylov.recycling import RecycledSpace as RecycledSpace
from .krylov.richardson import Richardson as Richardson
from .krylov.ritz import (
    ArnoldiRecord as ArnoldiRecord,
    harmonic_ritz_values as harmonic_ritz_values,
    ritz_values as ritz_values,
)
from .krylov.switching import (
    AbstractSwitchingRule as AbstractSwitchingRule,
    ContractionRule as ContractionRule,
    SwitchingLinear as SwitchingLinear,
)
from .krylov.tfqmr import TFQMR as TFQMR
from .layers.batch import (
    AbstractBatch as AbstractBatch,
    Compacted as Compacted,
    Joint as Joint,
    PerSample as PerSample,
    Single as Single,
)
from .layers.diagnostics import (
    ContractionEstimate as ContractionEstimate,
    history_contraction as history_contraction,
    krylov_contraction as krylov_contraction,
    spectral_radius as spectral_radius,
)
from .layers.layer import (
    AbstractImplicitLayer as AbstractImplicitLayer,
    ImplicitLayer as ImplicitLayer,
    LayerInfo as LayerInfo,
    ResidualLayer as ResidualLayer,
)
from .layers.monotone_cell import MonotoneCell as MonotoneCell
from .layers.regularisers import jacobian_frobenius as jacobian_frobenius
from .layers.spectral_norm_cell import SpectralNormCell as SpectralNormCell
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
from .linearise.sparsity import Pattern as Pattern, find_pattern as find_pattern
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
from .newton.globalisation.base import (
    AbstractGlobalisation as AbstractGlobalisation,
    Judgement as Judgement,
    Linear as Linear,
    Model as Model,
    Shift as Shift,
    Trial as Trial,
)
from .newton.globalisation.bending import (
    AbstractBending as AbstractBending,
    Interior as Interior,
    Projected as Projected,
    ProjectedDescent as ProjectedDescent,
    Shortened as Shortened,
)
from .newton.globalisation.critical_point import CriticalPoint as CriticalPoint
from .newton.globalisation.feasible import Feasible as Feasible
from .newton.globalisation.hookstep import Hookstep as Hookstep
from .newton.globalisation.levenberg_marquardt import LevenbergMarquardt as LevenbergMarquardt
from .newton.globalisation.line_search import (
    Backtracking as Backtracking,
    Damped as Damped,
    FullStep as FullStep,
    Parabolic as Parabolic,
)
from .newton.globalisation.nleq_err import NLEQErr as NLEQErr
from .newton.globalisation.non_monotone import NonMonotone as NonMonotone
from .newton.globalisation.pseudo_transient import (
    SER as SER,
    TTE as TTE,
    AbstractStepRule as AbstractStepRule,
    PseudoTransient as PseudoTransient,
)
from .newton.globalisation.trust_region import (
    AbstractTrustRegion as AbstractTrustRegion,
    Dogleg as Dogleg,
)
from .newton.newton_krylov import NewtonKrylov as NewtonKrylov
from .newton.recording import Recorded as Recorded
from .newton.report import StepReport as StepReport
from .newton.reuse import (
    AbstractReuse as AbstractReuse,
    KeepLinearisation as KeepLinearisation,
    Relinearise as Relinearise,
)
from .newton.robust import (
    AbstractStart as AbstractStart,
    Along as Along,
    Attempt as Attempt,
    FromBest as FromBest,
    FromInitial as FromInitial,
    Robust as Robust,
)
from .newton.scaling.scaled import Scaled as Scaled
from .newton.scaling.sizes import (
    AbstractResidualSizes as AbstractResidualSizes,
    AbstractSizes as AbstractSizes,
    Congruent as Congruent,
    EntrySizes as EntrySizes,
    LeafSizes as LeafSizes,
    RowSizes as RowSizes,
    Similar as Similar,
    Start as Start,
)
from .newton.scaling.units import Scaling as Scaling
from .newton.tightened import Tightened as Tightened
from .precondition.algebraic_multigrid import AlgebraicMultigrid as AlgebraicMultigrid
from .precondition.auto import Auto as Auto
from .precondition.banded import Banded as Banded
from .precondition.base import (
    AbstractPreconditioner as AbstractPreconditioner,
    Identity as Identity,
)
from .precondition.block_jacobi import BlockJacobi as BlockJacobi
from .precondition.block_tridiagonal import BlockTridiagonal as BlockTridiagonal
from .precondition.chebyshev import Chebyshev as Chebyshev
from .precondition.coarsening import (
    AbstractCoarsening as AbstractCoarsening,
    RugeStuben as RugeStuben,
    SmoothedAggregation as SmoothedAggregation,
)
from .precondition.composite import Additive as Additive, Multiplicative as Multiplicative
from .precondition.cycle import (
    AbstractCycle as AbstractCycle,
    FCycle as FCycle,
    VCycle as VCycle,
    WCycle as WCycle,
)
from .precondition.deflation import Deflation as Deflation, DeflationOf as DeflationOf
from .precondition.dense import Dense as Dense
from .precondition.elimination import (
    AbstractElimination as AbstractElimination,
    CyclicReduction as CyclicReduction,
    ScanElimination as ScanElimination,
)
from .precondition.field_split import (
    FieldSplit as FieldSplit,
    TriangularFieldSplit as TriangularFieldSplit,
)
from .precondition.jacobi import Jacobi as Jacobi
from .precondition.lagged import Lagged as Lagged
from .precondition.multigrid import (
    AbstractCoarseSolver as AbstractCoarseSolver,
    DenseInverse as DenseInverse,
    Multigrid as Multigrid,
    PseudoInverse as PseudoInverse,
)
from .precondition.nodes import (
    AbstractNodes as AbstractNodes,
    NodeBlocks as NodeBlocks,
    NodeDiagonal as NodeDiagonal,
)
from .precondition.nystrom import Nystrom as Nystrom
from .precondition.probes import (
    AbstractProbes as AbstractProbes,
    ColouredProbes as ColouredProbes,
    Hutchinson as Hutchinson,
    StencilProbes as StencilProbes,
)
from .precondition.quasi_newton import QuasiNewton as QuasiNewton
from .precondition.smoothers import (
    AbstractSmoother as AbstractSmoother,
    ChebyshevSmoother as ChebyshevSmoother,
    JacobiSmoother as JacobiSmoother,
)
from .precondition.sparse_lu import SparseLU as SparseLU
from .precondition.spectral import (
    Dirichlet as Dirichlet,
    NeumannCells as NeumannCells,
    NeumannNodes as NeumannNodes,
    Periodic as Periodic,
    Spectral as Spectral,
)
from .precondition.stencil import (
    AbstractStencil as AbstractStencil,
    Box as Box,
    Star as Star,
)
from .precondition.transfer import (
    AbstractTransfer as AbstractTransfer,
    CellConstant as CellConstant,
    CellDirichlet as CellDirichlet,
    CellNeumann as CellNeumann,
    CellPeriodic as CellPeriodic,
    VertexDirichlet as VertexDirichlet,
    VertexNatural as VertexNatural,
    VertexNeumann as VertexNeumann,
    VertexPeriodic as VertexPeriodic,
)
from .precondition.user import UserPreconditioner as UserPreconditioner
from .results import REASONS as REASONS, reason_name as reason_name
from .verbs.compacted import compacted_root_find as compacted_root_find
from .verbs.complementarity import (
    AbstractComplementarityFunction as AbstractComplementarityFunction,
    FischerBurmeister as FischerBurmeister,
    Mid as Mid,
    complementarity as complementarity,
)
from .verbs.deflated import Deflated as Deflated
from .verbs.deflation import deflate as deflate
from .verbs.fixed_point import fixed_point as fixed_point
from .verbs.grid_sequencing import grid_sequence as grid_sequence
from .verbs.root_find import root_find as root_find

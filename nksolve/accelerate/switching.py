"""Fixed-point iteration while it contracts fast enough, Newton–Krylov where it does not."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import optimistix as optx
from jaxtyping import PyTree

from .. import tree
from ..history import PerLeaf
from ..krylov.base import check_tolerances
from ..krylov.switching import SwitchingLinear
from ..linearise.policies import AbstractPolicy, Linearise
from ..loops import AbstractProgressMeter, NoProgressMeter
from ..newton.base import AbstractRootFinder
from ..newton.convergence import AbstractConvergenceTest, ResidualTest
from ..newton.forcing import AbstractForcing
from ..newton.globalisation.base import AbstractGlobalisation
from ..newton.globalisation.line_search import Backtracking
from ..newton.newton_krylov import NewtonKrylov
from ..newton.report import StepReport
from ..newton.state import NewtonState
from ..newton.tightened import Tightened
from ..typing import Args, Aux, Flag, Fn, Norm, ScalarLike, Y


class Switching(AbstractRootFinder):
    """Fixed-point steps while they contract fast enough to be the cheaper way, else Newton–Krylov.

    Newton's method for F(y) = g(y) − y whose linear solves begin as the plain iteration
    d ← d + β (F + J d), at one matvec each, and go over to a Krylov method where the measured rate
    says that this is less work. For a cell that contracts fast no Krylov space is ever built: the
    solve is the fixed-point iteration, linearised anew at each of a few Newton steps, with a line
    search to fall back on. A rate found too slow is remembered, and from the next step on the
    Krylov method has the solve to itself. The adjoint is solved in the same way.

    **Arguments:**

    - `rtol`, `atol`: success is ‖F‖ ≤ atol + rtol ‖F₀‖ at the returned point.
    - `linear_solver`: `nks.SwitchingLinear(krylov, rule, damping)`: the Krylov method, when to
      switch, and β.
    - the rest: as for `nks.NewtonKrylov`.

    `stats` has, beyond those of `nks.NewtonKrylov`, `num_plain_steps`, the plain iterations (each
    one of `num_matvecs`), and `contraction`, the last measured rate: at its end an estimate of the
    spectral radius of ∂g/∂y, from below.

    Storage: that of `nks.NewtonKrylov` and 2 vectors. Work of a step: one evaluation of `fn`, and a
    matvec for each plain or Krylov iteration.
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Norm = tree.norm2
    linear_solver: SwitchingLinear = SwitchingLinear()
    forcing: AbstractForcing = Tightened()
    globalisation: AbstractGlobalisation = Backtracking()
    convergence: AbstractConvergenceTest = ResidualTest()
    policy: AbstractPolicy = Linearise()
    step_tol: float | None = None
    history_length: int | PerLeaf = eqx.field(static=True, default=0)
    progress_meter: AbstractProgressMeter = NoProgressMeter()
    verbose: bool | Callable[[StepReport], None] = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        if not isinstance(self.linear_solver, SwitchingLinear):
            raise TypeError(
                "`Switching(linear_solver=...)` must be an `nks.SwitchingLinear`, but it is "
                f"{self.linear_solver!r}: wrap the Krylov method as `SwitchingLinear(krylov)`, or "
                "use `nks.NewtonKrylov`."
            )
        assert self.newton is not None  # whose parts are checked as it is made

    @property
    def newton(self) -> NewtonKrylov:
        """The Newton's method that this is."""
        return NewtonKrylov(
            self.rtol,
            self.atol,
            norm=self.norm,
            linear_solver=self.linear_solver,
            forcing=self.forcing,
            globalisation=self.globalisation,
            convergence=self.convergence,
            policy=self.policy,
            step_tol=self.step_tol,
            history_length=self.history_length,
            progress_meter=self.progress_meter,
            verbose=self.verbose,
        )

    def init(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: frozenset[object],
    ) -> NewtonState:
        return self.newton.init(fn, y, args, options, f_struct, aux_struct, tags)

    def step(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: NewtonState,
        tags: frozenset[object],
    ) -> tuple[Y, NewtonState, Aux]:
        return self.newton.step(fn, y, args, options, state, tags)

    def terminate(
        self,
        fn: Fn,
        y: Y,
        args: Args,
        options: dict[str, Any],
        state: NewtonState,
        tags: frozenset[object],
    ) -> tuple[Flag, optx.RESULTS]:
        return self.newton.terminate(fn, y, args, options, state, tags)

    def postprocess(
        self,
        fn: Fn,
        y: Y,
        aux: Aux,
        args: Args,
        options: dict[str, Any],
        state: NewtonState,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        return self.newton.postprocess(fn, y, aux, args, options, state, tags, result)

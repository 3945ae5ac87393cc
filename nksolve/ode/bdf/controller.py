"""The step size controller that does what BDF wants."""

from typing import Any

import diffrax as dfx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx

from ... import tree
from ...typing import Norm, Scalar, ScalarLike
from ..newton import SimplifiedNewton
from .verdict import decoded


class BDFController(dfx.AbstractAdaptiveStepSizeController[Any, Any]):
    """Changes the step size by the very factor that `BDF` has chosen together with its order.

    `diffrax.PIDController` follows `BDF` too, but for two things: it never shortens a step that was
    accepted, and it cuts a step whose nonlinear iteration failed to a fifth, this one to a half.
    For `BDF` only: another solver's error estimate means something else. Declare jumps by
    `diffrax.ClipStepSizeController(BDFController(...), jump_ts=...)`.

    **Arguments:**

    - `rtol`, `atol`: tolerances; the solver's are the same.
    - `norm`: of the scaled error.
    - `dtmin`: the solve ends with `dt_min_reached` below.
    - `dtmax`: longest step.
    - `factormin`, `factormax`: bounds of the factor.

    The first step, where `dt0` is `None`, is that of Hairer, Nørsett & Wanner, Solving Ordinary
    Differential Equations I, §II.4, for order 1; where the terms are not a function of time and
    state alone it is 0.01.
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Norm = optx.rms_norm
    dtmin: ScalarLike | None = None
    dtmax: ScalarLike | None = None
    factormin: ScalarLike = 0.2
    factormax: ScalarLike = 10.0

    def wrap(self, direction: Any) -> "BDFController":
        del direction
        return self

    def init(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        dt0: Any,
        args: Any,
        func: Any,
        error_order: Any,
    ) -> tuple[Any, Any]:
        del t1, error_order
        if dt0 is None:
            first = lambda: self._first_step(terms, t0, y0, args, func)
            dt0 = lax.stop_gradient(first() if isinstance(terms, dfx.ODETerm) else 0.01)
        return t0 + self._clipped(jnp.asarray(dt0, jnp.result_type(t0))), ()

    def adapt_step_size(
        self,
        t0: Any,
        t1: Any,
        y0: Any,
        y1_candidate: Any,
        args: Any,
        y_error: Any,
        error_order: Any,
        controller_state: Any,
    ) -> tuple[Any, Any, Any, Any, Any, Any]:
        del args, error_order
        scale = SimplifiedNewton(self.rtol, self.atol, self.norm).scale
        size = allowed(scale, y0, y1_candidate)
        error = self.norm(jtu.tree_map(lambda e, s: jnp.abs(e) / s, y_error, size))
        keep, factor = decoded(jnp.asarray(lax.stop_gradient(error)))
        factor = jnp.where(jnp.isfinite(error), factor, 0.5)
        bound = lambda x: jnp.asarray(x).astype(factor.dtype)
        factor = jnp.clip(factor, bound(self.factormin), bound(self.factormax))
        step = t1 - t0
        wanted = step * factor.astype(jnp.result_type(step))
        result = dfx.RESULTS.successful
        if self.dtmin is not None:
            failed = dfx.RESULTS.dt_min_reached
            result = dfx.RESULTS.where(wanted < self.dtmin, failed, result)
        next_t0 = jnp.where(keep, t1, t0)
        return keep, next_t0, next_t0 + self._clipped(wanted), False, (), result

    def _clipped(self, step: Scalar) -> Scalar:
        if self.dtmax is not None:
            step = jnp.minimum(step, jnp.asarray(self.dtmax).astype(step.dtype))
        if self.dtmin is not None:
            step = jnp.maximum(step, jnp.asarray(self.dtmin).astype(step.dtype))
        return step

    def _first_step(self, terms: Any, t0: Any, y0: Any, args: Any, func: Any) -> Scalar:
        scale = SimplifiedNewton(self.rtol, self.atol, self.norm).scale(y0)
        time = jnp.result_type(t0)

        def size(v):
            scaled = jtu.tree_map(lambda x, s: jnp.abs(x) / s, v, scale)
            return jnp.asarray(self.norm(scaled)).astype(time)

        f0 = func(terms, t0, y0, args)
        d0, d1 = size(y0), size(f0)
        tiny = (d0 < 1e-5) | (d1 < 1e-5)
        h0 = jnp.where(tiny, 1e-6, 0.01 * d0 / jnp.where(tiny, 1, d1)).astype(time)
        f1 = func(terms, t0 + h0, tree.axpy(h0, f0, y0), args)
        d2 = size(tree.sub(f1, f0)) / h0
        most = jnp.maximum(d1, d2)
        flat = most <= 1e-15
        h1 = jnp.sqrt(0.01 / jnp.where(flat, 1, most))
        h1 = jnp.where(flat, jnp.maximum(1e-6, 1e-3 * h0), h1)
        return jnp.minimum(100 * h0, h1)


def allowed(scale: Any, y0: Any, y1: Any) -> Any:
    """atol + rtol max(|y0|, |y1|), which a step size controller measures errors in; y0 stands in
    the place of what is not a number."""

    def larger(a, b):
        b = jnp.where(jnp.isnan(b).any(), a, b)
        return jnp.maximum(jnp.abs(a), jnp.abs(b))

    return scale(jtu.tree_map(larger, y0, y1))

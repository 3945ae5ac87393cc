"""FAS: the root that Newton finds, in a number of cycles that does not depend on the mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.accelerate.fas import FAS
from nksolve.precondition.cycle import FCycle, VCycle, WCycle
from nksolve.precondition.multigrid import Multigrid
from nksolve.precondition.smoothers import JacobiSmoother
from nksolve.precondition.transfer import VertexDirichlet
from nksolve.problems.bratu import bratu_residual
from tests.helpers import Counter

LAM = jnp.asarray(6.0)
COUNTER = Counter()


V21 = VCycle(2, 1)


def fas(cycle=V21, rtol=1e-8, **keywords):
    multigrid = Multigrid(bratu_residual, VertexDirichlet(), cycle=cycle, coarsest=60, **keywords)
    return FAS(rtol, 0.0, multigrid)


@functools.cache
def solved(n, max_steps=256):
    y0 = jnp.zeros((n, n))
    return nks.root_find(bratu_residual, fas(), y0, LAM, max_steps=max_steps, throw=False)


def counted(u, lam):
    return bratu_residual(COUNTER.tick(u), lam)


def test_mesh_independent_cycles_to_the_root_of_newton():
    newton = nks.NewtonKrylov(1e-11, 0.0, linear_solver=nks.GMRES(restart=100))
    root = nks.root_find(bratu_residual, newton, jnp.zeros((31, 31)), LAM).value
    np.testing.assert_allclose(solved(31).value, root, rtol=1e-6)
    stats = [solved(n).stats for n in (31, 63)]
    cycles = [int(s["num_steps"]) for s in stats]
    assert max(cycles) <= 10 and abs(cycles[0] - cycles[1]) <= 1
    for s in stats:
        assert nks.reason_name(s["reason"]) == "residual_rtol"
        rate = (s["residual_norm"] / s["initial_residual_norm"]) ** (1 / float(s["num_steps"]))
        assert rate < 0.15


def test_counters_are_the_real_ones():
    with COUNTER.measure() as count:
        stats = nks.root_find(counted, fas(VCycle(2, 1)), jnp.zeros((15, 15)), LAM).stats
        stats = jax.tree.map(int, {k: stats[k] for k in stats if k.startswith("num_")})
    assert stats["num_linearisations"] == 1 + 4 * stats["num_steps"] == stats["num_fn_evals"]
    assert count.primal == stats["num_fn_evals"]
    assert count.tangent == stats["num_matvecs"] + stats["num_probes"]


def test_gradient():
    loss = lambda lam: jnp.sum(
        nks.root_find(bratu_residual, fas(rtol=1e-10), jnp.zeros((15, 15)), lam).value ** 2
    )
    value, slope = jax.jit(jax.value_and_grad(loss))(LAM)
    ahead, behind = loss(LAM + 1e-4), loss(LAM - 1e-4)
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-4, rtol=1e-6)
    np.testing.assert_allclose(value, (ahead + behind) / 2, rtol=1e-6)


def test_lanes_stop_by_themselves():
    solver = FAS(1e-8, 1e-10, fas().multigrid)
    run = lambda lam: nks.root_find(bratu_residual, solver, jnp.zeros((15, 15)), lam)
    batch = jnp.asarray([1e-6, 6.0])
    value, steps = jax.vmap(lambda lam: (lambda s: (s.value, s.stats["num_steps"]))(run(lam)))(
        batch
    )
    assert int(steps[0]) < int(steps[1])
    for i, lam in enumerate(batch):
        alone = run(lam)
        assert int(alone.stats["num_steps"]) == int(steps[i])
        np.testing.assert_allclose(value[i], alone.value, rtol=1e-10)


def test_jacobi_and_w_cycles():
    for solver, most in ((fas(WCycle(1, 1)), 9), (fas(smoother=JacobiSmoother(sweeps=2)), 12)):
        sol = nks.root_find(bratu_residual, solver, jnp.zeros((31, 31)), LAM)
        np.testing.assert_allclose(sol.value, solved(31).value, rtol=1e-6)
        assert int(sol.stats["num_steps"]) <= most


def test_honest_failures():
    few = solved(31, max_steps=2)
    assert nks.reason_name(few.stats["reason"]) == "max_steps"
    achieved = jnp.linalg.norm(bratu_residual(few.value, LAM))
    np.testing.assert_allclose(few.stats["residual_norm"], achieved, rtol=1e-10)
    run = functools.partial(nks.root_find, bratu_residual, fas(), throw=False, max_steps=60)
    beyond = run(jnp.zeros((15, 15)), jnp.asarray(9.0))
    assert nks.reason_name(beyond.stats["reason"]) in ("diverged", "nonfinite", "max_steps")
    assert np.all(np.isfinite(beyond.value))
    nan = run(jnp.full((15, 15), jnp.nan), LAM)
    assert nks.reason_name(nan.stats["reason"]) == "nonfinite"


def test_what_is_refused():
    with pytest.raises(TypeError, match="multigrid"):  # by the type check or by ours
        FAS(1e-8, 0.0, VertexDirichlet())
    with pytest.raises(ValueError, match="V- and W-cycles"):
        fas(FCycle())

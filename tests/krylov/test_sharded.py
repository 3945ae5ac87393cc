"""A solve over several devices: the same answer, no gathered vector, few reductions."""

import math

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import nksolve as nks
from tests.helpers import AS_SHIPPED, collectives


@pytest.mark.parametrize(("devices", "n"), [(8, 1024), (2, 16384)], ids=["one block", "blocks"])
def test_sharded(devices, n):
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} devices")
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("x",)), P("x"))
    d, b = 1 + jnp.linspace(0.0, 9.0, n), jnp.cos(jnp.linspace(0.0, 0.7 * n, n))

    @jax.jit
    def solve(d, b):
        operator = lx.FunctionLinearOperator(
            lambda v: d * v + 2 * jnp.mean(v), jax.eval_shape(lambda: b)
        )
        solution = lx.linear_solve(operator, b, nks.GMRES(rtol=1e-9, restart=20), throw=False)
        return solution.value, solution.result, solution.stats["num_matvecs"]

    x, result, matvecs = solve(d, b)
    placed = jax.device_put((d, b), sharding)
    lowered = solve.lower(*placed)
    compiled = lowered.compile(AS_SHIPPED)
    y, sharded_result, sharded_matvecs = compiled(*placed)
    assert bool(result == lx.RESULTS.successful)
    assert bool(sharded_result == lx.RESULTS.successful)
    assert int(matvecs) == int(sharded_matvecs)
    np.testing.assert_allclose(np.asarray(y), np.asarray(x), rtol=1e-10, atol=1e-12)
    assert not y.sharding.is_fully_replicated

    found = collectives(compiled.as_text())
    for one in found:
        assert one.kind == "all-reduce"
        assert all(math.prod(t.shape) < n // devices for t in one.shapes), one
    # The operator's mean is one of them; three are the method's.
    by_body = {}
    for one in found:
        if one.in_loop:
            by_body[one.computation] = by_body.get(one.computation, 0) + 1
    assert by_body and max(by_body.values()) <= 4, by_body

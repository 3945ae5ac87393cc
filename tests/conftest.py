"""What every test runs under. The environment is set before jax is imported."""

import gc
import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent

# Subprocesses (examples, the import test) inherit these; in this process jax reads them on import.
# A value that the caller has set is kept, so that the same tests can run on another backend.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_COMPILATION_CACHE_DIR": str(_ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    # A counter is read when a call returns: what was dispatched must have run by then.
    "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
    # Two xdist workers share two cores: one thread each is faster than two each.
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}
if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could set its environment")
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# Derandomised and without a database: a run depends on the source alone. Compilation makes first
# examples slow, so there is no deadline.
hypothesis.settings.register_profile(
    "nksolve",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=20,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("nksolve")


_MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Each compiled program is mapped into memory several times over, and Linux allows 65,530
    mappings: XLA dies beyond. Drops the programs of earlier modules where many have gathered."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """A PRNG key that depends on the test's own name, the same in every run."""
    seed = sum(ord(c) * 31**i for i, c in enumerate(request.node.name)) % 2**31
    return jax.random.key(seed)


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return _ROOT

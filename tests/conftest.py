"""What every test runs under. The environment is set before jax is imported."""

import gc
import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent

# Compilation is nearly all that the tests spend. LLVM without optimisation and XLA's plain emitters
# make it several times cheaper and change results by rounding alone; counters and traces stay the
# same. What looks into a compiled program asks for `tests.helpers.AS_SHIPPED`.
_CHEAP_COMPILATION = (
    " --xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
)

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
if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    _ENVIRONMENT["XLA_FLAGS"] += _CHEAP_COMPILATION
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


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not walk it again and again; nor need it
    run after every 700 of the many objects that tracing makes."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


_MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Each compiled program is mapped into memory several times over, and Linux allows 65,530
    mappings: XLA dies beyond. Drops the programs of earlier modules where many have gathered,
    which at this number hold about 3 GB."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 10_000:
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

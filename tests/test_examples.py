"""Every example runs, at its small size. `.ci/run` has a stage of its own for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
# The examples set their own precision and promotion rules, as a user's script does.
_TEST_ONLY = ("JAX_ENABLE_X64", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION")


@pytest.mark.slow
@pytest.mark.parametrize("path", _EXAMPLES, ids=lambda p: p.stem)
def test_example(path, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in _TEST_ONLY}
    environment |= {"NKSOLVE_EXAMPLES_SMALL": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,  # figures land there
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

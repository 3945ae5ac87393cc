"""What `import nksolve` gives, and what it needs."""

import subprocess
import sys
import types

import pytest

import nksolve
import nksolve.ode


def _names(module):
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    )


_PUBLIC = _names(nksolve)
# Distributions that `import nksolve` may not need, by the module that each one installs.
_BLOCKED = (
    "asdex",
    "beartype",
    "diffrax",
    "hypothesis",
    "klujax",
    "matplotlib",
    "optax",
    "pyamg",
    "pytest",
    "rich",
    "tqdm",
    "typer",
)
_SCRIPT = f"""
import sys
for name in {_BLOCKED!r}:
    sys.modules[name] = None  # importing it now raises
import nksolve
"""


def test_there_are_public_names():
    assert {"GMRES", "NewtonKrylov", "root_find"} <= set(_PUBLIC)


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module in (nksolve, nksolve.ode) for name in _names(module)],
)
def test_public_names_have_a_docstring(module, name):
    value = getattr(module, name)
    doc = value.__doc__ if callable(value) or isinstance(value, type) else "a constant"
    # A dataclass without a docstring is given its signature for one.
    assert doc and doc.strip() and not doc.startswith(f"{name}(")


def test_import_needs_only_the_core(root):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _SCRIPT],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

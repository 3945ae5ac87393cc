"""Rules about the source as a whole."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import pytest

import nksolve

_MAX_LINES = 400


def _modules():
    yield nksolve
    for info in pkgutil.walk_packages(nksolve.__path__, "nksolve."):
        if info.name.rpartition(".")[2] != "__main__":
            yield importlib.import_module(info.name)


def _classes():
    found = {
        value
        for module in _modules()
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, eqx.Module)
        and value.__module__.startswith("nksolve")
    }
    return sorted(found, key=lambda c: (c.__module__, c.__qualname__))


def _is_abstract(cls: type) -> bool:
    named = cls.__name__.lstrip("_").startswith("Abstract")
    return named or bool(getattr(cls, "__abstractmethods__", ()))


def test_import_floors(root: Path):
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(linter), "--cache-dir", str(root / ".cache" / "import_linter")],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("cls", _classes(), ids=lambda c: c.__name__)
def test_classes_are_abstract_or_final(cls):
    concrete = [
        base.__name__
        for base in cls.__mro__[1:]
        if base.__module__.startswith("nksolve")
        and issubclass(base, eqx.Module)
        and not _is_abstract(base)
    ]
    assert not concrete, f"{cls.__name__} inherits from concrete {concrete}"


def test_files_hold_one_idea(root: Path):
    lengths = {
        str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (root / "nksolve").rglob("*.py")
    }
    too_long = {path: n for path, n in lengths.items() if n > _MAX_LINES}
    assert not too_long, f"past {_MAX_LINES} lines: look for the second idea in {too_long}"


def test_only_loops_imports_equinox_internals(root: Path):
    """`nksolve.loops` is the only door to `equinox.internal`."""
    door = root / "nksolve" / "loops.py"
    pattern = re.compile(r"^\s*(?:from|import) equinox\.internal\b", re.MULTILINE)
    others = [
        str(path.relative_to(root))
        for path in (root / "nksolve").rglob("*.py")
        if path != door and pattern.search(path.read_text(encoding="utf-8"))
    ]
    assert not others


def test_public_names_are_documented(root: Path):
    pages = "\n".join(p.read_text(encoding="utf-8") for p in (root / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"nksolve\.(\w+)", pages))
    public = {
        name
        for name, value in vars(nksolve).items()
        if not name.startswith("_") and not isinstance(value, type(sys))
    }
    assert public <= documented, f"not in docs/api: {sorted(public - documented)}"

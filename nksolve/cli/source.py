"""What to solve: a problem of the registry, or the user's own file."""

import ast
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ..problems import PROBLEMS, Problem, get
from ..problems.base import identity


class UsageError(Exception):
    """What was asked for cannot be done; the text says why. Exit code 2."""


def load(problem: str, n: int | None, settings: Sequence[str], *, float32: bool) -> Problem:
    """The problem called so, or the one that the file `problem` defines.

    Raises `UsageError` for a name, size, or file that will not do.
    """
    sizes = dict(_setting(text) for text in settings)
    if n is not None:
        sizes["n"] = n
    if problem.endswith(".py") or "/" in problem:
        if sizes:
            raise UsageError(f"{problem} is a file: write its {', '.join(sizes)} into it")
        return _from_file(Path(problem))
    try:
        return get(problem, **sizes, dtype=jnp.float32 if float32 else jnp.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def size_options(name: str) -> str:
    """The sizes and parameters of a problem with their defaults: "n=64, lam=6.0"."""
    parameters = inspect.signature(PROBLEMS[name]).parameters.values()
    return ", ".join(f"{p.name}={p.default}" for p in parameters if p.name != "dtype")


def failure_in(path: Path, error: Exception) -> str:
    """The error in one or two lines, with the last line of the file that led to it."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.resolve()
    ]
    if isinstance(error, SyntaxError):
        place = f", line {error.lineno}"
    else:
        place = f", line {frames[-1].lineno}: {frames[-1].line}" if frames else ""
    return f"{path}{place}\n{type(error).__name__}: {error}"


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--set takes name=value, such as --set lam=5, not {text!r}")
    if name == "dtype":
        raise UsageError("the dtype is chosen by --float32")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def _from_file(path: Path) -> Problem:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    module = _executed(path)
    missing = [name for name in ("fn", "y0") if not hasattr(module, name)]
    if missing:
        raise UsageError(
            f"{path} must define fn(y, args) and y0, and may define args; "
            f"it has no {' and no '.join(missing)}"
        )
    if not callable(module.fn):
        raise UsageError(f"{path}: fn must be a function fn(y, args), not {module.fn!r}")
    y0 = jtu.tree_map(_as_array, module.y0)
    plottable = isinstance(y0, jax.Array) and y0.ndim in (1, 2)
    return Problem(
        name=path.stem,
        title=str(path),
        source=str(path),
        fn=module.fn,
        y0=y0,
        args=getattr(module, "args", None),
        field=identity if plottable else None,
    )


def _executed(path: Path) -> ModuleType:
    # As Python runs a script: modules beside it can be imported.
    sys.path.insert(0, str(path.resolve().parent))
    name = f"nksolve_problem_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(failure_in(path, error)) from error
    return module


def _as_array(leaf: Any) -> Any:
    is_array = isinstance(leaf, (float, complex, np.ndarray, np.inexact))
    return jnp.asarray(leaf) if is_array else leaf

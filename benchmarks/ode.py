"""Stiff integrators: `python -m benchmarks --ode [--small] [--write] [--only …] [--redo …]`.

nksolve beside Diffrax, SciPy and CVODE (scikit-sundae): work–precision curves, gradients, seconds
to compile; the tables go to docs/validation/ode.md, the diagrams to docs/images. Each contender has
a process of its own on each problem, pinned to one core, and is kept in .cache/ode, so that a run
that was stopped goes on where it was; `--redo "bruss-1000 | nksolve"` measures the rows with that
in their names again. `--only` takes names of problems (`bruss-1000`), `gradient`, and parts of the
names of contenders (`BDF`). `--kept` makes the tables of what is kept, and measures nothing.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import ode_gradients as gradients, ode_ours, ode_peers
from .ode_problems import problem
from .ode_tables import tables
from .ode_worker import answers

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "validation" / "ode.md"
STORE = ROOT / ".cache" / "ode"
PROBLEMS = (
    "rober", "hires", "orego", "bruss-100", "bruss-1000", "bruss-10000", "grid-32", "grid-128",
    "gray-32", "rober-1000",
)  # fmt: skip
GRADIENTS = ("bruss-100", "rober")
_SMALL = {
    "rober": ("nksolve Kvaerno5", "Diffrax Kvaerno5", "SciPy BDF", "CVODE dense"),
    "bruss-20": ("nksolve BDF", "CVODE band"),
    "grid-8": ("nksolve BDF",),
}
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
}

Rows = dict[str, dict[str, Any]]


def asked_rows(*, small: bool, only: Sequence[str]) -> list[tuple[str, str, str]]:
    """(kind, problem, contender) in the order in which they are measured."""
    names = [*(_SMALL if small else PROBLEMS)]
    graded = ["rober"] if small else [*GRADIENTS]
    wanted = [name for name in only if name in names] or names
    parts = [name.lower() for name in only if name not in names and name != "gradient"]
    out: list[tuple[str, str, str]] = []
    if "gradient" not in only or len(only) > 1:
        for name in wanted:
            known = problem(name)
            every = [*ode_ours.rows(known), *ode_peers.rows(known)]
            rows = [row for row in every if not small or row in _SMALL[name]]
            out += [("curve", name, row) for row in rows]
    if not only or "gradient" in only:
        rows = gradients.ROWS[:1] if small else gradients.ROWS
        out += [("gradient", name, row) for name in graded for row in rows]
    return [asked for asked in out if not parts or any(part in asked[2].lower() for part in parts)]


def report(
    *,
    small: bool,
    only: Sequence[str],
    repeats: int,
    budget: float,
    redo: Sequence[str] = (),
    store: Path = STORE,
    limit: float = 100.0,
    measure: bool = True,
    pictures: bool = True,
) -> str:
    """All tables, of the kept rows where there are any; without `measure`, of those alone.

    `budget` is of seconds for the runs of a contender on a problem, of which the first one is made
    whatever it takes, up to `limit` seconds for the whole process.
    """
    store = store / "small" if small else store
    kept = _read(store, redo)
    results: Rows = {}
    for kind, name, row in asked_rows(small=small, only=only):
        key = " | ".join((name, row) if kind == "curve" else (kind, name, row))
        if key not in kept:
            if not measure:
                continue
            asked: dict[str, Any] = {"kind": kind, "problem": name, "row": row, "store": str(store)}
            asked |= {"repeats": repeats, "budget": budget}
            if small:  # two tolerances, and no process: to see that it runs
                asked["ladder"] = (1e-3, 1e-5)
                kept[key] = _gathered(kind, list(answers(asked)))
            else:
                _process({**asked, "row": None, "kind": "curve"}, 600.0)  # its reference
                kept[key] = _gathered(kind, *_process(asked, limit))
            if "missing" not in kept[key]:
                _write(store, key, kept[key])
        results[key] = kept[key]
        print(_line(key, kept[key]), flush=True)
    if pictures and not small:
        from .ode_pictures import diagrams

        diagrams(results)
    return "\n\n".join([_versions(), *tables(results)])


def _process(asked: dict[str, Any], limit: float) -> tuple[list[dict[str, Any]], str]:
    """What the worker printed, and what ended it early."""
    command = [sys.executable, "-m", f"{__package__}.ode_worker"]
    command.append(json.dumps({**asked, "pinned": True}))
    environment = {**os.environ, **_ONE_THREAD}
    if asked["row"] is None and not _needs_reference(asked):
        return [], ""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
            timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        text = printed.decode() if isinstance(printed, bytes) else printed
        return [*_parsed(text)], f"more than {limit:g} s"
    last = done.stderr.strip().splitlines()[-1:] or ["no output"]
    ended = "" if done.returncode == 0 else f"process ended with {done.returncode}: {last[0][:120]}"
    return [*_parsed(done.stdout)], ended


def _needs_reference(asked: dict[str, Any]) -> bool:
    known = problem(asked["problem"])
    made = Path(asked["store"]) / f"reference-{known.name}.npz"
    return (known.given.end is None or bool(known.lanes)) and not made.exists()


def _parsed(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _gathered(kind: str, lines: list[dict[str, Any]], ended: str = "") -> dict[str, Any]:
    """A row from what a worker printed."""
    out: dict[str, Any] = {"points": []} if kind == "curve" else {}
    for line in lines:
        if "rtol" in line:
            out["points"].append(line)
        else:
            out |= line
    if ended:
        out["failure"] = ended
    return out


def _versions() -> str:
    names = ("diffrax", "scikit-sundae", "numba")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} missing")
    return "Peers: " + ", ".join(found) + "."


def _read(store: Path, redo: Sequence[str]) -> Rows:
    path = store / "results.jsonl"
    if not path.exists():
        return {}
    kept = dict(json.loads(line) for line in path.read_text().splitlines())
    return {k: v for k, v in kept.items() if not any(r.lower() in k.lower() for r in redo)}


def _write(store: Path, key: str, value: dict[str, Any]) -> None:
    store.mkdir(parents=True, exist_ok=True)
    with (store / "results.jsonl").open("a") as file:
        file.write(json.dumps([key, value]) + "\n")


def _line(key: str, row: dict[str, Any]) -> str:
    parts = [row[name] for name in ("failure", "missing") if row.get(name)]
    if "compile" in row:
        parts.append(f"compiled in {row['compile']:.1f} s")
    for point in row.get("points", []):
        error = f"{point['error']:.1e}" if "error" in point else "failed"
        work = f", work {point['work']}" if "work" in point else ""
        parts.append(f"{point['rtol']:.0e}: {1e3 * point['seconds']:.3g} ms, {error}{work}")
    if "default" in row:
        ratios = [f"{row[name] / row['forward']:.2g}" for name in ("checkpoints", "default")]
        parts.append(
            f"forward {1e3 * row['forward']:.3g} ms, gradient × {' and '.join(ratios)}, "
            f"compiled in {row['forward_compile']:.1f} and {row['default_compile']:.1f} s"
        )
    return f"{key}: " + "; ".join(parts)

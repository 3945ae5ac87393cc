"""Equilibrium layers: `python -m benchmarks --layers [--small] [--write] [--peers PYTHON]`.

A training step of nksolve beside torchdeq, jaxopt and Optimistix; the tables go to
docs/validation/layers.md. Each row runs in a process of its own, pinned to one core, and is kept
in .cache/layers, so that a run that was stopped goes on where it was; `--redo nksolve` measures the
rows with that in their names again. `--only` takes sizes (`D512`), radii (`rho0.9`), `float32`,
`float64`, `joint`, `per-sample`, spectra (`symmetric`, `outliers`, `disc`), and parts of the names
of rows (`Anderson`). `--kept` makes the tables of what is kept, and measures nothing.
"""

import dataclasses
import itertools as it
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import layers_cells as cells
from .layers_tables import tables
from .layers_worker import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "validation" / "layers.md"
STORE = ROOT / ".cache" / "layers"
SPECTRA, MODES = ("symmetric", "outliers", "disc"), ("joint", "per sample")
_OURS = ("nksolve", "Optimistix")  # run by this interpreter; the others by that of `--peers`
_TIMEOUT = 900.0  # of a process
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is solved, and how closely."""

    size: int
    rho: float
    dtype: str
    mode: str
    spectrum: str = "symmetric"

    @property
    def tol(self) -> float:
        """Of both residuals."""
        return 1e-6 if self.dtype == "float32" else 1e-10

    @property
    def tokens(self) -> set[str]:
        """What `--only` may say of it."""
        mode = self.mode.replace(" ", "-")
        return {f"D{self.size}", f"rho{self.rho:g}", self.dtype, mode, self.spectrum}


def cases(*, small: bool) -> list[Case]:
    """Smaller first. Only the first spectrum is measured unless `--only` names another."""
    sizes, radii, dtypes = (64, 512, 2048), (0.5, 0.9, 0.99), ("float32", "float64")
    if small:
        sizes, radii, dtypes = (8,), (0.9,), ("float32",)
    return [
        Case(size, rho, dtype, mode, spectrum)
        for spectrum, dtype, mode, size, rho in it.product(SPECTRA, dtypes, MODES, sizes, radii)
    ]


def report(
    *,
    small: bool,
    only: Sequence[str],
    repeats: int,
    budget: float,
    peers: str = sys.executable,
    redo: Sequence[str] = (),
    families: Sequence[str] = tuple(FAMILIES),
    store: Path = STORE,
    limit: float = 30.0,
    measure: bool = True,
) -> str:
    """All tables of the cases chosen, from the store where it has them; without `measure`, of what
    it has."""
    chosen, names = select(cases(small=small), only)
    ask = dict(repeats=repeats, budget=budget, limit=limit)
    kept = _read(store, redo)
    results: dict[Case, dict[str, dict[str, Any]]] = {}
    missing: dict[str, str] = {}
    if not measure:
        results = {case: _kept_rows(kept, case, names) for case in chosen}
        chosen = []
    for case in chosen:
        cells.cell(case.size, case.rho, case.spectrum, store)
        taken = results.setdefault(case, {})
        for family in families:
            interpreter = sys.executable if family in _OURS else peers
            rows = _process(interpreter, case, store, {"family": family, "row": None})
            if "missing" in rows:
                missing[family] = rows["missing"]
                continue
            for row in rows["rows"]:
                if names and not any(name.lower() in row.lower() for name in names):
                    continue
                known = cells.name(case.size, case.rho, case.spectrum)
                key = f"{row} | {known} | {case.dtype} | {case.mode}"
                if key not in kept:
                    hopeless = _hopeless(case, row, results)
                    kept[key] = hopeless or _process(
                        interpreter, case, store, {"family": family, "row": row, **ask}
                    )
                    _write(store, key, kept[key])
                taken[row] = kept[key]
                print(_line(key, taken[row]), flush=True)
    notes = [f"Left out: {family}, which this environment lacks." for family in missing]
    results = {case: rows for case, rows in results.items() if rows}
    return "\n\n".join([_versions(peers, missing), *notes, *tables(results)])


def _kept_rows(
    kept: dict[str, dict[str, Any]], case: Case, names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The rows of a case that the store has."""
    end = f" | {cells.name(case.size, case.rho, case.spectrum)} | {case.dtype} | {case.mode}"
    rows = {key.removesuffix(end): result for key, result in kept.items() if key.endswith(end)}
    wanted = lambda row: not names or any(name.lower() in row.lower() for name in names)
    return {row: result for row, result in rows.items() if wanted(row)}


def select(every: Sequence[Case], only: Sequence[str]) -> tuple[list[Case], list[str]]:
    """The cases that `--only` chooses, and the rest of what it says: parts of rows' names."""
    known = set().union(*(case.tokens for case in every))
    names = [token for token in only if token not in known]
    chosen = [
        case
        for case in every
        if case.spectrum in only or (case.spectrum == SPECTRA[0] and not set(SPECTRA) & set(only))
    ]
    kinds = (
        lambda case: f"D{case.size}",
        lambda case: f"rho{case.rho:g}",
        lambda case: case.dtype,
        lambda case: case.mode.replace(" ", "-"),
    )
    for kind in kinds:
        wanted = {kind(case) for case in every} & set(only)
        chosen = [case for case in chosen if not wanted or kind(case) in wanted]
    return chosen, names


def _hopeless(case: Case, row: str, results: dict[Case, dict]) -> dict[str, Any] | None:
    """Why it is not run: it was too slow for something easier."""
    for other, taken in results.items():
        easier = other.size <= case.size and other.rho <= case.rho
        same = (other.dtype, other.mode, other.spectrum) == (case.dtype, case.mode, case.spectrum)
        failure = taken.get(row, {}).get("failure", "")
        if other != case and same and easier and "a step" in failure:
            return {"failure": f"not run: {failure} at D = {other.size}, ρ = {other.rho:g}"}
    return None


def _process(interpreter: str, case: Case, store: Path, asked: dict[str, Any]) -> dict[str, Any]:
    path = store / f"{cells.name(case.size, case.rho, case.spectrum)}.npz"
    asked = {**asked, "mode": case.mode, "size": case.size, "dtype": case.dtype}
    asked |= {"tol": case.tol, "cell": str(path), "pinned": True}
    command = [interpreter, "-m", f"{__package__}.layers_worker", json.dumps(asked)]
    environment = {**os.environ, **_ONE_THREAD}
    environment["JAX_ENABLE_X64"] = "1" if case.dtype == "float64" else "0"
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
            timeout=_TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failure": f"more than {_TIMEOUT:g} s to tune: over a step's limit"}
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        return {"failure": f"process ended with {done.returncode}: {last[0][:120]}"}
    return json.loads(lines[-1])


def _versions(peers: str, missing: dict[str, str]) -> str:
    """Of what the peers' interpreter has."""
    names = [n for n in ("torch", "torchdeq", "jaxopt", "jax") if n not in missing]
    program = f"import importlib.metadata as m\nfor n in {names!r}:\n print(n, m.version(n))"
    done = subprocess.run(
        [peers, "-c", program], capture_output=True, text=True, check=False, env=os.environ
    )
    return "The peers' environment: " + ", ".join(done.stdout.splitlines()) + "."


def _read(store: Path, redo: Sequence[str]) -> dict[str, dict[str, Any]]:
    path = store / "results.jsonl"
    if not path.exists():
        return {}
    kept = dict(json.loads(line) for line in path.read_text().splitlines())
    return {k: v for k, v in kept.items() if not any(r.lower() in k.lower() for r in redo)}


def _write(store: Path, key: str, value: dict[str, Any]) -> None:
    store.mkdir(parents=True, exist_ok=True)
    with (store / "results.jsonl").open("a") as file:
        file.write(json.dumps([key, value]) + "\n")


def _line(key: str, result: dict[str, Any]) -> str:
    if result.get("failure"):
        return f"{key}: {result['failure']}"
    return (
        f"{key}: {1e3 * result['seconds']:.3g} ms, gradient error {result['gradient_error']:.1e}, "
        f"compiled in {result['compile_seconds'] or 0:.1f} s {result['label']}"
    )

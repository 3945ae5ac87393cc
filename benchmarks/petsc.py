"""PETSc as a peer: found, compiled and run where it is installed (Debian: `petsc-dev`)."""

import functools as ft
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

#: Where Debian puts PETSc.
_PREFIXES = ("/usr/lib/petscdir/petsc*/*-real", "/usr/lib/petscdir/petsc*/*", "/usr/lib/petsc*/*")
_EXAMPLES = "/usr/share/petsc/*/share/petsc/examples/src"
#: The Bratu problem of PETSc's SNES tutorials, compiled from the installed copy.
BRATU = "snes/tutorials/ex5.c"
BRUSSELATOR = Path(__file__).parent / "petsc_brusselator.c"


class Petsc(NamedTuple):
    """An installation."""

    version: str
    compile: tuple[str, ...]  # the command, without the source and the output
    examples: Path | None
    mpiexec: str | None


class Run(NamedTuple):
    """One solve; `seconds` of `SNESSolve`, `set_up` the part in it that is `PCSetUp`."""

    seconds: float
    set_up: float | None
    newton: int
    krylov: int
    norm: float  # ‖F‖/‖F₀‖, or ‖F‖∞
    failure: str | None


@ft.cache
def find() -> tuple[Petsc | None, str]:
    """PETSc, or `None` and the reason."""
    compiler, config = shutil.which("mpicc"), shutil.which("pkg-config")
    if compiler is None or config is None:
        return None, "no `mpicc` or no `pkg-config` on this machine"
    found = [p for pattern in _PREFIXES for p in sorted(Path("/").glob(pattern[1:]))]
    folders = [str(p / "lib" / "pkgconfig") for p in found]
    if os.environ.get("PETSC_DIR"):
        folders.insert(0, str(Path(os.environ["PETSC_DIR"]) / "lib" / "pkgconfig"))
    environment = {**os.environ, "PKG_CONFIG_PATH": ":".join(folders)}

    def ask(*words: str) -> str | None:
        out = subprocess.run([config, *words], capture_output=True, text=True, env=environment)
        return out.stdout.strip() if out.returncode == 0 else None

    version = ask("--modversion", "PETSc")
    if version is None:
        return None, "no PETSc on this machine (Debian: apt-get install petsc-dev)"
    flags = (ask("--cflags", "--libs", "PETSc") or "").split()
    examples = sorted(Path("/").glob(_EXAMPLES[1:]))
    command = (compiler, "-O3", "-march=native", *flags, "-lm")
    return Petsc(version, command, examples[-1] if examples else None, shutil.which("mpiexec")), ""


@ft.cache
def build(petsc: Petsc, source: Path) -> Path:
    """Compiles a C program into a temporary folder."""
    program = Path(tempfile.mkdtemp(prefix="petsc-")) / source.stem
    first, *rest = petsc.compile
    command = [first, str(source), "-o", str(program), *rest]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


def bratu_program(petsc: Petsc) -> Path | None:
    """PETSc's tutorial, `None` where its source is not installed."""
    source = None if petsc.examples is None else petsc.examples / BRATU
    return None if source is None or not source.exists() else build(petsc, source)


def run_bratu(
    petsc: Petsc, program: Path, options: Sequence[str], *, limit: float, processes: int = 1
) -> Run:
    """One run of the tutorial; the time is that of the log, without start and exit."""
    words = [*options, "-snes_monitor", "-ksp_converged_reason", "-snes_converged_reason"]
    try:
        out = _output(petsc, program, [*words, "-log_view"], limit, processes)
    except _Failed as failed:
        return _failure(limit, str(failed))
    norms = re.findall(r"^\s*\d+ SNES Function norm (\S+)", out, re.MULTILINE)
    linear = re.findall(r"Linear solve converged .* iterations (\d+)", out)
    newton = re.findall(r"Nonlinear solve converged .* iterations (\d+)", out)
    seconds = _event(out, "SNESSolve")
    if not newton or seconds is None:
        reason = re.search(r"Nonlinear solve did not converge due to (\S+)", out)
        return _failure(limit, reason[1] if reason else "no result")
    # With grid sequencing the finest grid comes last: its steps, but all linear iterations.
    krylov, ratio = sum(map(int, linear)), float(norms[-1]) / float(norms[0])
    return Run(seconds, _event(out, "PCSetUp"), int(newton[-1]), krylov, ratio, None)


def run_brusselator(
    petsc: Petsc, program: Path, options: Sequence[str], *, limit: float, repeats: int
) -> Run:
    """The fastest of `repeats` solves in one process: what is allocated once has been."""
    try:
        out = _output(petsc, program, [*options, "-repeats", str(repeats)], limit, 1)
    except _Failed as failed:
        return _failure(limit, str(failed))
    fields = dict(re.findall(r"(\w+)=(\S+)", out))
    reason = fields.get("reason", "no result")
    if not reason.startswith("CONVERGED"):
        return _failure(limit, reason)
    seconds, norm = float(fields["best"]), float(fields["max_norm"])
    return Run(seconds, None, int(fields["newton"]), int(fields["linear"]), norm, None)


class _Failed(Exception):
    """The program gave no result; the text says why."""


def _failure(limit: float, reason: str) -> Run:
    return Run(limit, None, 0, 0, float("nan"), reason)


def _output(
    petsc: Petsc, program: Path, options: Sequence[str], limit: float, processes: int
) -> str:
    command = [str(program), *options]
    if processes > 1:
        if petsc.mpiexec is None:
            raise _Failed("no `mpiexec`")
        command = [petsc.mpiexec, "-n", str(processes), *command]
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment = {**os.environ, **allowed, "OMP_NUM_THREADS": "1"}
    try:
        out = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise _Failed(f"> {limit:g} s") from None
    if out.returncode != 0:
        raise _Failed(f"exit code {out.returncode}")
    return out.stdout


def _event(log: str, name: str) -> float | None:
    """The seconds of an event in PETSc's log: the fourth column."""
    for line in log.splitlines():
        cells = line.split()
        if cells and cells[0] == name:
            return float(cells[3])
    return None

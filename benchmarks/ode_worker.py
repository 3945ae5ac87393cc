"""One row of `python -m benchmarks --ode` in a process of its own; prints points as JSON, a line
each.

Reads a JSON object: problem, row (or null: the names of the rows), kind ("curve" or "gradient"),
repeats, budget, store (a folder), pinned.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main(text: str) -> None:
    """Runs it."""
    asked = json.loads(text)
    if asked.get("pinned") and hasattr(os, "sched_setaffinity"):  # before any thread is made
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for line in answers(asked):
        print(json.dumps(line), flush=True)


def answers(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What was asked: of a curve the seconds to compile, then its points."""
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_enable_compilation_cache", False)
    from . import ode_problems as problems

    known, row = problems.problem(asked["problem"]), asked["row"]
    measured = {name: asked[name] for name in ("repeats", "budget")}
    try:
        if asked["kind"] == "gradient":
            from . import ode_gradients as gradients

            yield gradients.measure(known, row, **measured)
            return
        from . import ode_ours, ode_peers, ode_references as references
        from .ode_timing import curve

        reference = references.reference(known, Path(asked["store"]))
        if row is None:
            yield {"checked": references.checked(known, Path(asked["store"]))}
            return
        module = ode_peers if row.startswith(("SciPy", "CVODE")) else ode_ours
        runner = module.runner(known, row)
        yield {"compile": runner.compile_seconds}
        yield from curve(known, runner, reference, ladder=asked.get("ladder"), **measured)
    except ImportError as error:
        yield {"missing": str(error)}
    except Exception as error:
        lines = str(error).strip().splitlines()
        yield {"failure": f"{type(error).__name__}: {lines[0][:120] if lines else ''}"}


if __name__ == "__main__":
    main(sys.argv[1])

"""One row of `python -m benchmarks --layers` in a process of its own; prints it as JSON.

Reads a JSON object: family, row, mode, size, dtype, tol, cell (a file), repeats, limit, budget.
With no row, prints the names of the rows of the family.
"""

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path

FAMILIES = {
    "nksolve": "layers_ours",
    "Optimistix": "layers_optimistix",
    "jaxopt": "layers_jaxopt",
    "torchdeq": "layers_torch",
}


def main(text: str) -> None:
    """Runs it."""
    asked = json.loads(text)
    if asked.get("pinned") and hasattr(os, "sched_setaffinity"):  # before any thread is made
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        module = importlib.import_module(f".{FAMILIES[asked['family']]}", __package__)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
        return
    rows = module.rows(asked["mode"], asked["size"])
    if asked.get("row") is None:
        print(json.dumps({"rows": list(rows)}))
        return
    from .layers_cells import load
    from .layers_timing import measure

    measured = measure(
        rows[asked["row"]], load(Path(asked["cell"])), asked["dtype"], asked["tol"],
        repeats=asked["repeats"], limit=asked["limit"], budget=asked["budget"],
    )  # fmt: skip
    print(json.dumps(dataclasses.asdict(measured)))


if __name__ == "__main__":
    main(sys.argv[1])

"""Side by side with the peers: `python -m benchmarks [--small] [--write] [--only NAME ...]`.

With `--pde` the partial differential equations of `benchmarks/pde.py`, with `--layers` the
equilibrium layers of `benchmarks/layers.py`, with `--ode` the stiff integrators of
`benchmarks/ode.py`.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import jax

PAGE = Path(__file__).resolve().parent.parent / "docs" / "validation" / "benchmarks.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def machine() -> str:
    """Class of machine, versions, date, command."""
    names = ("jax", "equinox", "lineax", "optimistix", "scipy", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    device = jax.devices()[0]
    command = "python -m benchmarks " + " ".join(sys.argv[1:])
    return (
        f"{device.platform.upper()}, {os.cpu_count()} cores, {platform.machine()}; load average "
        f"{os.getloadavg()[0]:.1f} at the start; {platform.python_implementation()} "
        f"{platform.python_version()}, {versions}; {datetime.date.today():%d %B %Y}; "
        f"`{command.strip()}`."
    )


def report(*, small: bool, only: list[str], repeats: int, budget: float) -> str:
    """All tables."""
    from .choices import competitors
    from .compiling import compile_times
    from .rows import rows
    from .table import compile_table, solve_table
    from .timing import measure

    chosen = [row for row in rows(small=small) if not only or row.name in only]
    parts = [machine()]
    for row in chosen:
        taken = measure(row, competitors(row), repeats=repeats, budget=budget)
        parts.append(solve_table(row, taken))
        print(parts[-1], flush=True)
    # The size of a problem does not matter here: one of each kind.
    kinds = {row.fn: row for row in reversed(chosen) if not row.lanes}.values()
    batches = [row for row in chosen if row.lanes]
    timed = [*reversed(kinds), *batches]
    times = [(row, t) for row in timed for t in compile_times(row, repeats=1 if small else 3)]
    parts.append("### Seconds to compile\n\n" + compile_table(times))
    print(parts[-1], flush=True)
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--pde", action="store_true", help="PDEs, with PETSc among the peers")
    parser.add_argument("--advice", action="store_true", help="methods and preconditioners")
    parser.add_argument("--layers", action="store_true", help="equilibrium layers, with torchdeq")
    parser.add_argument("--ode", action="store_true", help="stiff integrators, with CVODE")
    parser.add_argument("--counts", action="store_true", help="equilibrium cells, no clock")
    parser.add_argument("--nonlinear", action="store_true", help="the 23 problems, no clock")
    parser.add_argument("--honesty", action="store_true", help="how every solver ends, no clock")
    parser.add_argument("--small", action="store_true", help="tiny problems, to see that it runs")
    parser.add_argument(
        "--write", action="store_true", help="write the tables into docs/validation"
    )
    parser.add_argument("--tune", action="store_true", help="repeat the scan behind choices.py")
    parser.add_argument("--only", nargs="*", default=[], help="names of rows")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each competitor")
    parser.add_argument(
        "--peers", default=sys.executable, help="with --layers: a Python with torchdeq and jaxopt"
    )
    parser.add_argument(
        "--redo", nargs="*", default=[], help="with --layers, --ode: measure these rows again"
    )
    parser.add_argument("--kept", action="store_true", help="with --layers, --ode: measure nothing")
    options = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_enable_compilation_cache", False)
    if options.tune:
        from .rows import rows
        from .tuning import tune

        for row in rows(small=options.small):
            if not options.only or row.name in options.only:
                for line in tune(row):
                    print(line, flush=True)
        return
    chosen = {name: getattr(options, name) for name in ("small", "only", "repeats", "budget")}
    page = PAGE
    if options.pde:
        from . import pde

        page, text = pde.PAGE, machine() + "\n\n" + pde.report(**chosen)
    elif options.layers:
        from . import layers

        peers = {"peers": options.peers, "redo": options.redo, "measure": not options.kept}
        page, text = layers.PAGE, machine() + "\n\n" + layers.report(**chosen, **peers)
        if not options.write:
            print(text)
    elif options.ode:
        from . import ode

        kept = {"redo": options.redo, "measure": not options.kept, "pictures": options.write}
        page, text = ode.PAGE, machine() + "\n\n" + ode.report(**chosen, **kept)
        if not options.write:
            print(text)
    elif options.counts:
        from . import equilibrium_counts

        page = equilibrium_counts.PAGE
        text = machine() + "\n\n" + equilibrium_counts.report(**chosen)
    elif options.nonlinear:
        from . import nonlinear

        page, text = nonlinear.PAGE, machine() + "\n\n" + nonlinear.report(**chosen)
    elif options.honesty:
        from . import honesty

        page, text = honesty.PAGE, machine() + "\n\n" + honesty.report(**chosen)
    elif options.advice:
        from . import advice

        page, text = advice.PAGE, machine() + "\n\n" + advice.report(**chosen)
    else:
        text = report(**chosen)
    if options.write:
        head, _, rest = page.read_text().partition(BEGIN)
        _, _, tail = rest.partition(END)
        page.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")


if __name__ == "__main__":
    main()

"""The command line. What it needs beyond the package itself is the extra `cli`."""

import sys

_EXTRA = ("typer", "rich")


def main() -> None:
    """Runs `nksolve`; without the extra `cli` it says so in one line and exits with 2."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        print(
            f"nksolve: the command line needs {missing}: pip install 'nksolve[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    app()

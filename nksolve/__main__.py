"""`python -m nksolve`, the same as `nksolve`."""

from .cli import main

if __name__ == "__main__":
    main()

"""Root finders in units of typical sizes of the unknowns and the equations."""

from . import preconditioners as preconditioners

"""Backward differentiation formulas of variable order and step."""

from .controller import BDFController as BDFController
from .interpolation import BDFInterpolation as BDFInterpolation
from .solver import BDF as BDF, BDFState as BDFState

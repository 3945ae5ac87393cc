"""Equilibrium cells with a guarantee: one fixed point, and a bound on its conditioning."""

from .mondeq import MonotoneCell as MonotoneCell
from .normalised import SpectralNormCell as SpectralNormCell

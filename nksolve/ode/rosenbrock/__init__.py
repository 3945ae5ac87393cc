"""Rosenbrock methods: linearly implicit, one linearisation and no Newton iteration."""

from .exponential import Exprb32 as Exprb32, Exprb43 as Exprb43
from .methods import (
    Rodas4 as Rodas4,
    Rodas5P as Rodas5P,
    Rosenbrock23 as Rosenbrock23,
)
from .rok4 import ROK4 as ROK4

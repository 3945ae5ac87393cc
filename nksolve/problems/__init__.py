"""Test problems with published answers: `get("bratu", n=128)`, `PROBLEMS`, or the constructors."""

from .base import Problem as Problem
from .beam import beam as beam
from .bratu import (
    bratu as bratu,
    bratu_1d as bratu_1d,
    bratu_1d_solution as bratu_1d_solution,
    bratu_3d as bratu_3d,
)
from .brusselator import brusselator as brusselator
from .chandrasekhar import (
    chandrasekhar as chandrasekhar,
    chandrasekhar_right as chandrasekhar_right,
)
from .convection_diffusion import (
    convection_diffusion as convection_diffusion,
    convection_diffusion_linear as convection_diffusion_linear,
)
from .food_web import food_web as food_web
from .hammarling import hammarling_2 as hammarling_2, hammarling_3 as hammarling_3
from .kinsol import ferraris_tronconi as ferraris_tronconi, roberts as roberts, robokin as robokin
from .laplace import laplace as laplace
from .nonlinear_library_fixed import (
    boggs as boggs,
    dennis_schnabel as dennis_schnabel,
    double_root as double_root,
    freudenstein_roth as freudenstein_roth,
    helical_valley as helical_valley,
    powell_badly_scaled as powell_badly_scaled,
    powell_singular as powell_singular,
    sample_18 as sample_18,
    sample_19 as sample_19,
    wood as wood,
)
from .nonlinear_library_sized import (
    brown_almost_linear as brown_almost_linear,
    broyden_banded as broyden_banded,
    broyden_tridiagonal as broyden_tridiagonal,
    chebyquad as chebyquad,
    discrete_boundary_value as discrete_boundary_value,
    discrete_integral_equation as discrete_integral_equation,
    generalised_rosenbrock as generalised_rosenbrock,
    trigonometric as trigonometric,
    variably_dimensioned as variably_dimensioned,
)
from .registry import NONLINEAR_LIBRARY as NONLINEAR_LIBRARY, PROBLEMS as PROBLEMS, get as get
from .simple_2d import simple_2d as simple_2d
from .watson import watson as watson, watson_terms as watson_terms

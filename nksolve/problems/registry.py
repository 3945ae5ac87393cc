"""Problems by name, as on the command line."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from .base import Problem
from .beam import beam
from .bratu import bratu, bratu_1d, bratu_3d
from .brusselator import brusselator
from .chandrasekhar import chandrasekhar, chandrasekhar_right
from .convection_diffusion import convection_diffusion, convection_diffusion_linear
from .food_web import food_web
from .hammarling import hammarling_2, hammarling_3
from .kinsol import ferraris_tronconi, roberts, robokin
from .laplace import laplace
from .nonlinear_library_fixed import (
    boggs,
    dennis_schnabel,
    double_root,
    freudenstein_roth,
    helical_valley,
    powell_badly_scaled,
    powell_singular,
    sample_18,
    sample_19,
    wood,
)
from .nonlinear_library_sized import (
    brown_almost_linear,
    broyden_banded,
    broyden_tridiagonal,
    chebyquad,
    discrete_boundary_value,
    discrete_integral_equation,
    generalised_rosenbrock,
    trigonometric,
    variably_dimensioned,
)
from .obstacle import obstacle
from .simple_2d import simple_2d
from .watson import watson

# The 23 problems of test_nonlin and NonlinearProblemLibrary.jl, in their order.
NONLINEAR_LIBRARY: dict[str, Callable[..., Problem]] = {
    "generalised-rosenbrock": generalised_rosenbrock,
    "powell-singular": powell_singular,
    "powell-badly-scaled": powell_badly_scaled,
    "wood": wood,
    "helical-valley": helical_valley,
    "watson": watson,
    "chebyquad": chebyquad,
    "brown-almost-linear": brown_almost_linear,
    "discrete-boundary-value": discrete_boundary_value,
    "discrete-integral-equation": discrete_integral_equation,
    "trigonometric": trigonometric,
    "variably-dimensioned": variably_dimensioned,
    "broyden-tridiagonal": broyden_tridiagonal,
    "broyden-banded": broyden_banded,
    "hammarling-2": hammarling_2,
    "hammarling-3": hammarling_3,
    "dennis-schnabel": dennis_schnabel,
    "sample-18": sample_18,
    "sample-19": sample_19,
    "double-root": double_root,
    "freudenstein-roth": freudenstein_roth,
    "boggs": boggs,
    "chandrasekhar-right": chandrasekhar_right,
}

PROBLEMS: dict[str, Callable[..., Problem]] = {
    "beam": beam,
    "bratu": bratu,
    "bratu-1d": bratu_1d,
    "bratu-3d": bratu_3d,
    "brusselator": brusselator,
    "chandrasekhar": chandrasekhar,
    "convection-diffusion": convection_diffusion,
    "convection-diffusion-linear": convection_diffusion_linear,
    "ferraris-tronconi": ferraris_tronconi,
    "food-web": food_web,
    "laplace": laplace,
    "obstacle": obstacle,
    "roberts": roberts,
    "robokin": robokin,
    "simple-2d": simple_2d,
    **NONLINEAR_LIBRARY,
}


def get(name: str, **sizes: Any) -> Problem:
    """The problem of that name, built with those sizes and parameters: `get("bratu", n=128)`.

    Raises `ValueError` for a name that is not in `PROBLEMS`, with those nearest to it, and for a
    size that the problem does not take, with those that it does.
    """
    if name not in PROBLEMS:
        near = difflib.get_close_matches(name, PROBLEMS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see PROBLEMS for all"
        raise ValueError(f"no problem is called {name!r}; {hint}")
    build = PROBLEMS[name]
    taken = inspect.signature(build).parameters
    refused = [size for size in sizes if size not in taken]
    if refused:
        accepted = ", ".join(f"{p.name}={p.default!r}" for p in taken.values())
        raise ValueError(
            f"the problem {name!r} does not take {', '.join(refused)}; it takes {accepted}"
        )
    # An integer will do for a parameter that is a float, as everywhere in Python.
    is_float = {size for size in sizes if isinstance(taken[size].default, float)}
    return build(
        **{k: float(v) if k in is_float and isinstance(v, int) else v for k, v in sizes.items()}
    )

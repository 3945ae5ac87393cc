"""Tools for the tests: run-time counters, jaxpr and HLO readers, a gallery of matrices, bounds of
rounding errors."""

from .counting import Count as Count, Counter as Counter
from .gallery import GALLERY as GALLERY, Case as Case
from .hlo import (
    AS_SHIPPED as AS_SHIPPED,
    Collective as Collective,
    collectives as collectives,
    selects_at_least as selects_at_least,
    square_tensors as square_tensors,
)
from .jaxprs import (
    count_primitive as count_primitive,
    square_values as square_values,
    walk as walk,
)
from .rounding import rounding_bound as rounding_bound

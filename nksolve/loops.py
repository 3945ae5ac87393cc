"""The only door to `equinox.internal`: what nksolve needs of it, under names of its own."""

from equinox.internal import (
    AbstractProgressMeter as AbstractProgressMeter,
    Enumeration as Enumeration,
    NoProgressMeter as NoProgressMeter,
    TextProgressMeter as TextProgressMeter,
    TqdmProgressMeter as TqdmProgressMeter,
    create_vprim as create_vprim,
    unvmap_any as _unvmap_any,
    while_loop as while_loop,
)

from .typing import Flag


def any_lane(flag: Flag) -> Flag:
    """Whether `flag` holds in any lane of every enclosing `vmap`; itself not batched.

    A loop whose predicate goes through this runs until the slowest lane is done and inserts no
    select over its carry: the body must leave finished lanes as they are.
    """
    return _unvmap_any(flag)

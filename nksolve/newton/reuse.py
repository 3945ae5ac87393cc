"""Where a derivative of a solve takes its linearisation from."""

import equinox as eqx


class AbstractReuse(eqx.Module):
    """Where the linearisation at the root comes from when a solve is differentiated."""


class KeepLinearisation(AbstractReuse):
    """The one that the forward solve ended with: no further evaluation of `fn`.

    The loop of a solve that is differentiated linearises in args too, and carries what the joint
    linear map needs of y: as much as reverse mode through one evaluation of `fn`.
    """


class Relinearise(AbstractReuse):
    """A new one at the root: one further evaluation of `fn`, nothing carried by the loop."""

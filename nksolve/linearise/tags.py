"""What a user may promise of a residual beyond Lineax's tags."""


class _Tag:
    def __init__(self, name: str):
        self._name = name

    def __repr__(self) -> str:
        return self._name


#: The residual is holomorphic in its complex unknowns: J is complex-linear, not only real-linear,
#: so that Krylov methods may work over ℂ instead of over ℝ²ⁿ.
holomorphic_tag = _Tag("holomorphic_tag")

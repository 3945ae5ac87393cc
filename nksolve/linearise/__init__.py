"""Floor 1: a residual is linearised once, and everything downstream uses that."""

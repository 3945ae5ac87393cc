"""torchdeq in `python -m benchmarks --layers`; imported in the peers' environment."""

import functools as ft

import torch
import torchdeq.solver as solvers
from torchdeq import get_deq

from .layers_cells import Cell
from .layers_timing import Prepared, Step, Units, Variant

_MOST = 2000


def rows(mode: str, size: int) -> dict[str, list[Variant]]:
    """Name → variants; forward and backward with the same solver, implicit differentiation."""
    del size
    anderson = solvers.get_solver("anderson")
    broyden = solvers.get_solver("broyden")
    tight = ft.partial(anderson, lam=1e-10)
    memory = lambda n: ft.partial(broyden, LBFGS_thres=n)
    return {
        "torchdeq Picard": [_variant("", solvers.get_solver("fixed_point_iter"), mode)],
        "torchdeq Anderson": [_variant("λ = 1e-4, m = 6", anderson, mode)],
        "torchdeq Anderson, λ = 1e-10": [
            _variant(f"m = {m}", ft.partial(tight, m=m), mode) for m in (6, 12)
        ],
        "torchdeq Broyden": [_variant(f"memory {n}", memory(n), mode) for n in (30, 120)],
    }


def _variant(label: str, solver, mode: str) -> Variant:
    def prepare(known: Cell, units: Units, dtype: str) -> Prepared:
        del units
        torch.set_num_threads(1)
        solvers.register_solver("chosen", solver)
        kind = getattr(torch, dtype)
        names = ("V", "U", "b", "x", "c")
        V, U, b, x, c = (torch.tensor(getattr(known, name), dtype=kind) for name in names)
        for parameter in (V, U, b):
            parameter.requires_grad_()

        def step(forward: float, backward: float) -> Step:
            layer = get_deq(
                ift=True, f_solver="chosen", b_solver="chosen",
                f_max_iter=_MOST, b_max_iter=_MOST, f_tol=forward, b_tol=backward,
                f_stop_mode="rel", b_stop_mode="rel",
            )  # fmt: skip
            layer.train()
            injection = x @ U + b
            if mode == "joint":
                shape = (1, -1)
                fn = lambda z: torch.tanh(z.view_as(c) @ V + injection).view(1, -1)
            else:
                shape = c.shape
                fn = lambda z: torch.tanh(z @ V + injection)
            out, _ = layer(fn, torch.zeros_like(c).view(shape))
            z = out[-1].view_as(c)
            loss = torch.sum(z * c)
            dV, dU, db, moved = torch.autograd.grad(loss, (V, U, b, injection))
            return Step(z.detach(), moved, (dV, dU, db))

        return Prepared(step, None)

    return Variant(label, prepare)

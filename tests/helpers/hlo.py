"""Read what a jitted function is lowered to (StableHLO) and compiled to (HLO), as text.

`jax.jit(f).lower(x).as_text()` gives the first, `….lower(x).compile(AS_SHIPPED).as_text()` the
second.
Selects that `vmap` puts around the carry of a `while_loop` exist only from the lowering on;
collectives exist only after XLA's partitioner has run.
"""

import math
import re
from typing import NamedTuple

# Compiler options with which HLO and buffers are those that users get. Of what tests/conftest.py
# sets to make compilation cheap only the emitters act on them, the rest on LLVM.
AS_SHIPPED = {"xla_cpu_use_fusion_emitters": True}

_TENSOR = re.compile(r"tensor<((?:\d+x)*)([a-zA-Z]\w*(?:<\w+>)?)[,>]")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLED = re.compile(
    r"\b(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_WHILE_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_KINDS = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
# `-start` and `-done` are the two halves of one asynchronous collective: count the first.
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(?:-start)?\(")


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str


class Collective(NamedTuple):
    kind: str  # "all-reduce", "all-gather", …
    shapes: tuple[Tensor, ...]  # of its results, on one device
    computation: str  # the HLO computation that it stands in
    in_loop: bool  # whether the body of a while loop reaches that computation


def _tensors(text: str) -> list[Tensor]:
    return [
        Tensor(tuple(int(d) for d in dims.split("x") if d), dtype)
        for dims, dtype in _TENSOR.findall(text)
    ]


def selects_at_least(stablehlo: str, size: int) -> list[Tensor]:
    """The results of `select` operations that have `size` elements or more."""
    found = []
    for line in stablehlo.splitlines():
        if "stablehlo.select " in line:
            result = _tensors(line)[-1]
            if math.prod(result.shape) >= size:
                found.append(result)
    return found


def square_tensors(stablehlo: str, n: int) -> list[Tensor]:
    """The tensor types that occur in the text and have two or more axes of size n, each once."""
    return sorted({t for t in _tensors(stablehlo) if sum(d == n for d in t.shape) >= 2})


def _computations(hlo: str) -> dict[str, list[str]]:
    computations: dict[str, list[str]] = {}
    current: list[str] = []
    for line in hlo.splitlines():
        if not line.startswith(" ") and (match := _COMPUTATION.match(line)):
            current = computations.setdefault(match[2], [])
        else:
            current.append(line)
    return computations


def _callees(line: str) -> set[str]:
    names = set(_CALLED.findall(line))
    for group in _BRANCHES.findall(line):
        names.update(name.strip().lstrip("%") for name in group.split(","))
    return names


def collectives(hlo: str) -> list[Collective]:
    """The collectives in compiled HLO text, each with the computation it stands in."""
    computations = _computations(hlo)
    callees = {
        name: set().union(*map(_callees, lines)) & set(computations)
        for name, lines in computations.items()
    }
    looped: set[str] = set()
    todo = [
        body for lines in computations.values() for x in lines for body in _WHILE_BODY.findall(x)
    ]
    while todo:
        name = todo.pop()
        if name not in looped:
            looped.add(name)
            todo.extend(callees.get(name, ()))
    found = []
    for name, lines in computations.items():
        for line in lines:
            if match := _COLLECTIVE.search(line):
                shapes = tuple(
                    Tensor(tuple(int(d) for d in dims.split(",") if d), dtype)
                    for dtype, dims in _ARRAY.findall(match[1])
                )
                found.append(Collective(match[2], shapes, name, name in looped))
    return found

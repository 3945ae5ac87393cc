"""Sets of combinations in which everything meets everything else."""

import functools as ft
import itertools

import numpy as np

from tests.newton.composing import (
    FACTORS,
    FORCINGS,
    GLOBALISATIONS,
    LINEAR_SOLVERS,
    PRECONDITIONERS,
    WITHOUT_FIELD,
    Combination,
    linear_solver,
    solver,
    suits,
)

_PAIRS = list(itertools.permutations(range(len(FACTORS)), 2))


def refusal(globalisation: str, method: str, preconditioner: str) -> Exception | None:
    """Why a solver of these parts is refused, if it is."""
    first = Combination(globalisation, *(next(iter(f)) for f in FACTORS[1:]))
    try:
        solver(first._replace(linear_solver=method, preconditioner=preconditioner))
    except (TypeError, ValueError) as error:
        return error
    return None


@ft.cache
def refusals() -> dict[tuple[str, str, str], Exception | None]:
    """That of every globalisation, linear solver and preconditioner. A forcing term and a policy
    are never in the way."""
    out = {}
    for method, preconditioner in itertools.product(LINEAR_SOLVERS, PRECONDITIONERS):
        if method in WITHOUT_FIELD and preconditioner != "Identity":
            continue
        try:
            linear_solver(method, preconditioner)
        except (TypeError, ValueError) as error:
            out |= {(search, method, preconditioner): error for search in GLOBALISATIONS}
            continue
        for search in GLOBALISATIONS:
            out[search, method, preconditioner] = refusal(search, method, preconditioner)
    return out


@ft.cache
def allowed() -> np.ndarray:
    """All combinations that are not refused and that suit a problem, as places in the lists."""
    place = [{name: k for k, name in enumerate(factor)} for factor in FACTORS]
    triples = sorted(
        (place[0][search], place[2][method], place[3][preconditioner])
        for (search, method, preconditioner), error in refusals().items()
        if error is None and suits(search, method, preconditioner)
    )
    rest = list(itertools.product(range(len(FORCINGS)), range(len(FACTORS[4]))))
    return np.array([(g, f, k, m, a) for g, k, m in triples for f, a in rest], np.int16)


def meetings(rows: np.ndarray, *, by_kind: bool) -> list[np.ndarray]:
    """For each two lists the number of the meeting in each row: of a member of one with a member
    of the other, or with a kind of it."""
    second, width = [], []
    for factor, column in zip(FACTORS, rows.T, strict=True):
        labels = [part.kind if by_kind else name for name, part in factor.items()]
        kinds = sorted(set(labels))
        numbers = np.array([kinds.index(label) for label in labels])
        second.append(numbers[column])
        width.append(len(kinds))
    return [rows[:, i].astype(np.int64) * width[j] + second[j] for i, j in _PAIRS]


@ft.cache
def covering(*, by_kind: bool = True) -> list[Combination]:
    """A set in which every part meets every kind of each other list (or every part of it), as far
    as they are allowed to: the combination with the most new meetings, again and again.

    Two lists of 24 and 17 make more than 300 meetings, so that no set of 150 lets every part meet
    every other; members of a kind differ in what they do, not in what they ask of the others.
    """
    rows = allowed()
    # Of equally good ones the first is taken: not always those at the head of the lists.
    rows = rows[np.argsort(np.arange(len(rows)) * 50_021 % 1_000_003)]
    numbers = meetings(rows, by_kind=by_kind)
    missing = [np.zeros(column.max() + 1, np.int16) for column in numbers]
    for flags, column in zip(missing, numbers, strict=True):
        flags[column] = 1
    out = []
    while any(flags.any() for flags in missing):
        new = sum(flags[column] for flags, column in zip(missing, numbers, strict=True))
        best = int(np.argmax(new))
        for flags, column in zip(missing, numbers, strict=True):
            flags[column[best]] = 0
        names = [list(factor)[k] for factor, k in zip(FACTORS, rows[best], strict=True)]
        out.append(Combination(*names))
    return out

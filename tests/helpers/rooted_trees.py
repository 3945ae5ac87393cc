"""Rooted trees of one, two and three kinds, and the order conditions that they stand for."""

import functools as ft
import itertools as it
import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from nksolve.ode.rosenbrock.tableau import RowForm


class Tree(NamedTuple):
    """A vertex of a colour with branches: "f" (a derivative of f), "A" (the matrix that stands in
    for f_y; one branch), "z" (the algebraic variable −g_z⁻¹(…) of a problem of index 1)."""

    colour: str
    branches: tuple["Tree", ...]

    @property
    def order(self) -> int:
        return (self.colour != "z") + sum(branch.order for branch in self.branches)

    @property
    def density(self) -> int:
        """γ(t): the exact solution has the coefficient 1/γ(t)."""
        own = 1 if self.colour == "z" else self.order
        return own * math.prod(branch.density for branch in self.branches)

    @property
    def tall(self) -> bool:
        """Whether no vertex has two branches: Jᵏf."""
        return all(branch.tall for branch in self.branches) and len(self.branches) < 2


def _forests(weight: int, pool) -> set[tuple[Tree, ...]]:
    """Multisets of trees with `weight` vertices (or order) in all."""
    found = set()
    for parts in _partitions(weight):
        for choice in it.product(*(pool(k) for k in parts)):
            found.add(tuple(sorted(choice)))
    return found


def _partitions(n: int, largest: int | None = None):
    largest = n if largest is None else largest
    if n == 0:
        yield ()
    for k in range(min(n, largest), 0, -1):
        for rest in _partitions(n - k, k):
            yield (k, *rest)


@ft.cache
def rooted(order: int) -> tuple[Tree, ...]:
    """All rooted trees: 1, 1, 2, 4, 9, 20, …"""
    return tuple(Tree("f", forest) for forest in sorted(_forests(order - 1, rooted)))


@ft.cache
def two_coloured(order: int) -> tuple[Tree, ...]:
    """TW-trees: a vertex with one branch is of f or of A; 1, 2, 5, 13, …

    Hairer & Wanner II, section IV.7 (W-methods)."""
    found = []
    for forest in sorted(_forests(order - 1, two_coloured)):
        found += [Tree("f", forest)] + [Tree("A", forest)] * (len(forest) == 1)
    return tuple(found)


@ft.cache
def krylov_trees(order: int) -> tuple[Tree, ...]:
    """TK-trees: over a tall tree A and f_y are the same, as A Jᵏf = J Jᵏf in a Krylov space.

    Such vertices are given the colour "J". Tranquilli & Sandu 2014, section 3."""
    return tuple(sorted({_recoloured(tree) for tree in two_coloured(order)}))


def _recoloured(tree: Tree) -> Tree:
    branches = tuple(sorted(_recoloured(branch) for branch in tree.branches))
    return Tree("J" if tree.tall and branches else tree.colour, branches)


@ft.cache
def differential(order: int) -> tuple[Tree, ...]:
    """Trees of y' = f(y, z), 0 = g(y, z), rooted in y."""
    return tuple(Tree("f", forest) for forest in sorted(_forests(order - 1, _either)))


@ft.cache
def algebraic(order: int) -> tuple[Tree, ...]:
    """The same, rooted in z; a "z" with one branch has one that is rooted in y.

    Hairer & Wanner II, section VI.4 (after Roche)."""
    alone = [Tree("z", (tree,)) for tree in differential(order)]
    several = [f for f in _forests_below(order) if len(f) > 1]
    return tuple(alone + [Tree("z", forest) for forest in sorted(several)])


def _either(order: int) -> tuple[Tree, ...]:
    return differential(order) + algebraic(order)


def _forests_below(order: int) -> set[tuple[Tree, ...]]:
    """Multisets of two or more trees; each is of lower order, so the recursion ends."""
    found = set()
    for parts in _partitions(order):
        if len(parts) > 1:
            for choice in it.product(*(_either(k) for k in parts)):
                found.add(tuple(sorted(choice)))
    return found


def stage_weights(tree: Tree, row: RowForm) -> np.ndarray:
    """φᵢ(t) of a Rosenbrock method for each stage.

    A lone branch under "f" is met by f_y, through β = α + γ, in the trees of one colour; where
    the tree has an "A" among its kind (`two_coloured`), use `stage_weights_w`."""
    beta = row.alpha + row.gamma
    values = [stage_weights(branch, row) for branch in tree.branches]
    if not values:
        return np.ones(len(row.b))
    if len(values) == 1:
        return values[0] if tree.colour == "z" else beta @ values[0]
    product = math.prod(row.alpha @ value for value in values)
    return np.linalg.solve(beta, product) if tree.colour == "z" else product


def stage_weights_w(tree: Tree, row: RowForm) -> np.ndarray:
    """φᵢ(t) where f_y and A are told apart: α under "f", γ under "A", both under "J"."""
    values = [stage_weights_w(branch, row) for branch in tree.branches]
    if not values:
        return np.ones(len(row.b))
    if tree.colour == "A":
        return row.gamma @ values[0]
    if tree.colour == "J":
        return (row.alpha + row.gamma) @ values[0]
    return math.prod(row.alpha @ value for value in values)


def has_a(tree: Tree) -> bool:
    return tree.colour == "A" or any(has_a(branch) for branch in tree.branches)


def wanted(tree: Tree) -> Fraction:
    """1/γ(t), and zero for a tree with an A, which the exact solution does not have."""
    return Fraction(0) if has_a(tree) else Fraction(1, tree.density)

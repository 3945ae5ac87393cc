"""Where J can be nonzero: found from the linear map v → J v, coloured, and its entries read off."""

import functools as ft
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import jax.extend.core as jec
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, Inexact

from .. import tree
from .probing import compressed

# A full pattern of more unknowns than this is refused: to detect it was a mistake.
_DENSE_UP_TO = 256
# Patterns that were found, by what they were found from.
_FOUND: dict[bytes, "Pattern"] = {}
_MOST_FOUND = 256


class Pattern:
    """The places (i, j) of an n × n matrix that may be nonzero, coloured for matvecs.

    Columns of one colour share no row, so that one matvec with the sum of their unit vectors gives
    the entries of all of them. Entries are sorted by row, then column; a place that is named twice
    counts once. Rows and columns count the entries of the unknown leaf after leaf, each in C order.

    Immutable, and compared by what it holds: a static value for `jax.jit`.

    **Arguments:**

    - `rows`, `cols`: integer arrays of one length, the places.
    - `n`: the number of unknowns.

    **Attributes:** `rows`, `cols`, `n`; `nnz`, the number of places; `density`, nnz/n²;
    `bandwidth`, the pair (lower, upper) of half-bandwidths, max(i − j) and max(j − i); `colours`,
    the colour of each column; `num_colours`.

    **Raises:** `ValueError` for places outside of the matrix. `colours` raises `ImportError` where
    a pattern that is no full band needs asdex, and asdex is missing.

    Colours: j modulo the width of the band where the band is full, else those of asdex (greedy,
    columns of the largest degree first), or of the band where those are fewer.
    """

    rows: np.ndarray
    cols: np.ndarray
    n: int
    _key: tuple[int, bytes]

    def __init__(self, rows: Any, cols: Any, n: int):
        rows, cols = (np.asarray(x).reshape(-1).astype(np.int64) for x in (rows, cols))
        n = int(n)
        if rows.shape != cols.shape:
            raise ValueError(
                f"A pattern needs as many row indices as column indices; got {rows.size} and "
                f"{cols.size}."
            )
        indices = np.concatenate([rows, cols])
        if indices.size and (indices.min() < 0 or indices.max() >= n):
            raise ValueError(
                f"The pattern of {n} unknowns has indices from 0 to {n - 1}; got some from "
                f"{indices.min()} to {indices.max()}."
            )
        places = np.unique(rows * n + cols)
        self._set("rows", (places // max(n, 1)).astype(np.int32))
        self._set("cols", (places % max(n, 1)).astype(np.int32))
        self._set("n", n)
        self._set("_key", (n, hashlib.sha1(places.tobytes()).digest()))
        self.rows.setflags(write=False)
        self.cols.setflags(write=False)

    @classmethod
    def from_coo(cls, rows: Any, cols: Any, n: int) -> "Pattern":
        """The pattern with those places (rows[k], cols[k])."""
        return cls(rows, cols, n)

    @classmethod
    def from_scipy(cls, matrix: Any) -> "Pattern":
        """The pattern of a square SciPy sparse matrix: what it stores, zeros included."""
        coo = matrix.tocoo()
        if coo.shape[0] != coo.shape[1]:
            raise ValueError(f"A pattern is square; the matrix has shape {coo.shape}.")
        return cls(coo.row, coo.col, coo.shape[0])

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("A `Pattern` is immutable.")

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Pattern) and self._key == other._key)

    def __repr__(self) -> str:
        return f"Pattern(n={self.n}, nnz={self.nnz}, bandwidth={self.bandwidth})"

    @property
    def nnz(self) -> int:
        """Number of places."""
        return self.rows.size

    @property
    def density(self) -> float:
        """nnz/n²."""
        return self.nnz / max(self.n, 1) ** 2

    @property
    def bandwidth(self) -> tuple[int, int]:
        """(lower, upper): max(i − j) and max(j − i), at least 0."""
        below = self.rows.astype(np.int64) - self.cols
        return int(max(below.max(initial=0), 0)), int(max((-below).max(initial=0), 0))

    @property
    def colours(self) -> np.ndarray:
        """The colour of each column, int32, shape (n,)."""
        return self._colouring[0]

    @property
    def num_colours(self) -> int:
        """Number of colours: the matvecs that the entries cost."""
        return self._colouring[1]

    def transpose(self) -> "Pattern":
        """The pattern of the transpose."""
        return Pattern(self.cols, self.rows, self.n)

    def values(self, operator: lx.AbstractLinearOperator) -> Inexact[Array, " nnz"]:
        """The entries of the operator at (rows[k], cols[k]): `num_colours` matvecs in one batch.

        Entries of the operator outside of the pattern end up, wrongly, in others: the pattern must
        hold all. Complex operators are taken as complex-linear.
        """
        self.check_size(operator)
        if self.nnz == 0:
            return jnp.zeros((0,), tree.scalar_dtype(operator.in_structure()))
        entries = compressed(operator, self.colours, self.num_colours).reshape(-1)
        return entries.at[self._index].get(mode="promise_in_bounds", unique_indices=True)

    def check_size(self, operator: lx.AbstractLinearOperator) -> None:
        """Raises where an operator has not n rows and n columns."""
        sizes = tree.size(operator.out_structure()), tree.size(operator.in_structure())
        if sizes != (self.n, self.n):
            raise ValueError(
                f"The pattern is of {self.n} unknowns, but the operator is {sizes[0]} x "
                f"{sizes[1]}. A pattern counts the entries of all leaves of the unknown."
            )

    # Cached by hand: `functools.cached_property` would write to an immutable object.

    @property
    def _colouring(self) -> tuple[np.ndarray, int]:
        if "_colours" not in vars(self):
            self._set("_colours", _colour(self))
        return vars(self)["_colours"]

    @property
    def _index(self) -> np.ndarray:
        """Where the entries stand in the flattened (num_colours, n) products with the seeds."""
        if "_places" not in vars(self):
            places = self.colours[self.cols].astype(np.int64) * self.n + self.rows
            self._set("_places", places.astype(np.int32))
        return vars(self)["_places"]


def find_pattern(operator: lx.AbstractLinearOperator) -> Pattern:
    """The pattern of J, from the program of v → J v; nothing is evaluated.

    It holds every place that the program can reach whatever values the linearisation holds, so it
    is the pattern at every point. Integer index arrays count by their values where these are known:
    always outside of `jax.jit`. One that only the compiled program will know makes what it gathers
    depend on everything. A user who knows better gives a `Pattern`.

    **Arguments:**

    - `operator`: a square Lineax operator, such as `nks.linearise(fn, y, args).operator`; it may be
      traced.

    **Returns:** the same `Pattern` object for the same program (found once, then looked up).

    **Raises:** `ImportError` without asdex; `ValueError` where the operator is not square, where
    asdex cannot follow its program, and where more than 256 unknowns seem to depend on each other
    all, which no sparse method is for.

    Source: Hill & Dalle, Sparser, Better, Faster, Stronger: sparsity detection for efficient
    automatic differentiation, arXiv 2501.17737 (index sets carried through the program).
    """
    structure = operator.in_structure()
    n, m = tree.size(structure), tree.size(operator.out_structure())
    if n != m:
        raise ValueError(f"A pattern is found of a square operator; this one is {m} x {n}.")
    if n == 0:
        return Pattern([], [], 0)
    leaves, treedef = jtu.tree_flatten(structure)

    def product(*vector):
        return jtu.tree_leaves(operator.mv(jtu.tree_unflatten(treedef, vector)))

    closed = jax.make_jaxpr(product)(*leaves)
    known = [_known(value) for value in closed.consts]
    key = _fingerprint(closed, known)
    if key not in _FOUND:
        if len(_FOUND) >= _MOST_FOUND:
            _FOUND.pop(next(iter(_FOUND)))
        _FOUND[key] = _detect(closed, known, leaves, n)
    return _FOUND[key]


def _detect(closed: jec.ClosedJaxpr, known: list, leaves: list, n: int) -> Pattern:
    asdex = _asdex()
    unknown = [
        _some(value)
        for value, constant in zip(closed.consts, known, strict=True)
        if constant is None
    ]

    # What a linearisation keeps enters as an argument, of which no derivative is asked.
    def product(vector, unknown):
        rest = iter(unknown)
        consts = [next(rest) if constant is None else constant for constant in known]
        return jax.core.eval_jaxpr(closed.jaxpr, consts, *vector)

    try:
        with jax.ensure_compile_time_eval():
            found = asdex.jacobian_sparsity(product, [*map(_some, leaves)], unknown, argnums=0)
    except Exception as error:
        raise ValueError(
            "asdex could not follow the program of v -> J v to find where J is nonzero "
            f"({type(error).__name__}: {error}). Give the pattern: "
            "`nks.Pattern.from_coo(rows, cols, n)`, or `nks.Pattern.from_scipy(matrix)`."
        ) from error
    if len(found.rows) == n * n and n > _DENSE_UP_TO:
        raise ValueError(
            f"Each of the {n} residuals seems to depend on each of the unknowns: for a sparse "
            "method J must be sparse. If it is, the program hides it (an index array that is only "
            "known to the compiled program, a Fourier transform, a linear solve): give the "
            "pattern, `nks.Pattern.from_coo(rows, cols, n)`, or find it outside of `jit` by "
            "`nks.find_pattern(nks.linearise(fn, y, args).operator)`. If it is not, use a Krylov "
            "method."
        )
    return Pattern(found.rows, found.cols, n)


def _some(like: Any) -> np.ndarray:
    """An array of that shape and dtype, of one number: only those two are looked at."""
    return np.broadcast_to(np.zeros((), like.dtype), like.shape)


def _known(value: Any) -> np.ndarray | None:
    """The values of an index array. Others are as they are at this point only."""
    if isinstance(value, jax.core.Tracer) or not jnp.issubdtype(value.dtype, jnp.integer):
        return None
    return np.asarray(value)


def _fingerprint(closed: jec.ClosedJaxpr, known: list) -> bytes:
    """A digest of a program and of the constants in it."""
    digest = hashlib.sha1(str(closed.jaxpr).encode())
    for value in (*known, *_constants(closed.jaxpr)):
        digest.update(b"?" if value is None else str((value.dtype, value.shape)).encode())
        digest.update(b"" if value is None else np.ascontiguousarray(value).tobytes())
    return digest.digest()


def _constants(jaxpr: jec.Jaxpr) -> Iterator[np.ndarray]:
    """Arrays that stand in a program and not in its text."""
    for eqn in jaxpr.eqns:
        for atom in eqn.invars:
            if isinstance(atom, jec.Literal) and np.ndim(atom.val):
                yield np.asarray(atom.val)
        for param in jtu.tree_leaves(list(eqn.params.values()), is_leaf=_is_program):
            if isinstance(param, jec.ClosedJaxpr):
                yield from (
                    np.asarray(x) for x in param.consts if not isinstance(x, jax.core.Tracer)
                )
                yield from _constants(param.jaxpr)
            elif isinstance(param, jec.Jaxpr):
                yield from _constants(param)


def _is_program(param: Any) -> bool:
    return isinstance(param, jec.ClosedJaxpr | jec.Jaxpr)


def _colour(pattern: Pattern) -> tuple[np.ndarray, int]:
    n, (lower, upper) = pattern.n, pattern.bandwidth
    width = min(lower + upper + 1, n)
    band = (np.arange(n) % max(width, 1)).astype(np.int32), width
    fullest = int(np.bincount(pattern.rows, minlength=1).max(initial=0)) if pattern.nnz else 0
    if width <= fullest or n == 0:  # no colouring has fewer
        return band
    asdex = _asdex()
    sparsity = asdex.SparsityPattern.from_coo(
        pattern.rows, pattern.cols, (n, n), input_avals=(jax.ShapeDtypeStruct((n,), np.float32),)
    )
    colours, num_colours = asdex.color_cols(sparsity)
    if num_colours >= width:
        return band
    return np.asarray(colours, np.int32), int(num_colours)


@ft.cache
def _asdex() -> Any:
    try:
        import asdex
    except ImportError as error:
        raise ImportError(
            "Finding and colouring the sparsity pattern of J needs asdex: "
            "`pip install 'nksolve[sparse]'`. Without it, `nks.Pattern.from_coo(rows, cols, n)` of "
            "a full band needs no colouring."
        ) from error
    return asdex

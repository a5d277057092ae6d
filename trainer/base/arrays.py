"""Numbers of very many pairs, looked at some at a time: numpy's own ways take 8 to 24 bytes a number for a moment."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SOME = 1 << 18  # numbers that are looked at together


def smallest(largest: int) -> Any:
    """The smallest signed integer type for numbers up to `largest`. Signed: -lengths shall be no surprise."""
    return next(kind for kind in (np.int8, np.int16, np.int32, np.int64) if largest <= np.iinfo(kind).max)


def parts(count: int, start: int = 0) -> Iterator[slice]:
    """`start` to `count`, some at a time."""
    return (slice(first, min(first + SOME, count)) for first in range(start, count, SOME))


def counted(codes: np.ndarray, size: int, weights: Callable[[slice], np.ndarray] | None = None) -> np.ndarray:
    """(size,) how often each number below `size` is in `codes` (n,), or the sum of their `weights`."""
    found = [np.bincount(codes[part], weights and weights(part), minlength=size) for part in parts(len(codes))]
    return np.asarray(sum(found, np.zeros(size, int)))


def places(codes: np.ndarray, meant: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Where `codes` (n,) are what is `meant`, ascending, in the smallest type for places in them."""
    kind = smallest(len(codes))
    count = sum(np.count_nonzero(meant(codes[part])) for part in parts(len(codes)))
    found, end = np.empty(count, kind), 0
    for part in parts(len(codes)):
        own = np.flatnonzero(meant(codes[part]))
        found[end : end + len(own)] = own + part.start
        end += len(own)
    return found


def taken(table: np.ndarray, places: np.ndarray) -> np.ndarray:
    """table[places], (n,)."""
    found = np.empty(len(places), table.dtype)
    for part in parts(len(places)):
        found[part] = table[places[part]]
    return found


def hashed(digest: Any, array: np.ndarray) -> None:
    """Adds integers (n,) to a digest as 64 bits, whatever type they are kept in."""
    for part in parts(len(array)):
        digest.update(array[part].astype("<i8").tobytes())

"""What rows are called in messages: a place, and of several files the very file and its own row."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

MOST = 3  # names that a line says


class Place(str):
    """The name of what rows come from. Of several files, `parts` are (name, number of the first row) of each."""

    parts: tuple[tuple[str, int], ...] = ()

    @classmethod
    def joined(cls, names: Sequence[str], sizes: Sequence[int]) -> Place:
        """That of the rows of `names`, one after the other, each of which has so many."""
        parts, start = [], 0
        for name, size in zip(names, sizes, strict=True):
            parts += [(own, start + first) for own, first in parts_of(name)]
            start += size
        place = cls(listed([name for name, _ in parts]))
        place.parts = tuple(parts)
        return place


def parts_of(place: str) -> tuple[tuple[str, int], ...]:
    """The files of a place, each with the number of its first row."""
    return (place.parts if isinstance(place, Place) else ()) or ((place, 0),)


def at(place: str, row: int) -> str:
    """A row, which counts over all files of `place`, by its file and the number that it has there."""
    parts = parts_of(place)
    name, start = parts[bisect_right(parts, int(row), key=lambda part: part[1]) - 1]
    return f"{name}, row {int(row) - start}"


def rows_at(place: str, rows: Iterable[int], most: int) -> str:
    """`rows` by their files, as in `a.csv, rows 1, 2; b.csv, row 7`: so many of them at `most`."""
    ordered = sorted(map(int, rows))
    found: dict[str, list[str]] = {}
    for row in ordered[:most]:
        name, _, number = at(place, row).rpartition(", row ")
        found.setdefault(name, []).append(number)
    said = [f"{name}, row{'s' * (len(numbers) > 1)} {', '.join(numbers)}" for name, numbers in found.items()]
    return "; ".join(said) + (", ..." if len(ordered) > most else "")


def listed(names: Sequence[str]) -> str:
    """All names, or the first ones and how many more there are."""
    if len(names) <= 1:
        return "".join(names)
    if len(names) > MOST:
        return f"{', '.join(names[: MOST - 1])} and {len(names) - MOST + 1} more"
    return f"{', '.join(names[:-1])} and {names[-1]}"

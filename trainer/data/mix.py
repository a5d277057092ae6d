"""How often an epoch has the pairs of each source: `source_weights`.

Of a source of n pairs and weight w, an epoch has floor(w) copies of all, and the first round((w - floor(w)) * n) of a
permutation that is drawn for this epoch and source. So its size is the same in every epoch, and which pairs it has is a
pure function of seed and epoch.
"""

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial

import numpy as np
import torch

from trainer.base.arrays import counted, hashed, places, taken
from trainer.base.errors import UserError
from trainer.base.fields import mapped
from trainer.data.pairs import Pairs


@dataclass(frozen=True)
class Mix:
    """The weights of the sources of a training split; `codes` (pairs,) is each pair's source, a place in `names`."""

    names: tuple[str, ...]
    weights: tuple[Fraction, ...]
    codes: np.ndarray

    @classmethod
    def of(cls, given: list[str] | None, pairs: Pairs) -> "Mix | None":
        """None where all count alike. Raises UserError for a weight that is none, or of a source that is not there."""
        if given is None:
            return None
        sizes = pairs.sizes
        weights = {name: _weight(name, text) for name, text in mapped(given).items()}
        if len(sizes) < 2:
            raise UserError(f"source_weights needs several sources, and {pairs.name} is one; give several files to "
                            "train_file, or a column source")  # fmt: skip
        for name, weight in weights.items():
            if name not in sizes:
                raise UserError(f"source_weights: no source is called {name!r}; there are {', '.join(sizes)}")
            if not math.floor(weight) and not _part(weight, sizes[name]):
                raise UserError(f"source_weights: {float(weight):g} of the {sizes[name]:,} pairs of {name} is none; "
                                "raise it, or leave the file out")  # fmt: skip
        assert pairs.source is not None
        return cls(tuple(sizes), tuple(weights.get(name, Fraction(1)) for name in sizes), pairs.source)

    def __len__(self) -> int:
        """Pairs of an epoch."""
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Pairs of each source in an epoch."""
        return [math.floor(w) * count + _part(w, count) for w, count in zip(self.weights, self.counts, strict=True)]

    @cached_property
    def counts(self) -> list[int]:
        """Pairs of each source."""
        return [int(count) for count in counted(self.codes, len(self.names))]

    def of_classes(self, label: np.ndarray, num_classes: int) -> np.ndarray:
        """(classes,) how many pairs an epoch has of each, on average; `label` (pairs,)."""
        share = np.array(self.sizes) / self.counts  # how often it has a pair of each source
        return counted(label, num_classes, lambda part: share[self.codes[part]])

    def describe(self) -> str:
        """How many of each source an epoch has."""
        each = zip(self.names, self.sizes, self.counts, strict=True)
        return ", ".join(f"{size:,} from the {count:,} of {name}" for name, size, count in each)

    def rows(self, seed: int, epoch: int) -> np.ndarray:
        """(len(self),) the pairs of an epoch, which ascend."""
        chosen = []
        for number, weight in enumerate(self.weights):
            own = places(self.codes, partial(np.equal, number))
            chosen.append(np.tile(own, math.floor(weight)))
            if size := _part(weight, len(own)):
                chosen.append(taken(own, _permutation(len(own), seed, epoch, number)[:size]))
        rows = np.concatenate(chosen)
        rows.sort()
        return rows

    @cached_property
    def identity(self) -> str:
        """Another one is another order."""
        weights = ", ".join(f"{name}={weight}" for name, weight in zip(self.names, self.weights, strict=True))
        digest = hashlib.sha256()
        hashed(digest, self.codes)
        return f"{weights}; {digest.hexdigest()[:16]}"


def _part(weight: Fraction, size: int) -> int:
    """What a weight takes of a source beside entire copies; a half is rounded to the even number."""
    return round((weight - math.floor(weight)) * size)


def _permutation(size: int, seed: int, epoch: int, source: int) -> np.ndarray:
    """(size,) drawn for one source and epoch."""
    digest = hashlib.sha256(f"source {seed} {epoch} {source}".encode()).digest()
    return permutation(size, int.from_bytes(digest[:8], "big") >> 1)


def permutation(size: int, seed: int) -> np.ndarray:
    """A permutation (size,) in the smaller type that holds it: torch draws the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator, dtype=torch.int32 if size < 2**31 else torch.int64).numpy()


def _weight(name: str, text: str) -> Fraction:
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"source_weights: {text!r} of {name} is no number; write it as {name}=0.5") from None
    if weight <= 0:
        hint = "leave the file out" if weight == 0 else "a weight is positive"
        raise UserError(f"source_weights: {name}={text}; {hint}")
    return weight

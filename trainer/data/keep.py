"""The pairs of a split in a folder of the cache, by their content: what one process has settled, all others map."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.pairs import Pairs, Spooled
from trainer.data.stored import Check, locked, prune, reopened, store, stored
from trainer.rows.places import Place, parts_of

FORMAT = 1
ARRAYS = ("row", "label", "source", "values", "of_class")
FACTS = ("label_names", "source_names", "num_dropped", "num_available", "columns", "split", "mapped", "said", "files")


def kept(pairs: Pairs, folder: Path, check: Check) -> Path:
    """The folder of these pairs; one that is there and sound is taken. Raises OSError."""
    assert isinstance(pairs.texts, Spooled)
    facts = {name: getattr(pairs, name) for name in FACTS}
    facts |= {"name": str(pairs.name), "parts": parts_of(pairs.name), "format": FORMAT}
    facts["texts"] = [str(path) for path in pairs.texts.paths]
    arrays: dict[str, np.ndarray] = {n: own for n in ARRAYS if (own := getattr(pairs, n)) is not None}
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    path = folder / digest.hexdigest()[:32]
    with locked(path, check):
        if stored(path) is None:
            store(path, arrays, facts)
            prune(folder)
    return path


def opened(path: Path) -> Pairs:
    """Those of a folder that this process or another one of the node has just written or looked at.

    Raises UserError.
    """
    held = reopened(path)
    facts: dict[str, Any] = held.facts
    name = Place(facts["name"])
    name.parts = tuple((own, start) for own, start in facts["parts"])
    tuples = {own.name for own in dataclasses.fields(Pairs) if str(own.type).startswith("tuple")}
    values = {own: tuple(facts[own]) if own in tuples else facts[own] for own in FACTS}
    arrays = {own: held.arrays.get(own) for own in ARRAYS}
    texts = Spooled(tuple(map(Path, facts["texts"])), held.arrays["row"])
    return Pairs(name, texts=texts, **arrays, **values)  # type: ignore[arg-type]

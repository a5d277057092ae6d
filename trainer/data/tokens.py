"""Pairs as token numbers: computed once a node, kept flat, cached on disk, mapped by every rank.

All pairs of a split are one array of token numbers with offsets, a few dozen bytes a pair; no Python list of lists
stays alive. Shares of the pairs are computed by all ranks that share the cache, and joined there by one. The folder
is named by everything that decides its content: see stored.py.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.base.arrays import hashed
from trainer.base.errors import UserError
from trainer.data.pairs import Pairs, Rows, Spooled, Texts
from trainer.data.stored import Stored

FORMAT = "crossrank-tokens-1"  # a part of the fingerprint, and so of what a checkpoint must meet again
CHUNK = 2000  # pairs a call of the tokenizer: enough to keep its threads busy, few enough for a moving progress bar
CHARACTERS = 1 << 22  # of a call: before they are cut, its tokens take some fifty bytes a character


@dataclass(frozen=True)
class Tokens:
    """The tokens of n pairs.

    Attributes:
        ids: (tokens,) token numbers in the smallest fitting integer type.
        offsets: (n + 1,) pair i is ids[offsets[i]:offsets[i + 1]].
        lengths: (n,) tokens of each pair.
        types: (tokens,) their token types as the tokenizer gives them; 0 where its model takes none.
        largest_type: of these.
        used: the distinct token numbers, ascending.
        num_cut: pairs that were longer than max_length.
        fingerprint: of the texts, the labels, the tokenizer and the options.
    """

    ids: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    types: np.ndarray
    used: np.ndarray
    num_cut: int
    fingerprint: str
    largest_type: int = 0

    @classmethod
    def of(cls, ids: np.ndarray, offsets: np.ndarray, types: np.ndarray, num_cut: int, fingerprint: str) -> "Tokens":
        """Those of arrays in memory."""
        used = np.flatnonzero(np.bincount(ids))
        return cls(ids, offsets, np.diff(offsets), types, used, num_cut, fingerprint, int(types.max(initial=0)))

    @property
    def bytes_per_pair(self) -> float:
        """What is kept of a pair."""
        arrays = [self.ids, self.offsets, self.lengths, *([self.types] if self.types.strides[0] else [])]
        return sum(array.nbytes for array in arrays) / max(1, len(self.lengths))


def of_stored(held: Stored) -> Tokens:
    """Those in a folder; types that are all 0 are not there."""
    arrays = dict(held.arrays)
    arrays.setdefault("types", np.broadcast_to(np.uint8(0), arrays["ids"].shape))
    largest = held.facts.get("largest_type")
    if largest is None:  # of an older version
        largest = int(arrays["types"].max(initial=0)) if arrays["types"].strides[0] else 0
    return Tokens(**arrays, num_cut=held.facts["num_cut"], fingerprint=held.facts["fingerprint"], largest_type=largest)


@dataclass(frozen=True)
class Split:
    """The pairs of a split with their tokens; `name` is what reports, file names and metrics call it."""

    name: str
    pairs: Pairs
    tokens: Tokens

    def __len__(self) -> int:
        return len(self.pairs)

    def describe(self, max_length: int) -> str:
        """What it is, in one line."""
        pairs, tokens = self.pairs, self.tokens
        parts = [pairs.describe(), f"{tokens.lengths.mean():.1f} tokens each", targets_of(pairs)]
        if tokens.num_cut:
            parts.append(f"{tokens.num_cut:,} cut to {max_length} tokens")
        return f"{', '.join(parts)} ({tokens.bytes_per_pair:.0f} bytes per pair)"


def targets_of(pairs: Pairs) -> str:
    """What the labels are, in words."""
    names, values = pairs.label_names, pairs.values
    if values is None:
        return f"{len(names)} classes: " + "/".join(names[:5]) + ("/..." if len(names) > 5 else "")
    if not names:
        return f"scores from {values[0]:g} to {values[-1]:g}"
    return f"{np.mean(pairs.label):.1%} labelled 1" + (f", {names[1]}" if names[1] != "1" else "")


def _backend(tokenizer: Any, max_length: int) -> Any:
    """A copy of the Rust tokenizer that cuts the longest text first."""
    rust = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    rust.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)
    rust.no_padding()
    rust.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens  # to_str() leaves it out
    return rust


def _forgets(rust: Any) -> bool:
    """Whether encode_batch_fast leaves out the types, as it does where no post-processor sets them."""
    pair = [("a b", "a b")]
    return rust.encode_batch_fast(pair)[0].type_ids != rust.encode_batch(pair)[0].type_ids


class Encoder:
    """The tokenizer's tokens of pairs, cut as it would cut them, in memory that grows with the text.

    The library keeps all that it cuts off, as every combination of pieces of the two texts: gigabytes for a pair of
    books. So nothing is cut there, and `cut` does what its `longest_first` does. One is made for many calls: to copy a
    tokenizer of 50,000 words takes longer than to tokenise a thousand pairs.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.rust, self.max_length = _backend(tokenizer, max_length), max_length
        self.from_left = tokenizer.truncation_side == "left"
        self.has_types = "token_type_ids" in tokenizer.model_input_names
        self.slowly = self.has_types and _forgets(self.rust)
        self.digest = self._digest()
        self.room = max_length - self.rust.num_special_tokens_to_add(True)
        self.rust.no_truncation()
        largest = max(self.rust.get_vocab().values(), default=0)  # numbers may have gaps
        self.kind = np.uint16 if largest < 1 << 16 else np.int32
        self.num_ids = largest + 1

    def _digest(self) -> Any:
        """SHA-256 of the tokenizer and the options, with which a fingerprint begins."""
        digest = hashlib.sha256(f"{FORMAT}\n{self.has_types}\n{self.rust.to_str()}\n".encode())
        if self.rust.encode_special_tokens:
            digest.update(b"special tokens as text\n")
        if self.slowly:
            digest.update(b"types of its slow way\n")
        return digest

    def encode(self, texts: list[tuple[str, str]]) -> list[tuple[np.ndarray, np.ndarray, bool]]:
        """Of each pair its ids and types, and whether it was cut."""
        encode = self.rust.encode_batch if self.slowly else self.rust.encode_batch_fast
        return [self.cut(encoding) for encoding in encode(texts)]

    def cut(self, encoding: Any) -> tuple[np.ndarray, np.ndarray, bool]:
        ids = np.array(encoding.ids, dtype=self.kind)
        types = np.array(encoding.type_ids, dtype=np.uint8) * self.has_types
        if len(ids) <= self.max_length:
            return ids, types, False
        kept = self._kept(np.array([-1 if s is None else s for s in encoding.sequence_ids]))
        return ids[kept], types[kept], True

    def _kept(self, text: np.ndarray) -> np.ndarray:
        """Positions that stay of a pair's tokens; `text` (tokens,) is 0 or 1, the text of each, -1 for special ones."""
        places = [np.flatnonzero(text == number) for number in (0, 1)]
        shorter, longer = sorted(map(len, places))
        longer = max(shorter, self.room - shorter)
        if shorter + longer > self.room:
            shorter = self.room // 2
            longer = self.room - shorter
        sizes = (shorter, longer) if len(places[0]) <= len(places[1]) else (longer, shorter)
        starts = [len(own) - size if self.from_left else 0 for own, size in zip(places, sizes, strict=True)]
        parts = [own[i : i + size] for own, i, size in zip(places, starts, sizes, strict=True)]
        return np.sort(np.concatenate([np.flatnonzero(text < 0), *parts]))

    def chunks(
        self, texts: Texts | Spooled, start: int, end: int
    ) -> Iterator[list[tuple[np.ndarray, np.ndarray, bool]]]:
        """What `encode` says of pairs `start` to `end`, as many at a time as suit one call."""
        for premises, hypotheses in texts.between(start, end):
            for own in _chunks(premises, hypotheses):
                yield self.encode(list(zip(premises[own], hypotheses[own], strict=True)))

    def fingerprint(self, pairs: Texts | Pairs) -> str:
        """Of the tokenizer, the options, all premises, all hypotheses and the labels."""
        digest = self.digest.copy()
        texts = pairs if isinstance(pairs, Texts) else pairs.texts
        for place in (0, 1):
            separator = ""
            for part in texts.between(0, len(pairs)):
                digest.update((separator + "\x1e".join(part[place])).encode("utf-8", "surrogatepass"))
                separator = "\x1e"
            digest.update(b"\x1d")
        if isinstance(pairs, Pairs):
            hashed(digest, pairs.label)
            if pairs.values is not None:
                digest.update(pairs.values.tobytes())
        return str(digest.hexdigest())


def nothing_of(pairs: Rows, number: int) -> UserError:
    return UserError(f"{pairs.at(number)}: the tokenizer makes no token of this pair, not even a special one")


def _chunks(premises: list[str], hypotheses: list[str]) -> Iterator[slice]:
    """CHUNK pairs each, or so many that they have about CHARACTERS."""
    start = size = 0
    for row, texts in enumerate(zip(premises, hypotheses, strict=True)):
        size += sum(map(len, texts))
        if row + 1 - start == CHUNK or size > CHARACTERS or row + 1 == len(premises):
            yield slice(start, row + 1)
            start, size = row + 1, 0

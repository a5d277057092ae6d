"""Pairs as token numbers: computed once, kept flat, cached on disk.

All pairs of a split are one array of token numbers with offsets, a few dozen bytes a pair; no Python list of lists
stays alive. The cache file is named by a fingerprint of everything that decides its content, is written under another
name and renamed, and carries a checksum: a damaged or foreign file is rebuilt, never trusted.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from trainer.base.errors import UserError, named
from trainer.base.files import remove_remains, replacing
from trainer.base.folders import caches
from trainer.base.log import log
from trainer.data.pairs import Pairs, Texts

FORMAT = "crossrank-tokens-1"  # a part of the fingerprint, and so of what a checkpoint must meet again
ARRAYS = 2  # version of the arrays in a cache file
CHUNK = 2000  # pairs a call of the tokenizer: enough to keep its threads busy, few enough for a moving progress bar
CHARACTERS = 1 << 22  # of a call: before they are cut, its tokens take some fifty bytes a character


@dataclass(frozen=True)
class Tokens:
    """The tokens of n pairs.

    Attributes:
        ids: (tokens,) token numbers in the smallest fitting integer type.
        offsets: (n + 1,) pair i is ids[offsets[i]:offsets[i + 1]].
        types: (tokens,) their token types as the tokenizer gives them; 0 where its model takes none.
        truncated: (n,) whether the pair was longer than max_length.
        fingerprint: of the texts, the labels, the tokenizer and the options.
    """

    ids: np.ndarray
    offsets: np.ndarray
    types: np.ndarray
    truncated: np.ndarray
    fingerprint: str

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each pair; asked for in every step, so computed once."""
        return np.diff(self.offsets)

    @property
    def bytes_per_pair(self) -> float:
        return sum(a.nbytes for a in self._arrays().values()) / max(1, len(self.truncated))

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"ids": self.ids, "offsets": self.offsets, "types": self.types, "truncated": self.truncated}


@dataclass(frozen=True)
class Split:
    """The pairs of a split with their tokens; `name` is what reports, file names and metrics call it."""

    name: str
    pairs: Pairs
    tokens: Tokens

    def __len__(self) -> int:
        return len(self.pairs)

    def describe(self, max_length: int) -> str:
        """One line: its size, and every pair that was dropped or cut."""
        pairs, tokens = self.pairs, self.tokens
        parts = [pairs.describe(), f"{tokens.lengths.mean():.1f} tokens each"]
        parts.append(targets_of(pairs))
        if num_cut := int(tokens.truncated.sum()):
            parts.append(f"{num_cut:,} cut to {max_length} tokens")
        return f"{', '.join(parts)} ({tokens.bytes_per_pair:.0f} bytes per pair)"


def targets_of(pairs: Pairs) -> str:
    """What the labels are, in words."""
    names, values = pairs.label_names, pairs.values
    if values is None:
        return f"{len(names)} classes: " + "/".join(names[:5]) + ("/..." if len(names) > 5 else "")
    if not names:
        return f"scores from {values[0]:g} to {values[-1]:g}"
    return f"{np.mean(pairs.label):.1%} labelled 1" + (f", {names[1]}" if names[1] != "1" else "")


def cache_folder() -> Path:
    """In $CROSSRANK_CACHE, or crossrank/ in $XDG_CACHE_HOME or ~/.cache."""
    return caches(os.environ)["CROSSRANK_CACHE"] / "tokens"


def tokenize(
    pairs: Texts,
    tokenizer: Any,
    max_length: int,
    folder: Path | None,
    progress: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Tokens:
    """The tokens of `pairs`, from the cache in `folder` if it has them; one process writes, the node's others wait.

    `folder` None: no cache. One that cannot be written is a warning, not an error. `check` is called now and then, and
    may raise to stop.
    """
    return Encoder(tokenizer, max_length).tokens(pairs, folder, progress, check)


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

    def _digest(self) -> Any:
        """SHA-256 of the tokenizer and the options, with which a fingerprint begins."""
        digest = hashlib.sha256(f"{FORMAT}\n{self.has_types}\n{self.rust.to_str()}\n".encode())
        if self.rust.encode_special_tokens:
            digest.update(b"special tokens as text\n")
        if self.slowly:
            digest.update(b"types of its slow way\n")
        return digest

    def fingerprint(self, pairs: Texts) -> str:
        digest = self.digest.copy()
        for texts in (pairs.premise, pairs.hypothesis):
            digest.update("\x1e".join(texts).encode("utf-8", "surrogatepass") + b"\x1d")
        if isinstance(pairs, Pairs):
            digest.update(pairs.label.tobytes())
            if pairs.values is not None:
                digest.update(pairs.values.tobytes())
        return digest.hexdigest()

    def tokens(
        self, pairs: Texts, folder: Path | None, progress: bool = False, check: Callable[[], None] = lambda: None
    ) -> Tokens:
        """See tokenize."""
        fingerprint = self.fingerprint(pairs)
        if folder is None:
            return self._encode(pairs, fingerprint, progress, check)
        tokens = None
        path = folder / f"{fingerprint}.{ARRAYS}.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                remove_remains(path)
                tokens = _read(path, fingerprint)
                if tokens is None:
                    tokens = self._encode(pairs, fingerprint, progress, check)
                    _write(tokens, path)
        except (OSError, SafetensorError) as error:
            log.warning(f"no token cache, tokenising at every start: {named(error)}")
        return tokens or self._encode(pairs, fingerprint, progress, check)

    def _encode(self, pairs: Texts, fingerprint: str, progress: bool, check: Callable[[], None]) -> Tokens:
        flat, types, lengths, truncated = [], [], [], []
        with tqdm(total=len(pairs), desc="tokenising", unit="pair", delay=3, disable=None if progress else True) as bar:
            for chunk in _chunks(pairs):
                encoded = self.encode(list(zip(pairs.premise[chunk], pairs.hypothesis[chunk], strict=True)))
                flat.append(np.concatenate([ids for ids, _, _ in encoded]))
                types.append(np.concatenate([own for _, own, _ in encoded]))
                lengths += [len(ids) for ids, _, _ in encoded]
                truncated += [cut for _, _, cut in encoded]
                bar.update(len(encoded))
                check()
        if 0 in lengths:
            nothing = "the tokenizer makes no token of this pair, not even a special one"
            raise UserError(f"{pairs.at(lengths.index(0))}: {nothing}")
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return Tokens(np.concatenate(flat), offsets, np.concatenate(types), np.array(truncated), fingerprint)

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


def _chunks(pairs: Texts) -> Iterator[slice]:
    """CHUNK pairs each, or so many that they have about CHARACTERS."""
    start = size = 0
    for row, texts in enumerate(zip(pairs.premise, pairs.hypothesis, strict=True)):
        size += sum(map(len, texts))
        if row + 1 - start == CHUNK or size > CHARACTERS or row + 1 == len(pairs):
            yield slice(start, row + 1)
            start, size = row + 1, 0


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode() + arrays[name].tobytes())
    return digest.hexdigest()


def _write(tokens: Tokens, path: Path) -> None:
    arrays = tokens._arrays()
    with replacing(path) as temporary:
        save_file(arrays, temporary, metadata={"sha256": _checksum(arrays)})


def _read(path: Path, fingerprint: str) -> Tokens | None:
    from safetensors import safe_open

    if not path.exists():
        return None
    path.open("rb").close()  # what can't be read is not damaged; the next line would not say so
    try:
        arrays = load_file(path)
        with safe_open(path, framework="numpy") as file:
            expected = (file.metadata() or {}).get("sha256")
        if expected == _checksum(arrays):
            return Tokens(**arrays, fingerprint=fingerprint)
    except (SafetensorError, KeyError, TypeError, ValueError):
        pass
    log.warning(f"the token cache {path} is damaged; it is built again")
    return None

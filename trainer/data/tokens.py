"""Pairs as token numbers: computed once, kept flat, cached on disk.

All pairs of a split are one array of token numbers with offsets, a few dozen bytes a pair; no Python list of lists
stays alive. The cache file is named by a fingerprint of everything that decides its content, is written under another
name and renamed, and carries a checksum: a damaged or foreign file is rebuilt, never trusted.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from trainer.base.errors import UserError
from trainer.base.files import replacing
from trainer.base.log import log
from trainer.data.sources import Pairs

FORMAT = "crossrank-tokens-1"
CHUNK = 2000  # pairs a call of the tokenizer: enough to keep its threads busy, few enough for a moving progress bar
CHARACTERS = 1 << 22  # of a call: before they are cut, its tokens take some fifty bytes a character
# Tokens by which a tokenizer says where a text begins and ends. In a text they are what somebody has written: text.
ENDS = ("cls_token", "sep_token", "bos_token", "eos_token", "pad_token")
MARKS = (*ENDS, "mask_token", "unk_token")


@dataclass(frozen=True)
class Tokens:
    """The tokens of n pairs.

    Attributes:
        ids: (tokens,) token numbers in the smallest fitting integer type.
        offsets: (n + 1,) pair i is ids[offsets[i]:offsets[i + 1]].
        second: (n,) tokens before the second text (token type 1) begins; the pair's length where types are not used.
        truncated: (n,) whether the pair was longer than max_length.
        fingerprint: of the texts, the labels, the tokenizer and the options.
    """

    ids: np.ndarray
    offsets: np.ndarray
    second: np.ndarray
    truncated: np.ndarray
    fingerprint: str

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each pair; asked for in every step, so computed once."""
        return np.diff(self.offsets)

    @property
    def bytes_per_pair(self) -> float:
        return sum(a.nbytes for a in self._arrays().values()) / max(1, len(self.second))

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"ids": self.ids, "offsets": self.offsets, "second": self.second, "truncated": self.truncated}


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
        parts = [f"{pairs.name}: {len(pairs):,} pairs, {tokens.lengths.mean():.1f} tokens each"]
        names = pairs.label_names
        parts.append(f"{len(names)} classes: " + "/".join(names[:5]) + ("/..." if len(names) > 5 else ""))
        if pairs.num_dropped:
            parts.append(f"{pairs.num_dropped:,} more dropped (no consensus label)")
        if num_cut := int(tokens.truncated.sum()):
            parts.append(f"{num_cut:,} cut to {max_length} tokens")
        return f"{', '.join(parts)} ({tokens.bytes_per_pair:.0f} bytes a pair)"


def cache_folder() -> Path:
    """$CROSSRANK_CACHE, or ~/.cache/crossrank."""
    return Path(os.environ.get("CROSSRANK_CACHE", "~/.cache/crossrank")).expanduser() / "tokens"


def tokenize(
    pairs: Pairs,
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
    rust = _backend(tokenizer, max_length)
    has_types = "token_type_ids" in tokenizer.model_input_names
    encoder = Encoder(rust, max_length, tokenizer, has_types)
    fingerprint = _fingerprint(pairs, rust, has_types, encoder.marks)
    tokens = _cached(pairs, encoder, fingerprint, folder, progress, check)
    _check_marks(pairs, encoder, tokens)
    return tokens


def _cached(
    pairs: Pairs,
    encoder: "Encoder",
    fingerprint: str,
    folder: Path | None,
    progress: bool,
    check: Callable[[], None],
) -> Tokens:
    if folder is None:
        return _encode(pairs, encoder, fingerprint, progress, check)
    tokens = None
    path = folder / f"{fingerprint}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            tokens = _read(path, fingerprint)
            if tokens is None:
                tokens = _encode(pairs, encoder, fingerprint, progress, check)
                _write(tokens, path)
    except (OSError, SafetensorError) as error:
        log.warning(f"no token cache, tokenising at every start: {error}")
    return tokens or _encode(pairs, encoder, fingerprint, progress, check)


def _backend(tokenizer: Any, max_length: int) -> Any:
    """A copy of the Rust tokenizer that cuts the longest text first. Raises UserError where there is none."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} has no Rust tokenizer; save the model's folder with tokenizer.json"
        )
    rust = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    rust.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)
    rust.no_padding()
    return rust


def _fingerprint(pairs: Pairs, rust: Any, has_types: bool, marks: Sequence[str] = ()) -> str:
    digest = hashlib.sha256(f"{FORMAT}\n{has_types}\n{rust.to_str()}\n".encode())
    for texts in (pairs.premise, pairs.hypothesis):
        joined = "\x1e".join(texts)
        digest.update(joined.encode("utf-8", "surrogatepass") + b"\x1d")
        if any(mark in joined for mark in marks):  # older versions took them for the tokenizer's own
            digest.update(b"marks are text")
    digest.update(pairs.label.tobytes())
    return digest.hexdigest()


class Encoder:
    """The tokenizer's tokens of pairs, cut as it would cut them, in memory that grows with the text.

    The library keeps all that it cuts off, as every combination of pieces of the two texts: gigabytes for a pair of
    books. So nothing is cut there, and `cut` does what its `longest_first` does.
    """

    def __init__(self, rust: Any, max_length: int, tokenizer: Any, has_types: bool) -> None:
        self.rust, self.max_length, self.has_types = rust, max_length, has_types
        self.marks = sorted({mark for name in MARKS if (mark := getattr(tokenizer, name, None))})
        self.ends = [rust.token_to_id(end) for name in ENDS if (end := getattr(tokenizer, name, None))]
        self.from_left = tokenizer.truncation_side == "left"
        self.room = max_length - rust.num_special_tokens_to_add(True)

    def encode(self, texts: list[tuple[str, str]]) -> list[tuple[list[int], int, bool]]:
        """Of each pair its ids, the number of those of type 0, and whether it was cut."""
        encodings = self.rust.encode_batch_fast(texts)
        if marked := [i for i, pair in enumerate(texts) if self.has_mark(pair)]:
            self.rust.encode_special_tokens = True
            for i, encoding in zip(marked, self.rust.encode_batch_fast([texts[i] for i in marked]), strict=True):
                encodings[i] = encoding
            self.rust.encode_special_tokens = False
        return [self.cut(encoding) for encoding in encodings]

    def has_mark(self, pair: tuple[str, str]) -> bool:
        return any(mark in text for text in pair for mark in self.marks)

    def cut(self, encoding: Any) -> tuple[list[int], int, bool]:
        ids, types = encoding.ids, encoding.type_ids
        if was_long := len(ids) > self.max_length:
            kept = self._kept(np.array([-1 if s is None else s for s in encoding.sequence_ids]))
            ids, types = np.array(ids)[kept].tolist(), np.array(types)[kept].tolist()
        return ids, len(ids) - (sum(types) if self.has_types else 0), was_long

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


def _chunks(pairs: Pairs) -> Iterator[slice]:
    """CHUNK pairs each, or so many that they have about CHARACTERS."""
    start = size = 0
    for row, texts in enumerate(zip(pairs.premise, pairs.hypothesis, strict=True)):
        size += sum(map(len, texts))
        if row + 1 - start == CHUNK or size > CHARACTERS or row + 1 == len(pairs):
            yield slice(start, row + 1)
            start, size = row + 1, 0


def _encode(pairs: Pairs, encoder: Encoder, fingerprint: str, progress: bool, check: Callable[[], None]) -> Tokens:
    encoder.rust.no_truncation()
    number = np.uint16 if encoder.rust.get_vocab_size() <= 1 << 16 else np.int32
    flat, lengths, second, truncated = [], [], [], []
    with tqdm(total=len(pairs), desc="tokenising", unit="pair", delay=3, disable=not progress) as bar:
        for chunk in _chunks(pairs):
            texts = list(zip(pairs.premise[chunk], pairs.hypothesis[chunk], strict=True))
            encoded = encoder.encode(texts)
            flat.append(np.concatenate([np.array(ids, dtype=number) for ids, _, _ in encoded]))
            lengths += [len(ids) for ids, _, _ in encoded]
            second += [own for _, own, _ in encoded]
            truncated += [cut for _, _, cut in encoded]
            bar.update(len(encoded))
            check()
    if 0 in lengths:
        row = pairs.row[lengths.index(0)]
        raise UserError(f"{pairs.name}, row {row}: the tokenizer makes no token of this pair, not even a special one")
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Tokens(np.concatenate(flat), offsets, np.array(second, np.int32), np.array(truncated), fingerprint)


def _check_marks(pairs: Pairs, encoder: Encoder, tokens: Tokens) -> None:
    """Says that marks in texts are text. Raises UserError where a tokenizer takes them for its own nevertheless."""
    texts = zip(pairs.premise, pairs.hypothesis, strict=True)
    marked = [i for i, pair in enumerate(texts) if encoder.has_mark(pair)]
    if not marked:
        return
    for i in marked:
        ids = tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]]
        if np.isin(ids, encoder.ends).sum() > encoder.max_length - encoder.room:
            raise UserError(
                f"{pairs.name}, row {pairs.row[i]}: the text holds one of {', '.join(encoder.marks)}, which the "
                "tokenizer cannot read as text; remove it"
            )
    log.info(f"{pairs.name}: {len(marked):,} pairs hold special tokens ({', '.join(encoder.marks)}), read as text; "
             f"the first is row {pairs.row[marked[0]]}")  # fmt: skip


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
    try:
        arrays = load_file(path)
        with safe_open(path, framework="numpy") as file:
            expected = (file.metadata() or {}).get("sha256")
        if expected == _checksum(arrays):
            return Tokens(**arrays, fingerprint=fingerprint)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        pass
    log.warning(f"the token cache {path} is damaged; it is built again")
    return None

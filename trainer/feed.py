"""Pairs on their way to the model: rank 0 has them, every rank tokenises its share, and all ranks have all tokens.

So a row is read once and tokenised once, whatever the number of ranks, and batches, which are cut from the tokens of
all, are those of one rank. Only rank 0 opens the input: the others cannot read another one, and need no copy of it.
Texts and tokens travel in a group of their own, which a thread may use while the model's logits use the world's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from trainer.base.errors import TrainingFailed, UserError, first_line
from trainer.data.pairs import Rows, Texts
from trainer.data.tokenize import in_memory
from trainer.data.tokens import Encoder, Tokens, nothing_of
from trainer.meeting import more_connections
from trainer.ranks import World

PART, END, MISTAKE, FAILURE = range(4)  # what comes next


@dataclass(frozen=True)
class Read:
    """Rows of the input: all columns, the pairs among them, and of each row what keeps it from being one."""

    table: pa.Table
    pairs: Texts
    errors: list[str | None]


@dataclass(frozen=True)
class Fed:
    """Pairs that are ready for the model, on every rank; `read` on rank 0 only."""

    rows: Rows
    tokens: Tokens
    read: Read | None


class Feed:
    """Tokens of the same pairs on every rank, each of which has tokenised its share.

    All ranks make one, and then make the same calls.
    """

    def __init__(self, encoder: Encoder, world: World, timeout: int) -> None:
        self.encoder, self.world, self.patience = encoder, world, timedelta(seconds=timeout)

    @cached_property
    def group(self) -> Any:
        """Made when it is first asked for: who evaluates has the tokens from the cache, and needs no connections."""
        return more_connections(self.world.rank, self.world.size, self.patience)

    def tokens(self, pairs: Texts) -> Tokens:
        """Of pairs that every rank has. Raises UserError naming one of which nothing is left."""
        return self._tokens(pairs, pairs.premise[self._mine], pairs.hypothesis[self._mine])

    def of(self, parts: Iterator[Read] | None, place: str) -> Iterator[Fed]:
        """Rank 0's `parts` one after the other; `place` is the name of the input.

        Raises on every rank what rank 0's reading raises.
        """
        if self.world.size == 1:
            assert parts is not None
            for read in parts:
                yield Fed(read.pairs, self.tokens(read.pairs), read)
        elif parts is not None:
            yield from self._sent(parts)
        else:
            yield from self._received(place)

    @property
    def _mine(self) -> slice:
        """Every size-th pair: in a file sorted by length, too, shares are alike."""
        return slice(self.world.rank, None, self.world.size)

    def _tokens(self, rows: Rows, premise: Sequence[str], hypothesis: Sequence[str]) -> Tokens:
        own = Texts(rows.name, rows.row[self._mine], list(premise), list(hypothesis))
        tokens = self._gathered(in_memory(own, self.encoder), len(rows))
        if len(nothing := np.flatnonzero(tokens.lengths == 0)):
            raise nothing_of(rows, int(nothing[0]))
        return tokens

    def _sent(self, parts: Iterator[Read]) -> Iterator[Fed]:
        try:
            for read in parts:
                self._send(PART, packed(read.pairs))
                yield Fed(read.pairs, self.tokens(read.pairs), read)
        except UserError as error:
            self._send(MISTAKE, str(error).encode("utf-8", "backslashreplace"))
            raise
        except (OSError, pa.ArrowException) as error:
            self._send(FAILURE, first_line(error).encode("utf-8", "backslashreplace"))
            raise
        self._send(END, b"")

    def _received(self, place: str) -> Iterator[Fed]:
        while True:
            kind, data = self._receive()
            if kind == END:
                return
            if kind == MISTAKE:
                raise UserError(data.decode())
            if kind == FAILURE:
                raise TrainingFailed(f"rank 0 cannot read {place}: {data.decode()}")
            table = pa.ipc.open_stream(data).read_all()
            rows = Rows(place, table["row"].to_numpy())
            own = table.take(pa.array(np.arange(len(rows))[self._mine]))
            tokens = self._tokens(rows, own["premise"].to_pylist(), own["hypothesis"].to_pylist())
            yield Fed(rows, tokens, None)

    def _send(self, kind: int, data: bytes) -> None:
        dist.broadcast(torch.tensor([kind, len(data)]), 0, group=self.group)
        if data:
            dist.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0, group=self.group)

    def _receive(self) -> tuple[int, bytes]:
        header = torch.zeros(2, dtype=torch.int64)
        dist.broadcast(header, 0, group=self.group)
        kind, size = header.tolist()
        data = torch.empty(size, dtype=torch.uint8)
        if size:
            dist.broadcast(data, 0, group=self.group)
        return kind, data.numpy().tobytes()

    def _gathered(self, own: Tokens, count: int) -> Tokens:
        """The tokens of `count` pairs in their order; `own` are this rank's, every size-th of them."""
        size = self.world.size
        if size == 1:
            return own
        everyones = self._all(own.lengths.tobytes() + own.types.tobytes() + own.ids.tobytes())
        lengths, starts = np.zeros((2, count), dtype=np.int64)
        ids, types, begin = [], [], 0
        for rank, data in enumerate(everyones):
            share = slice(rank, None, size)
            lengths[share] = np.frombuffer(data, np.int64, len(range(count)[share]))
            starts[share] = begin + lengths[share].cumsum() - lengths[share]
            total, before = int(lengths[share].sum()), lengths[share].nbytes
            types.append(np.frombuffer(data, np.uint8, total, before))
            ids.append(np.frombuffer(data, self.encoder.kind, total, before + total))
            begin += total
        offsets = np.concatenate([[0], lengths.cumsum()])
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Tokens.of(np.concatenate(ids)[places], offsets, np.concatenate(types)[places], 0, "")

    def _all(self, own: bytes) -> list[bytes]:
        """Every rank's bytes, on every rank."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = torch.frombuffer(bytearray(own) or bytearray(1), dtype=torch.uint8)[: len(own)]
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]


def packed(pairs: Texts) -> bytes:
    """Texts and rows, as Arrow's stream."""
    texts = {name: pa.array(getattr(pairs, name), pa.large_string()) for name in ("premise", "hypothesis")}
    table = pa.table({"row": pa.array(pairs.row), **texts})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()

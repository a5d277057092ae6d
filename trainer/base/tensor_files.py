"""safetensors files of fp32, hashed while they are written, and read a run at a time.

The library's own writer and reader know whole tensors, and a hash would be a second reading of what may be gigabytes.
The format is eight bytes with the length of a JSON header, that header, and the numbers, little-endian:
https://huggingface.co/docs/safetensors. What is written here is to the byte what the library writes.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trainer.base.files import naming

BLOCK = 1 << 22  # bytes
LONGEST_HEADER = 100_000_000  # bytes, the library's own limit


def describe(file: BinaryIO) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a manifest has them."""
    digest, size = hashlib.sha256(), 0
    while block := file.read(BLOCK):
        digest.update(block)
        size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Writes fp32 arrays, flushes them to the disk, and returns what `describe` would. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with naming(path), path.open("wb") as file:
        for block in _blocks(tensors):
            digest.update(block)
            file.write(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _blocks(tensors: Mapping[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    header: dict[str, Any] = {}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": "F32", "shape": [*tensors[name].shape], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in sorted(tensors):
        if tensors[name].dtype != np.dtype("<f4"):
            raise TypeError(f"{name} is {tensors[name].dtype}, not float32")
        own = np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data
        yield from (own[at : at + BLOCK] for at in range(0, len(own), BLOCK))


@dataclass(frozen=True)
class Header:
    """Of a file: each tensor's shape, and the byte at which it begins."""

    shapes: dict[str, tuple[int, ...]]
    starts: dict[str, int]

    def read(self, file: BinaryIO, name: str, start: int, out: np.ndarray) -> None:
        """Fills `out`, 1-D and fp32, with a tensor's numbers from the `start`-th on. Raises ValueError if it has too
        few."""
        if start < 0 or start + len(out) > math.prod(self.shapes[name]):
            raise ValueError(f"{name} has not the numbers {start} to {start + len(out)}")
        file.seek(self.starts[name] + 4 * start)
        left = out.view(np.uint8).data
        while left:
            count = file.readinto(left)  # type: ignore[attr-defined]
            if not count:
                raise ValueError(f"the file ends inside {name}")
            left = left[count:]


def read_header(file: BinaryIO) -> Header:
    """Raises ValueError, KeyError or TypeError where it is none of a file of fp32."""
    length = int.from_bytes(file.read(8), "little")
    if length > LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    found = json.loads(file.read(length))
    found.pop("__metadata__", None)
    shapes, starts = {}, {}
    for name, own in found.items():
        shape, (start, stop) = tuple(own["shape"]), own["data_offsets"]
        if own["dtype"] != "F32" or not 0 <= start <= stop or stop - start != 4 * math.prod(shape):
            raise ValueError(f"{name} is not fp32, or of another size than its shape")
        shapes[name], starts[name] = shape, 8 + length + start
    return Header(shapes, starts)

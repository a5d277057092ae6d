"""What can be read only once, such as /dev/stdin or `<(zcat pairs.gz)`, as a file."""

import gzip
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.base.environment import read_place
from trainer.base.errors import UserError

# Also where a shell has put a file behind them, whose name nobody knows.
STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
BEGINNING = 1 << 16  # bytes that tell what kind of file it is


def is_stream(path: Path) -> bool:
    """Whether it has no ending that tells what it holds."""
    try:
        return str(path).startswith(STREAMS) or stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        return False


@contextmanager
def as_file(path: Path) -> Iterator[Path]:
    """`path`, or if that is a stream a temporary file of all that comes, with the ending of its kind.

    Raises UserError where it is nothing that is known, and where several ranks would each get a part of it.
    """
    if not is_stream(path):
        yield path
        return
    if read_place(os.environ).size > 1:
        raise UserError(f"{path} reaches only one rank; give several ranks a file")
    with tempfile.TemporaryDirectory(prefix="crossrank-") as folder:
        spooled = Path(folder) / path.name
        try:
            with path.open("rb") as source, spooled.open("wb") as file:
                shutil.copyfileobj(source, file)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        whole = spooled.with_name(spooled.name + ending_of(spooled, str(path)))
        spooled.rename(whole)
        try:
            yield whole
        except UserError as error:  # which names the file that nobody has given
            raise UserError(str(error).replace(str(whole), str(path))) from None


def ending_of(path: Path, place: str) -> str:
    """The ending that a file should have, by how it begins."""
    with path.open("rb") as file:
        beginning = file.read(BEGINNING)
    packed = beginning.startswith(b"\x1f\x8b")
    if packed:
        with gzip.open(path) as file:
            try:
                beginning = file.read(BEGINNING)
            except (OSError, EOFError):
                raise UserError(f"{place}: damaged gzip") from None
    line = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0]
    kinds = {".parquet": beginning.startswith(b"PAR1"), ".jsonl": line.startswith(b"{"), ".tsv": b"\t" in line,
             ".csv": b"," in line}  # fmt: skip
    if not beginning.strip():
        raise UserError(f"{place}: no rows")
    kind = next((ending for ending, found in kinds.items() if found), None)
    if kind is None:
        raise UserError(f"{place}: neither parquet nor jsonl, nor a header with tabs or commas in its first line")
    return kind + ".gz" * packed

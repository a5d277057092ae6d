"""Cards that people may change: what crossrank has not written as it stands is never overwritten."""

import hashlib
import itertools
from pathlib import Path

from trainer.base.files import write_text
from trainer.base.log import log

MARK = "\n<!-- Written by crossrank, which replaces this file as long as nobody changes it: "


def write_card(folder: Path, text: str) -> Path:
    """Writes README.md. One that somebody has changed since, or that is not ours, is kept, and README-2.md written."""
    names = itertools.chain(["README.md"], (f"README-{number}.md" for number in itertools.count(2)))
    path = next(folder / name for name in names if not (folder / name).exists() or is_ours(folder / name))
    if path.name != "README.md":
        log.info(f"{folder / 'README.md'} is not as crossrank has written it, and is kept; the new card is {path}")
    write_text(path, f"{text}{MARK}{_digest(text)} -->\n", durable=False)
    return path


def is_ours(path: Path) -> bool:
    """Whether a card is as write_card has left it, by the digest in its last line."""
    if not path.is_file():
        return False
    text, _, digest = path.read_bytes().decode(errors="replace").rpartition(MARK)
    return digest == f"{_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

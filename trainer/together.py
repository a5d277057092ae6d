"""What all ranks try: it succeeds on each of them, or fails on each with the same error."""

import errno
from collections.abc import Callable
from typing import TypeVar

from trainer.ranks import World

T = TypeVar("T")


def together(world: World, attempt: Callable[[], T], *kinds: type[Exception]) -> T:
    """What the attempt gives on this rank, if it succeeds on all. Every rank takes part.

    Else every rank raises the first one's OSError, or its error of one of the `kinds`, which are made of a text alone.
    """
    value, said = None, None
    try:
        value = attempt()
    except kinds as error:
        kind = next(number for number, own in enumerate(kinds) if isinstance(error, own))
        said = {"kind": kind, "text": str(error)}
    except OSError as error:
        text, file = error.strerror or str(error), error.filename and str(error.filename)
        said = {"errno": error.errno or errno.EIO, "text": text, "file": file}
    if first := world.broadcast(next(filter(None, world.gather_values(said) or []), None)):
        if "kind" in first:
            raise kinds[first["kind"]](first["text"])
        raise OSError(first["errno"], first["text"], first["file"])
    return value  # type: ignore[return-value]

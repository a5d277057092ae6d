"""What a run says to the person who watches: one logger, heard from rank 0 only."""

import logging
import sys
from contextlib import suppress

from tqdm import tqdm

log = logging.getLogger("crossrank")


class _Terminal(logging.Handler):
    """Lines on stderr, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        with suppress(OSError):  # the terminal may have been closed, and the run has something to save
            tqdm.write(f"{prefix}{record.getMessage()}", file=sys.stderr)
            sys.stderr.flush()


def start_log(is_main: bool) -> None:
    """Sends the lines of rank 0 to the terminal, and those of other ranks nowhere."""
    for own in [handler for handler in log.handlers if isinstance(handler, _Terminal)]:
        log.removeHandler(own)
    log.addHandler(_Terminal() if is_main else logging.NullHandler())
    log.propagate = False
    log.setLevel(logging.INFO)

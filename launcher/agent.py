"""torchrun, ending as one process would: the ranks' own exit code, and one line where they could not say why.

    python -m launcher.agent [torchrun's arguments]

torchrun itself ends with 1 whatever its ranks ended with, and adds its own traceback to their error.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path


def main(argv: list[str]) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    code = 1
    with tempfile.TemporaryDirectory() as folder:
        codes = Path(os.environ.setdefault("CROSSRANK_EXIT_FILE", f"{folder}/exit"))
        try:
            run.main(argv)
            return 0
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            ended = f"rank {rank} ended with exit code {failure.exitcode}"
            code = max(1, failure.exitcode)
            if failure.exitcode < 0:
                ended = f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}"
        except SignalException as error:
            ended = f"interrupted by {signal.Signals(error.sigval).name}"
        if codes.exists():  # the ranks have said what there is to say
            return int(codes.read_text())
    print(f"crossrank: {ended}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""torchrun, ending as one process would: the ranks' own exit code, and one line where they could not say why.

    python -m crossrank agent [torchrun's arguments]

torchrun itself ends with 1 whatever its ranks ended with, and adds its own traceback to their error.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from trainer.base.environment import heard
from trainer.base.errors import EXIT_CODE


def stop(number: int, frame: object) -> NoReturn:
    """Before there are ranks there is nothing to save. When they start, torchrun takes the signals itself."""
    print(f"crossrank: stopped by {signal.Signals(number).name} before the ranks began", file=sys.stderr)
    os._exit(130 if number == signal.SIGINT else EXIT_CODE)  # an exception would surface in the middle of torch


def main(argv: list[str]) -> int:
    for name in filter(heard, ("SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT", "SIGHUP")):
        signal.signal(getattr(signal, name), stop)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    code, killed = 1, False
    with tempfile.TemporaryDirectory() as folder:
        codes = Path(os.environ.setdefault("CROSSRANK_EXIT_FILE", f"{folder}/exit"))
        try:
            run.main(argv)
            return 0
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            ended = f"rank {rank} ended with exit code {failure.exitcode}"
            code, killed = max(1, failure.exitcode), failure.exitcode < 0
            if killed:
                ended = f"rank {rank} on {socket.gethostname()} was killed by {signal.Signals(-failure.exitcode).name}"
        except SignalException as error:
            ended = f"interrupted by {signal.Signals(error.sigval).name}"
        except RendezvousError as error:
            ended = f"the nodes lost contact: {error}"
        said = codes.exists()  # the ranks have said what there is to say, but for one that was killed
        if killed or not said:
            print(f"crossrank: {ended}", file=sys.stderr)
        return int(codes.read_text()) if said else code

"""Trackers beside metrics.jsonl: TensorBoard and Weights & Biases, each an optional package.

A tracker is log(metrics, step) and close(). One that fails says so once and is dropped: a picture is not worth a run.
MLflow is not among them: it brings a web server, a database layer and Docker's client for what these files already say.
"""

import dataclasses
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.base.errors import first_line
from trainer.base.log import log
from trainer.config import Config

PATIENCE = 30  # seconds for Weights & Biases to answer: less than a batch system leaves after its warning


class Tracker:
    """Does nothing; `step` counts optimizer steps, `metrics` are numbers by name."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard(Tracker):
    """Event files in the run folder's tensorboard/; a resumed run's later steps replace what it had written."""

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB(Tracker):
    """Weights & Biases. Without a login it writes offline into the run folder's wandb/, for `wandb sync`.

    A resumed run keeps its id, which lies in that folder. W&B's own variables (WANDB_MODE, WANDB_PROJECT ...)
    hold.
    """

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        import wandb

        if "WANDB_MODE" not in os.environ and not logged_in():
            os.environ["WANDB_MODE"] = "offline"  # asking for a key would wait for somebody to type it
        place = folder / "wandb"
        place.mkdir(parents=True, exist_ok=True)
        name = place / "run-id.txt"
        if not name.exists():
            name.write_text(secrets.token_hex(4), encoding="utf-8")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "crossrank"),
            name=config.run_name or folder.name,
            id=name.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=dataclasses.asdict(config),
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                init_timeout=PATIENCE,
                finish_timeout=PATIENCE,
            ),
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        # Their own step may only rise, and a resumed run repeats some: so it is a number like any other.
        self.run.log({**metrics, "step": step})

    def close(self) -> None:
        self.run.finish()


def logged_in() -> bool:
    """Whether wandb would find a key without asking."""
    import requests

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY") or requests.utils.get_netrc_auth(host))


class Guarded(Tracker):
    """A tracker whose first error is its last: it is logged, and the run continues without."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self.name, self.tracker = name, Tracker()
        self._try(lambda: setattr(self, "tracker", start()))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._try(lambda: self.tracker.log(metrics, step))

    def close(self) -> None:
        self._try(lambda: self.tracker.close())

    def _try(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except ImportError as error:
            self._drop(f"{error}; pip install 'crossrank[{self.name}]'")
        except Exception as error:  # whatever a service or its client comes up with
            self._drop(first_line(error))

    def _drop(self, reason: str) -> None:
        self.tracker = Tracker()
        log.warning(f"the tracker {self.name} is off: {reason}; metrics.jsonl has everything")


KINDS: dict[str, Callable[[Config, Path, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


def start_trackers(config: Config, folder: Path, step: int) -> list[Tracker]:
    """Those that config.report_to names, for the run in `folder` that continues after `step`."""
    return [Guarded(name, lambda kind=KINDS[name]: kind(config, folder, step)) for name in config.report_to]  # type: ignore[misc]

"""All that a run writes to while it trains. On ranks other than 0 most of it does nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from trainer.base.errors import reason
from trainer.base.log import log
from trainer.run.checkpoint import Checkpoints
from trainer.run.energy import Meter, write_csv
from trainer.run.journal import Journal


@dataclass(frozen=True)
class Output:
    """`lock` is held on rank 0 while the run lasts."""

    folder: Path
    journal: Journal
    checkpoints: Checkpoints
    meter: Meter
    lock: FileLock | None

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def energy(self, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of the stretches `before` and of this one up to now, on rank 0; also in emissions.csv.

        Every rank takes part.
        """
        rows = before + self.meter.rows()
        if self.meter.world.is_main and rows:
            try:
                write_csv(self.folder / "emissions.csv", rows)
            except OSError as error:  # the rows are in the checkpoint
                log.warning(f"emissions.csv cannot be written: {reason(error)}")
        return rows

    def close(self, gone: bool = False) -> None:
        """Waits for what is still being written, by this rank or, unless one is `gone`, by another.

        Raises TrainingFailed if it could not be.
        """
        self.meter.close()
        try:
            self.checkpoints.close(gone)  # a rank that fails exits at once, but not in the middle of a checkpoint
        finally:
            self.journal.close()

"""A sweep's list of its runs, which whoever launches them leaves for the report to miss those that have not begun."""

from pathlib import Path

from trainer.base.errors import UserError, first_line, named
from trainer.base.files import json_object, write_json

RECORD = "sweep.json"


def recorded(folder: Path) -> list[str]:
    """The runs of the sweep in `folder`, by their folders in it; none where there is no list. Raises UserError for a
    damaged one."""
    path = folder / RECORD
    try:
        if not path.is_file():
            return []
        runs = json_object(path.read_bytes()).get("runs")
        if not isinstance(runs, list) or not all(isinstance(name, str) and name for name in runs):
            raise ValueError("it holds no list of names as runs")
    except OSError as error:
        raise UserError(f"cannot read the sweep's list of runs: {named(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged: {first_line(error)}; remove it: launching the sweep again writes it"
        ) from None
    return runs


def record(folder: Path, runs: list[str]) -> None:
    """Leaves a list of `runs` in the sweep's folder, beside those of an earlier sweep. Raises UserError."""
    merged = list(dict.fromkeys([*recorded(folder), *runs]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECORD, {"runs": merged})
    except OSError as error:
        raise UserError(f"cannot write the sweep's list of runs {folder / RECORD}: {named(error)}") from None

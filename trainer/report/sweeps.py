"""A folder of runs, as `crossrank launch ... --grid` leaves it: which runs are in it, which are to come, what to call
them."""

import os
import re
from pathlib import Path

from trainer.base.errors import UserError
from trainer.base.record import recorded
from trainer.report.read import Run


def runs_in(folder: Path) -> tuple[list[Path], list[str]]:
    """The runs up to two levels below `folder`, and the names of those of its sweep that have not begun.

    A folder that is a run, or in which there is none, stands for itself. Raises UserError where none has begun yet.
    """
    if not folder.is_dir() or (folder / "config.yaml").exists() or (folder / "about.json").exists():
        return [folder], []
    found = {path.parent for level in ("*", "*/*") for path in folder.glob(f"{level}/about.json")}
    # A model or a checkpoint of a run lies in it.
    found = {run for run in found if run.parent not in found}
    absent = [name for name in map(os.path.normpath, recorded(folder)) if folder / name not in found]
    if absent and not found:
        raise UserError(f"of the sweep {folder} no run has begun yet; {len(absent)} are to come")
    return sorted(found, key=_in_order) or [folder], absent


def _in_order(path: Path) -> list[tuple[int, str]]:
    """seed-2 comes before seed-10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", str(path))]


def titles(runs: list[Run]) -> list[str]:
    """The runs' folders by names that tell them apart: as short as they can be, such as seed-0 or bf16-true/seed-0."""
    places = [run.folder.resolve() for run in runs]
    if len({place.name for place in places}) == len(places):
        return [place.name for place in places]
    above = os.path.commonpath([place.parent for place in places])
    return [os.path.relpath(place, above) for place in places]


def gaps(runs: list[Run], absent: list[str]) -> str | None:
    """What a comparison lacks, in words."""
    unfinished = [title for run, title in zip(runs, titles(runs), strict=True) if not run.results]
    parts = [
        f"{what}: {', '.join(names)}" for what, names in (("unfinished", unfinished), ("not begun", absent)) if names
    ]
    whole = len(runs) + len(absent)
    done = whole - len(unfinished) - len(absent)
    return f"{done} of {whole} runs are finished; {'; '.join(parts)}" if parts else None

"""What a person looks at: the model card, the pictures and report.html, from the run folder and nothing else.

`crossrank train` calls `write_report` at its end, `crossrank report RUN` at any time: the same folder gives the same
card. What is not in the folder is not on the card; what is there but unfinished or damaged is marked so.
"""

from pathlib import Path

from trainer.base.errors import UserError, named
from trainer.base.files import write_text
from trainer.base.log import log
from trainer.report.bits import compared
from trainer.report.card import card
from trainer.report.compare import beside, write_comparison
from trainer.report.kept import write_card
from trainer.report.page import page
from trainer.report.plots import draw
from trainer.report.read import read_run
from trainer.report.sweeps import gaps, runs_in


def write_report(folder: Path) -> Path:
    """Writes pictures, README.md and report.html, and returns the card's path. Raises UserError.

    Card and pictures go into the model folder; of a run that has none yet, into the run folder.
    """
    run = read_run(folder)
    place = folder / "model" if run.results and (folder / "model").is_dir() else folder
    try:
        plots = draw(run, place / "plots")
        path = write_card(place, card(run, plots))
        write_text(folder / "report.html", page(run))
    except OSError as error:
        raise UserError(f"cannot write the report into {place}: {named(error)}") from None
    return path


def report(folders: list[str], output_dir: str | None) -> None:
    """`crossrank report`: one run's card, or several runs compared in `output_dir` or report/. Raises UserError.

    A folder that holds runs stands for all of them.
    """
    found = [runs_in(Path(folder)) for folder in folders]
    given, folders = [str(Path(folder)) for folder in folders], [str(run) for runs, _ in found for run in runs]
    places = [Path(folder).resolve() for folder in folders]
    if twice := [folder for number, folder in enumerate(folders) if places[number] in places[:number]]:
        raise UserError(f"{twice[0]} is given twice; name each run once")
    if len(folders) == 1 and folders == given:
        if output_dir is not None:
            raise UserError("--output_dir is for the comparison of several runs; the report of one lies in its folder")
        path = write_report(Path(folders[0]))
        run = read_run(Path(folders[0]))
        if run.damaged:
            log.warning(f"{run.damaged} damaged lines of metrics.jsonl are left out")
        log.info(f"card: {path}\nreport: {Path(folders[0]) / 'report.html'}")
        return
    target = Path(output_dir or "report")
    if own := next((name for name in ("config.yaml", "config.json") if (target / name).exists()), None):
        raise UserError(f"{target} holds {own}: a run or a model, whose report stays; choose another --output_dir")
    runs = [read_run(Path(folder)) for folder in folders]
    if lacking := gaps(runs, [name for _, absent in found for name in absent]):
        log.warning(lacking)
    path = write_comparison(runs, target, lacking)
    for run, other in beside(runs):
        log.info(f"{run.folder} beside {other.folder}: {compared(run, other)}")
    log.info(f"report: {path}")

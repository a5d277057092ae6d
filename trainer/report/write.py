"""What a person looks at: the model card, the pictures and report.html, from the run folder and nothing else.

`crossrank train` calls `write_report` at its end, `crossrank report RUN` at any time: the same folder gives the same
card. What is not in the folder is not on the card; what is there but unfinished or damaged is marked so.
"""

from pathlib import Path

from huggingface_hub import ModelCard

from trainer.base.errors import UserError, named
from trainer.base.files import write_text
from trainer.base.log import log
from trainer.report import markdown
from trainer.report.card import card, title
from trainer.report.compare import write_comparison
from trainer.report.kept import write_card
from trainer.report.plots import draw
from trainer.report.read import read_run


def write_report(folder: Path) -> Path:
    """Writes pictures, README.md and report.html, and returns the card's path. Raises UserError.

    Card and pictures go into the model folder; of a run that has none yet, into the run folder.
    """
    run = read_run(folder)
    place = folder / "model" if run.results and (folder / "model").is_dir() else folder
    try:
        plots = draw(run, place / "plots")
        text = card(run, plots)
        path = write_card(place, text)
        body = ModelCard(text, ignore_metadata_errors=True).text
        write_text(folder / "report.html", markdown.to_html(title(run), body, place))
    except OSError as error:
        raise UserError(f"cannot write the report into {place}: {named(error)}") from None
    return path


def report(folders: list[str], output_dir: str) -> None:
    """`crossrank report`: one run's card, or several runs compared in `output_dir`. Raises UserError."""
    if len(folders) == 1:
        path = write_report(Path(folders[0]))
        run = read_run(Path(folders[0]))
        if run.damaged:
            log.warning(f"{run.damaged} damaged lines of metrics.jsonl are left out")
        log.info(f"card: {path}\nreport: {Path(folders[0]) / 'report.html'}")
        return
    log.info(f"report: {write_comparison([read_run(Path(folder)) for folder in folders], Path(output_dir))}")

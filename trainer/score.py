"""The scores of a trained model on labelled pairs: `crossrank evaluate`, for any number of sets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import ranks
from trainer.base.errors import UserError, named
from trainer.base.fields import Fields, option
from trainer.base.files import write_json
from trainer.base.log import log
from trainer.config import DataConfig
from trainer.data.load import data_team, load_scored
from trainer.data.tokenize import tokenize
from trainer.data.tokens import Split, targets_of
from trainer.evaluate import evaluate, predicted, write_predictions
from trainer.metrics import fixed, num_pairs, score_names
from trainer.model.loading import check_folder
from trainer.predict import InferenceConfig, Predictor
from trainer.run.versions import versions


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Fields):
    """Output"""

    output_dir: str | None = option(None, path=True)
    """Folder for results.json and predictions/; None = only print the scores."""


def evaluate_model(folder: str, data: DataConfig, inference: InferenceConfig, output: EvaluateConfig) -> dict[str, Any]:
    """Scores of a trained model on the dev and test splits that the data has, by split name."""
    check_folder(folder)
    place = None if output.output_dir is None else new_folder(Path(output.output_dir))
    world = ranks.start(inference.ddp_timeout)
    predictor = Predictor(folder, inference, world)
    objective = predictor.objective
    team, splits = data_team(world, data), {}
    for role, pairs in load_scored(data, predictor.model.classes, True, objective, team).items():
        tokens = tokenize(pairs, predictor.encoder, team, role, data.verify_data, world.is_main)
        predictor.model.check(pairs, tokens)
        splits[role] = Split(pairs.split, pairs, tokens)
    world.agree(lambda: {role: split.tokens.fingerprint for role, split in splits.items()})
    if not splits:
        raise UserError("nothing to evaluate on: give --validation_file, --test_file or a --dataset_name")
    metrics: dict[str, Any] = {}
    for split in splits.values():
        pairs = split.pairs
        result = evaluate(predictor.model, split, world, inference.per_device_eval_batch_size, inference.bf16)
        log.info(f"{pairs.describe()}; {targets_of(pairs)}")
        metrics[split.name] = result.scores
        if place is not None and result.logits is not None:
            scores = predicted(pairs, result.logits, objective)
            write_predictions(place / "predictions" / f"{split.name}.parquet", pairs, scores)
    if place is not None and world.is_main:
        write_json(place / "results.json", {"metrics": metrics, "versions": versions()})
    return metrics


MOST_CLASSES = 10  # of a set, in a table of classes


def tables(metrics: dict[str, Any]) -> str:
    """Scores by set as text: a line a set and, of sets with few classes, a line a class."""
    names = dict.fromkeys(name for own in metrics.values() for name in score_names(own) if name in own)
    columns = [*names, "loss"]
    rows = [
        [split, f"{num_pairs(scores):,}", *(fixed(scores.get(name)) for name in columns)]
        for split, scores in metrics.items()
    ]
    of_class = [
        [split if number == 0 else "", name, *(fixed(own[score]) for score in EACH), f"{own['support']:,}"]
        for split, scores in metrics.items()
        if len(scores.get("by_class", {})) <= MOST_CLASSES
        for number, (name, own) in enumerate(scores.get("by_class", {}).items())
    ]
    parts = [aligned([["set", "pairs", *columns], *rows], words=1)]
    if of_class:
        parts.append(aligned([["set", "class", *EACH, "support"], *of_class], words=2))
    return "\n\n".join(parts)


EACH = ("precision", "recall", "f1")


def aligned(rows: list[list[str]], words: int) -> str:
    """Columns of equal width: the first `words` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < words else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def new_folder(place: Path) -> Path:
    """Where scores and predictions go. Raises UserError where some are already, or nothing can be written."""
    for made in ("results.json", "predictions"):
        if (place / made).exists():
            raise UserError(f"{place} holds {made}, which is never overwritten; choose another --output_dir")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {place}: {named(error)}") from None
    return place

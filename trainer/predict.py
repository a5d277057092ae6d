"""A trained model at work: the scores of labelled pairs, the classes of new ones."""

from __future__ import annotations

import csv
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer import dist, run
from trainer.config import METRICS, DataConfig, Fields, ModelConfig, UserError
from trainer.data import Pairs, load_pairs, read_table, split_name, unlabelled
from trainer.dist import World
from trainer.evaluate import evaluate, predict_logits, write_predictions
from trainer.metrics import log_softmax
from trainer.model import CrossEncoder, load_trained, longest_input
from trainer.precision import check_bf16
from trainer.tokens import Tokens, cache_folder, tokenize


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(Fields):
    """Inference"""

    per_device_eval_batch_size: int = 64
    """Pairs in one forward."""
    bf16: bool = False
    """Forward in bfloat16 autocast."""
    max_length: int | None = None
    """Longest pair in tokens; None = as in training."""
    trust_remote_code: bool = False
    """Run Python code that the model folder brings."""
    ddp_timeout: int = 1800
    """Seconds until a collective that not every rank reached is an error."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Fields):
    """Output"""

    output_dir: str | None = None
    """Folder for results.json and predictions/; None = print the scores alone."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Fields):
    """Pairs in, scores out"""

    input: str = "-"
    """File of pairs: jsonl, csv, tsv or parquet, each also .gz; - = stdin, as jsonl or as two tab-separated columns
    without a header."""
    output: str = "-"
    """File of predictions, .jsonl, .csv or .tsv by its name; - = jsonl on stdout."""
    premise_column: str | None = None
    """None = `premise`, else `sentence1`."""
    hypothesis_column: str | None = None
    """None = `hypothesis`, else `sentence2`."""


class Predictor:
    """A trained model on this rank's device."""

    def __init__(self, folder: str, config: InferenceConfig, world: World) -> None:
        self.config, self.world = config, world
        self.say = run.say if world.is_main else lambda text: None
        if config.bf16 and (warning := check_bf16(world.device)):
            self.say(f"warning: {warning}")
        origin = ModelConfig(model_name_or_path=folder, trust_remote_code=config.trust_remote_code)
        model, self.tokenizer, self.label_names = load_trained(origin)
        self.max_length = longest_input(model, self.tokenizer, config.max_length)
        self.model = CrossEncoder(model).to(world.device)

    def tokens(self, pairs: Pairs, cache: Path | None) -> Tokens:
        return tokenize(pairs, self.tokenizer, self.max_length, cache, self.say, progress=self.world.is_main)

    def logits(self, pairs: Pairs) -> np.ndarray | None:
        """(n, classes) on rank 0, None elsewhere."""
        tokens = self.tokens(pairs, cache=None)  # new pairs are seen once, so their tokens are not worth keeping
        return predict_logits(self.model, tokens, self.world, self.config.per_device_eval_batch_size, self.config.bf16)


def evaluate_model(folder: str, data: DataConfig, inference: InferenceConfig, output: EvaluateConfig) -> dict[str, Any]:
    """Scores of a trained model on the dev and test splits that the data has, by split name."""
    for made in ("results.json", "predictions"):
        if output.output_dir is not None and (Path(output.output_dir) / made).exists():
            raise UserError(
                f"{output.output_dir} holds {made}, which is never overwritten; choose another --output_dir"
            )
    if output.output_dir is not None:
        try:
            Path(output.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {output.output_dir}: {error.strerror}") from None
    world = dist.start(inference.ddp_timeout)
    predictor = Predictor(folder, inference, world)
    if data.label_names and sorted(data.label_names) != sorted(predictor.label_names):
        raise UserError(f"label_names {data.label_names} are not the model's classes {predictor.label_names}")
    metrics = {}
    for role in ("dev", "test"):
        pairs = load_pairs(data, role, predictor.label_names)
        if pairs is None:
            continue
        tokens = predictor.tokens(pairs, cache_folder())
        result = evaluate(predictor.model, pairs, tokens, world, inference.per_device_eval_batch_size, inference.bf16)
        predictor.say(f"{pairs.name}: {len(pairs):,} pairs; classes {', '.join(pairs.label_names)}")
        name = split_name(data, role)
        metrics[name] = result.scores
        predictor.say(f"{name}: " + ", ".join(f"{m} {result.scores[m]:.4f}" for m in METRICS))
        if output.output_dir is not None and result.logits is not None:
            write_predictions(Path(output.output_dir) / "predictions" / f"{name}.parquet", pairs, result.logits)
    if not metrics:
        raise UserError("nothing to evaluate on: give --validation_file, --test_file or a --dataset_name")
    if output.output_dir is not None and world.is_main:
        run.write_json(Path(output.output_dir) / "results.json", {"metrics": metrics, "versions": run.versions()})
    return metrics


def predict_file(folder: str, config: PredictConfig, inference: InferenceConfig) -> None:
    """Reads pairs, writes the class and the classes' probabilities of each, in order."""
    if config.output != "-" and Path(config.output).suffix not in (".jsonl", ".csv", ".tsv"):
        raise UserError(f"{config.output}: unknown kind of file; use .jsonl, .csv or .tsv")
    if config.output != "-" and Path(config.output).exists():
        raise UserError(f"{config.output} exists and is never overwritten; choose another --output")
    if config.output != "-" and not Path(config.output).absolute().parent.is_dir():
        raise UserError(f"{config.output}: no such folder")
    world = dist.start(inference.ddp_timeout)
    if world.size > 1 and config.input == "-":
        raise UserError("stdin reaches one rank alone; give several ranks a file as --input")
    table = read_stdin() if config.input == "-" else read_table(Path(config.input))
    place = "stdin" if config.input == "-" else config.input
    pairs = unlabelled(table, place, config.premise_column, config.hypothesis_column)
    predictor = Predictor(folder, inference, world)
    logits = predictor.logits(pairs)
    if logits is not None:
        write(config.output, predictor.label_names, np.exp(log_softmax(logits)))


def read_stdin() -> pa.Table:
    """jsonl, or premise and hypothesis separated by a tab."""
    try:
        text = sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise UserError("stdin is not UTF-8 text") from None
    if text.lstrip().startswith("{"):
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            try:
                return read_table(Path(file.name))
            except UserError as error:
                raise UserError(str(error).replace(file.name, "stdin")) from None
    rows = [line.split("\t") for line in text.split("\n") if line.strip()]
    for number, row in enumerate(rows):
        if len(row) != 2:
            raise UserError(f"stdin, row {number}: expected premise<TAB>hypothesis or jsonl, found {len(row)} columns")
    return pa.table({"premise": [row[0] for row in rows], "hypothesis": [row[1] for row in rows]})


def write(output: str, label_names: list[str], probabilities: np.ndarray) -> None:
    """One row a pair: label and the probability of every class."""
    separator = {".csv": ",", ".tsv": "\t"}.get(Path(output).suffix)
    rows = _as_csv(label_names, probabilities, separator) if separator else _as_jsonl(label_names, probabilities)
    try:
        if output == "-":
            sys.stdout.writelines(rows)
            sys.stdout.flush()
            return
        with Path(output).open("w", encoding="utf-8", newline="") as file:
            file.writelines(rows)
    except BrokenPipeError:  # the reader has had enough
        raise
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from None


def _as_jsonl(label_names: list[str], probabilities: np.ndarray) -> Iterator[str]:
    for row in probabilities:
        scores = {name: round(float(p), 6) for name, p in zip(label_names, row, strict=True)}
        yield json.dumps({"label": label_names[int(row.argmax())], "scores": scores}, ensure_ascii=False) + "\n"


def _as_csv(label_names: list[str], probabilities: np.ndarray, separator: str) -> Iterator[str]:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=separator, lineterminator="\n")
    writer.writerow(["label", *(f"score_{name}" for name in label_names)])
    for row in probabilities:
        writer.writerow([label_names[int(row.argmax())], *(f"{p:.6f}" for p in row)])
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()

"""A trained model at work: the scores of labelled pairs, the classes of new ones."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from trainer import ranks
from trainer.config import METRICS, DataConfig, Fields, ModelConfig, UserError
from trainer.data.sources import Pairs, load_pairs, split_name, unlabelled
from trainer.data.stream import WRITERS, open_output, stream, stream_stdin
from trainer.data.tokens import Tokens, cache_folder, tokenize
from trainer.evaluate import evaluate, predict_logits, write_predictions
from trainer.files import write_json
from trainer.metrics import log_softmax
from trainer.model.cross_encoder import CrossEncoder, load_trained, longest_input
from trainer.model.precision import check_bf16
from trainer.ranks import World
from trainer.run import folder as run


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
    """File of predictions, .jsonl, .csv, .tsv or .parquet by its name; - = jsonl on stdout."""
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
    world = ranks.start(inference.ddp_timeout)
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
        write_json(Path(output.output_dir) / "results.json", {"metrics": metrics, "versions": run.versions()})
    return metrics


def predict_pairs(folder: str, pairs: list[tuple[str, str]], config: InferenceConfig) -> np.ndarray:
    """Probabilities (n, classes) of pairs, in order, on every rank. Raises UserError naming a pair without text."""
    world = ranks.start(config.ddp_timeout)
    predictor = Predictor(folder, config, world)
    if not pairs:
        return np.empty((0, len(predictor.label_names)))
    table = pa.table({"premise": [premise for premise, _ in pairs], "hypothesis": [text for _, text in pairs]})
    logits = predictor.logits(unlabelled(table, "pairs", None, None))
    return np.array(world.broadcast(None if logits is None else np.exp(log_softmax(logits)).tolist()))


def predict_file(folder: str, config: PredictConfig, inference: InferenceConfig) -> None:
    """Reads pairs, writes the class and the classes' probabilities of each, in order, a part of the file at a time."""
    check_output(config.output)
    world = ranks.start(inference.ddp_timeout)
    if world.size > 1 and config.input == "-":
        raise UserError("stdin reaches one rank alone; give several ranks a file as --input")
    place = "stdin" if config.input == "-" else config.input
    tables = stream_stdin() if config.input == "-" else stream(Path(config.input))
    first = next(tables, None)
    if first is None:
        raise UserError(f"{place}: no pairs")
    parts = itertools.chain([first], tables)
    predictor, done = Predictor(folder, inference, world), 0
    bar = tqdm(unit="pair", desc="predicting", disable=None if world.is_main else True)
    with bar, open_output(config.output if world.is_main else None, predictor.label_names) as write:
        for table in parts:
            pairs = unlabelled(table, place, config.premise_column, config.hypothesis_column, start=done)
            logits = predictor.logits(pairs)
            if logits is not None:
                write(np.exp(log_softmax(logits)))
            done += len(pairs)
            bar.update(len(pairs))


def check_output(output: str) -> None:
    """Before any work is done. Raises UserError."""
    if output == "-":
        return
    if Path(output).suffix not in WRITERS:
        raise UserError(f"{output}: unknown kind of file; use {', '.join(WRITERS)}")
    if Path(output).exists():
        raise UserError(f"{output} exists and is never overwritten; choose another --output")
    if not Path(output).absolute().parent.is_dir():
        raise UserError(f"{output}: no such folder")

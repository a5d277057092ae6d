"""A trained model at work: the classes of new pairs."""

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from trainer import ranks
from trainer.base.errors import UserError
from trainer.base.fields import Fields, option
from trainer.base.log import log
from trainer.config import ModelConfig
from trainer.data.sources import Pairs, unlabelled
from trainer.data.stream import WRITERS, id_column, ids_of, open_output, stream_stdin
from trainer.data.tables import column_of, nothing_in, read_parts
from trainer.data.tokens import Tokens, tokenize
from trainer.evaluate import predict_logits
from trainer.metrics import activated
from trainer.model.cross_encoder import model_facts
from trainer.model.loading import check_folder, load_trained
from trainer.model.precision import check_bf16, settle_products
from trainer.ranks import World
from trainer.run.versions import code_hash, versions


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(Fields):
    """Inference"""

    per_device_eval_batch_size: int = option(64, above=0)
    """Pairs in one forward."""
    bf16: bool = False
    """Forward in bfloat16 autocast."""
    max_length: int | None = option(None, above=0)
    """Longest pair in tokens; None = as in training."""
    trust_remote_code: bool = False
    """Run Python code that the model folder brings."""
    ddp_timeout: int = option(1800, above=0, below=10**7)
    """Seconds until a collective that not every rank reached is an error."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Fields):
    """Pairs in, scores out"""

    input: str = option("-", path=True)
    """File of pairs: jsonl, csv, tsv or parquet, each also .gz; - = stdin, as jsonl or as two tab-separated columns
    without a header. Every row is answered, in order; an empty line before the last row, or a row without text, is an
    error."""
    output: str = option("-", path=True)
    """File of predictions, .jsonl, .csv, .tsv or .parquet by its name; - = jsonl on stdout. Each row begins with the
    pair's `id` (or `idx`, `index`, `pairID`, `guid`) if the input has that column, and else with its number from 0 as
    `index`; then come its label and the score of every class."""
    premise_column: str | None = None
    """None = `premise`, else `sentence1`."""
    hypothesis_column: str | None = None
    """None = `hypothesis`, else `sentence2`."""


class Predictor:
    """A trained model on this rank's device."""

    def __init__(self, folder: str, config: InferenceConfig, world: World) -> None:
        self.config, self.world = config, world
        settle_products()
        if config.bf16 and (warning := check_bf16(world.device)):
            log.warning(warning)
        code = config.trust_remote_code
        origin = ModelConfig(model_name_or_path=folder, trust_remote_code=code, max_length=config.max_length)
        self.model = load_trained(origin).to(world.device)
        self.label_names, self.objective = self.model.label_names, self.model.objective
        options = dataclasses.asdict(config) | {"device": world.device.type}
        world.agree(lambda: options | versions() | {"code": code_hash()} | model_facts(self.model))

    def tokens(self, pairs: Pairs, cache: Path | None) -> Tokens:
        tokens = tokenize(pairs, self.model.tokenizer, self.model.max_length, cache, progress=self.world.is_main)
        self.model.check(pairs, tokens)
        return tokens

    def logits(self, pairs: Pairs) -> np.ndarray | None:
        """(n, classes) on rank 0, None elsewhere. Raises UserError where the ranks have other pairs."""
        tokens = self.tokens(pairs, cache=None)  # new pairs are seen once, so their tokens are not worth keeping
        self.agree(int(pairs.row[0]), tokens.fingerprint)
        size, bf16 = self.config.per_device_eval_batch_size, self.config.bf16
        return predict_logits(self.model, pairs, tokens, self.world, size, bf16)

    def shaped(self, scores: np.ndarray) -> np.ndarray:
        """Scores (n, outputs) as users get them: (n,) of one output, as CrossEncoder.predict gives them."""
        return scores if self.objective == "cross_entropy" else scores[:, 0]

    def agree(self, row: int, content: str) -> None:
        """Every rank says what it has from this row on."""
        self.world.agree(lambda: {f"the input from row {row}": content})


def predict_pairs(folder: str, given: Iterable[tuple[str, str]], config: InferenceConfig) -> np.ndarray:
    """Probabilities (n, classes) of pairs, or scores (n,) of a model with one output, in order, on every rank.

    Raises UserError naming a pair without text.
    """
    if not isinstance(given, Iterable):
        raise UserError(f"pairs must be a list of (premise, hypothesis), got {repr(given)[:80]}")
    pairs = list(given)
    for row, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:  # a dict of two would be its keys
            raise UserError(f"pairs, row {row}: expected (premise, hypothesis), found {repr(pair)[:80]}")
        for field, text in zip(("premise", "hypothesis"), pair, strict=True):
            if not isinstance(text, (str, NoneType)):
                raise UserError(f"pairs, row {row}: {field} must be text, found {repr(text)[:80]}")
    world = ranks.start(config.ddp_timeout)
    predictor = Predictor(folder, config, world)
    if not pairs:
        predictor.agree(0, "none")
        return predictor.shaped(np.empty((0, len(predictor.label_names))))
    table = pa.table({name: column_of([pair[i] for pair in pairs]) for i, name in enumerate(("premise", "hypothesis"))})
    logits = predictor.logits(unlabelled(table, "pairs", None, None))
    scores = None if logits is None else activated(logits, predictor.objective).tolist()
    return predictor.shaped(np.array(world.broadcast(scores)))


def predict_file(folder: str, config: PredictConfig, inference: InferenceConfig) -> None:
    """Reads pairs, writes the class and the classes' probabilities of each, in order, a part of the file at a time."""
    check_output(config.output)
    check_folder(folder)
    world = ranks.start(inference.ddp_timeout)
    if world.size > 1 and config.input == "-":
        raise UserError("stdin reaches only one rank; give several ranks a file as --input")
    place = "stdin" if config.input == "-" else config.input
    tables = stream_stdin() if config.input == "-" else read_parts(Path(config.input), every_line=True)
    first = next(tables, None)
    if first is None:
        raise nothing_in(Path(place))
    parts = itertools.chain([first], tables)
    predictor, done, id_name = Predictor(folder, inference, world), 0, id_column(first)
    bar = tqdm(unit="pair", desc="predicting", disable=None if world.is_main else True)
    output = config.output if world.is_main else None
    with bar, open_output(output, predictor.label_names, id_name or "index") as write:
        for table in parts:
            pairs = unlabelled(table, place, config.premise_column, config.hypothesis_column, start=done)
            logits = predictor.logits(pairs)
            if logits is not None:
                write(ids_of(table, id_name, done), activated(logits, predictor.objective))
            done += len(pairs)
            bar.update(len(pairs))
        predictor.agree(done, "none")


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

"""A trained model at work: the classes, or the score, of new pairs."""

import dataclasses
import hashlib
import itertools
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from trainer import ranks
from trainer.base.ahead import ahead
from trainer.base.errors import UserError
from trainer.base.fields import Fields, option
from trainer.base.log import log
from trainer.config import ModelConfig
from trainer.data.given import PLACE, is_pair, pairs_of, plain_pairs, unlabelled
from trainer.data.pairs import Rows, Texts
from trainer.data.tokens import Encoder, Tokens
from trainer.evaluate import predict_logits
from trainer.feed import Feed, Read
from trainer.metrics import activated
from trainer.model.cross_encoder import model_facts
from trainer.model.loading import check_folder, load_trained
from trainer.model.precision import check_bf16, settle_products
from trainer.ranks import World
from trainer.rows.answers import Answers
from trainer.rows.columns import Wanted, text_columns
from trainer.rows.faults import Faults, with_columns
from trainer.rows.pipes import as_file
from trainer.rows.stream import stream_stdin
from trainer.rows.tables import nothing_in, read_parts
from trainer.rows.writers import WRITERS, open_output
from trainer.run.versions import code_hash, versions
from trainer.together import together


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
    without a header."""
    output: str = option("-", path=True)
    """File of predictions, .jsonl, .csv, .tsv or .parquet by its name; - = jsonl on stdout. Row for row it is the
    input, every column of it, and behind these `prediction` (the class) and `score_<class>` of each; of a model with
    one output, `score`."""
    prefix: str | None = None
    """What the names of the new columns begin with, where the input has such columns itself."""
    premise_column: list[str] | None = None
    """None = `premise`, else `sentence1`, `sentence_A` or `context`."""
    hypothesis_column: list[str] | None = None
    """None = `hypothesis`, else `sentence2`, `sentence_B` or `query`."""
    on_error: Literal["fail", "mark"] = "fail"
    """What to do at a row that cannot be used, such as an empty line, or one without text: `fail`, or `mark` it: its
    new columns are empty, and one more, `error`, says why."""
    csv_formulas: Literal["defuse", "keep"] = "defuse"
    """Text in csv and tsv that a spreadsheet would take for a formula: `defuse` puts a ' before it."""


class Predictor:
    """A trained model on this rank's device."""

    def __init__(self, folder: str, config: InferenceConfig, world: World) -> None:
        self.config, self.world = config, world
        settle_products()
        if config.bf16 and (warning := check_bf16(world.device)):
            log.warning(warning)
        code = config.trust_remote_code
        origin = ModelConfig(model_name_or_path=folder, trust_remote_code=code, max_length=config.max_length)
        self.model = together(world, lambda: load_trained(origin), UserError).to(world.device)
        self.label_names, self.objective = self.model.label_names, self.model.objective
        options = dataclasses.asdict(config) | {"device": world.device.type}
        world.agree(lambda: options | versions() | {"code": code_hash()} | model_facts(self.model))
        self.encoder = Encoder(self.model.tokenizer, self.model.max_length)
        self.feed = Feed(self.encoder, world, config.ddp_timeout)

    def logits(self, pairs: Texts) -> np.ndarray | None:
        """(n, classes) on rank 0, None elsewhere. Raises UserError where the ranks have other pairs."""
        self.world.agree(lambda: {"the pairs": digest(pairs)})
        return self.scored(pairs, self.feed.tokens(pairs))

    def scored(self, rows: Rows, tokens: Tokens) -> np.ndarray | None:
        """The same of pairs whose tokens every rank has."""
        if len(rows) == 0:
            return np.empty((0, self.model.num_classes), np.float32) if self.world.is_main else None
        self.model.check(rows, tokens)
        size, bf16 = self.config.per_device_eval_batch_size, self.config.bf16
        return predict_logits(self.model, rows, tokens, self.world, size, bf16)


def digest(pairs: Texts) -> str:
    """SHA-256 of the texts."""
    found = hashlib.sha256()
    for texts in (pairs.premise, pairs.hypothesis):
        found.update("\x1e".join(texts).encode("utf-8", "surrogatepass") + b"\x1d")
    return found.hexdigest()


class Model:
    """A trained model, loaded once: see crossrank.load.

    Several threads may call it; it computes for one at a time. Of several ranks each makes the same calls.

    Attributes:
        folder: where it was loaded from.
        label_names: of the classes, in the order of the scores' columns.
    """

    def __init__(self, folder: str, config: InferenceConfig) -> None:
        check_folder(folder)
        self.folder = Path(folder)
        self.predictor = Predictor(folder, config, ranks.start(config.ddp_timeout))
        self.label_names = self.predictor.label_names
        self.lock = threading.Lock()

    def predict(self, pairs: Any, premise_column: Wanted = None, hypothesis_column: Wanted = None) -> np.ndarray:
        """Probabilities (n, classes) of n pairs, in order, on every rank; of a model with one output its scores (n,).

        Args:
            pairs: (premise, hypothesis) each, or dicts, a DataFrame, a datasets.Dataset or a pyarrow.Table with such
                columns. Of a single pair of texts the result lacks the first dimension.
            premise_column: None = `premise`, else `sentence1`, `sentence_A` or `context`.
            hypothesis_column: None = `hypothesis`, else `sentence2`, `sentence_B` or `query`.

        Raises UserError naming a pair without text.
        """
        alone = is_pair(pairs)
        own = plain_pairs([pairs] if alone else pairs)
        if own is None:
            table = pairs_of([pairs] if alone else pairs, premise_column, hypothesis_column)
            own = unlabelled(table, PLACE, *table.column_names)
        world, predictor = self.predictor.world, self.predictor
        with self.lock:
            logits = predictor.logits(own)
            scores = None if logits is None else activated(logits, predictor.objective)
            if world.size > 1:
                scores = np.array(world.broadcast(None if scores is None else scores.tolist()))
                scores = scores.reshape(-1, predictor.model.num_classes)
        assert scores is not None
        if predictor.model.num_classes == 1:
            scores = scores.reshape(-1)
        return scores[0] if alone else scores


class Input:
    """The rows that are to be predicted, a part at a time, and which of their columns hold the texts.

    The first part is read at once. Raises UserError where there is none, or it has no such columns.
    """

    def __init__(self, config: PredictConfig, files: ExitStack) -> None:
        self.place = _place(config)
        self.faults: Faults | None = {} if config.on_error == "mark" else None
        if config.input == "-":
            tables = stream_stdin(self.faults)
        else:
            tables = read_parts(files.enter_context(as_file(Path(config.input))), True, self.faults)
        first = next(tables, None)
        if first is None:
            raise nothing_in(Path(self.place))
        self.texts = text_columns(first.column_names, self.place, config.premise_column, config.hypothesis_column)
        self.tables = itertools.chain([first], tables)

    def parts(self, answers: Answers) -> Iterator[Read]:
        """Raises UserError where a row is no pair, or a column is called as one of the answers."""
        done = 0
        for table in self.tables:
            answers.check(table, self.place)
            if self.faults is not None:
                table = with_columns(table, self.texts)
            pairs = unlabelled(table, self.place, *self.texts, start=done, faults=self.faults)
            errors = [(self.faults or {}).pop(row, None) for row in range(done, done + table.num_rows)]
            yield Read(table, pairs, errors)
            done += table.num_rows


def predict_file(folder: str, config: PredictConfig, inference: InferenceConfig) -> None:
    """Reads pairs, writes them with what the model says of each, in order, a part of the input at a time.

    Rank 0 reads and writes. The next part is read and tokenised while the model computes.
    """
    check_output(config.output)
    check_folder(folder)
    world = ranks.start(inference.ddp_timeout)
    if world.size > 1 and config.input == "-":
        raise UserError("stdin reaches only one rank; give several ranks a file as --input")
    with ExitStack() as files:
        given = opened(config, files, world)
        predictor = Predictor(folder, inference, world)
        mark = config.on_error == "mark"
        answers = Answers(predictor.label_names, predictor.objective, mark, config.prefix or "")
        parts = predictor.feed.of(None if given is None else given.parts(answers), _place(config))
        bar = files.enter_context(tqdm(unit="pair", desc="predicting", disable=None if world.is_main else True))
        output = config.output if world.is_main else None
        done = marked = 0
        with open_output(output, config.csv_formulas == "defuse") as write, ahead(parts) as fed:
            for part in fed:
                logits, read = predictor.scored(part.rows, part.tokens), part.read
                if logits is None or read is None:
                    continue
                write(read.table, answers.table(logits, part.rows.row - done, read.errors))
                done, marked = done + len(read.errors), marked + sum(error is not None for error in read.errors)
                bar.update(len(read.errors))
    if marked:
        log.warning(f"{_place(config)}: {marked:,} of {done:,} rows have no prediction; the column "
                    f"{answers.names[-1]} says why")  # fmt: skip


def opened(config: PredictConfig, files: ExitStack, world: World) -> Input | None:
    """Rank 0's input; None elsewhere. Raises its UserError on every rank, before a model is loaded."""
    given, mistake = None, None
    if world.is_main:
        try:
            given = Input(config, files)
        except UserError as error:
            mistake = str(error)
    if mistake := world.broadcast(mistake):
        raise UserError(mistake)
    return given


def _place(config: PredictConfig) -> str:
    return "stdin" if config.input == "-" else config.input


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

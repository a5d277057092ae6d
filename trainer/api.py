"""crossrank from Python: load, predict, evaluate, train. The command line's verbs are functions of these names.

    import crossrank

    results = crossrank.train(recipe="demo", output_dir="runs/mine")
    model = crossrank.load("runs/mine/model")
    scores = model.predict([("A man sleeps.", "A person rests.")])
    metrics = crossrank.evaluate("runs/mine/model", test_file="test.parquet")

Fields are those of the command line, by the same names. Mistakes in the input raise crossrank.UserError. crossrank.py
looks at the folders of caches before it imports this, as libraries read their names when they are imported.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trainer import train as training
from trainer.base.errors import UserError, first_line
from trainer.base.fields import typed
from trainer.base.log import log
from trainer.cli import grouped, parse_train
from trainer.config import Config, DataConfig
from trainer.data.given import as_files
from trainer.predict import InferenceConfig, Model
from trainer.report import hub
from trainer.report.write import write_report
from trainer.score import EvaluateConfig, evaluate_model


def train(config: Config | None = None, *, recipe: str | None = None, **fields: Any) -> dict[str, Any]:
    """A run from end to end, as `crossrank train`; on several ranks, every rank calls it.

    Args:
        config: all fields, validated; or else
        recipe: named settings, which `fields` override; beside the fields of the command line, data in memory:
            train_dataset, eval_dataset and test_dataset, each a datasets.Dataset, a pandas DataFrame, a list of
            (premise, hypothesis, label) or of dicts, or a dict of several by their names (sources, or test sets); or
            dataset, a DatasetDict. They become files in the cache, which config.yaml names.

    Returns:
        What results.json holds.
    """
    if config is not None and (not isinstance(config, Config) or recipe is not None or fields):
        raise UserError("train takes fields by name, as in train(recipe='demo', seed=1), or a Config and nothing else; "
                        "dataclasses.replace(config, seed=1) changes one")  # fmt: skip
    if config is None:
        recipe = typed("recipe", recipe, str | None)
        config = parse_train([] if recipe is None else [f"--recipe={recipe}"], as_files(fields))
    if config.push_to_hub:  # a name that is not allowed is no reason to train first
        hub.repository(config, Path(config.output_dir or f"{config.run_name or 'run'}-0"))
    return training.train(config, partial(hand_over, config))


def hand_over(config: Config, folder: Path) -> None:
    """The card and pictures of a finished run, which nothing that goes wrong here makes unfinished; and the upload."""
    if not config.write_report:
        return
    try:
        write_report(folder)
    except Exception as error:  # in a library that draws or renders, or a full disk
        log.warning(f"no report was written ({first_line(error)}); crossrank report {folder} retries it")
        return  # a model is not uploaded without its card
    if config.push_to_hub:
        hub.push(config, folder)


def load(folder: str | Path, **options: Any) -> Model:
    """A trained model, loaded once, to be called as often as one likes; see predict.Model.

        model = crossrank.load("runs/mine/model")
        scores = model.predict([("A man sleeps.", "A person rests.")])  # (pairs, classes), as model.label_names

    Of a model with one output, scores (n,): a probability where it was trained by binary cross-entropy.

    Args:
        folder: of a trained model.
        options: fields of `crossrank predict --help`'s group Inference, such as bf16.
    """
    return Model(str(folder), *grouped(options, InferenceConfig))


def predict(model: str | Path, pairs: Any, **options: Any) -> np.ndarray:
    """load(model, **options).predict(pairs): to score once, since it loads the model in each call."""
    return load(model, **options).predict(pairs)


def evaluate(model: str | Path, **fields: Any) -> dict[str, Any]:
    """Scores of a trained model on the splits of labelled pairs that `fields` name, by split; see metrics.py.

    Pairs in memory are eval_dataset, test_dataset or dataset, as in `train`.
    """
    groups = grouped(as_files(fields), DataConfig, InferenceConfig, EvaluateConfig)
    return evaluate_model(str(model), *groups)

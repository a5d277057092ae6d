"""What a model's outputs mean, as its folder says it: classes, or one score and the function that makes it of a logit.

sentence_transformers.CrossEncoder goes by `activation_fn`, transformers' pipelines by `problem_type`; both are written.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.base.errors import UserError
from trainer.base.files import json_object
from trainer.options import Objective

SCORE = ("LABEL_0",)  # what transformers and CrossEncoder call an only output
SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"
ACTIVATIONS: dict[Objective, str] = {"cross_entropy": IDENTITY, "binary_cross_entropy": SIGMOID, "mse": IDENTITY}
# One of several labels that may hold at once is what transformers trains by binary cross-entropy.
PROBLEM_TYPES: dict[Objective, str] = {
    "cross_entropy": "single_label_classification",
    "binary_cross_entropy": "multi_label_classification",
    "mse": "regression",
}


def settle_outputs(settings: Any, objective: Objective, classes: Sequence[str]) -> list[str]:
    """Makes a config one of a model with these outputs, whose names are returned: the classes, or that of a score.

    `score_labels` there are the names of 0 and 1, by which sets are scored later whose labels are names.
    """
    names = list(classes if objective == "cross_entropy" else SCORE)
    settings.num_labels = len(names)
    settings.id2label = dict(enumerate(names))
    settings.label2id = {name: number for number, name in enumerate(names)}
    settings.problem_type = PROBLEM_TYPES[objective]
    settings.score_labels = list(classes) if objective == "binary_cross_entropy" else None
    return names


def objective_of(settings: Any, folder: Path) -> Objective:
    """What a trained model in `folder` was trained for, by its config and by what CrossEncoder writes beside it.

    Of one output the sigmoid is a probability, as CrossEncoder takes it where nothing is said; a regression of
    transformers' is the score itself. Raises UserError where an output is to be something else.
    """
    if settings.num_labels > 1:
        return "cross_entropy"
    name = _activation(settings, folder)
    if name is None:
        return "mse" if settings.problem_type == "regression" else "binary_cross_entropy"
    known: dict[str, Objective] = {"Sigmoid": "binary_cross_entropy", "Identity": "mse"}
    if name.rpartition(".")[2] not in known or not name.startswith("torch."):
        raise UserError(f"{folder}: its one output goes through the activation_fn {name}; crossrank knows torch's "
                        "Sigmoid and Identity")  # fmt: skip
    return known[name.rpartition(".")[2]]


def _activation(settings: Any, folder: Path) -> str | None:
    """The name of the function, from where CrossEncoder looks for it, in its order."""
    path, inner = folder / "config_sentence_transformers.json", getattr(settings, "sentence_transformers", None)
    try:
        beside = json_object(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; take it from where the model comes from") from None
    found = [
        beside.get("activation_fn"),
        inner.get("activation_fn") if isinstance(inner, dict) else None,
        getattr(settings, "sbert_ce_default_activation_function", None),
    ]
    return next((name for name in found if isinstance(name, str)), None)

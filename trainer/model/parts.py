"""The parts of a classifier from below: embeddings, layers, head; and which of them training leaves as they are.

Layers are the module lists that the model itself names as not to be split, or that have as many entries as its config
has layers, whatever the family calls them. Of an encoder with a decoder they are both's, the encoder's below.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.base.errors import UserError
from trainer.base.log import log
from trainer.config import Config


@dataclass(frozen=True)
class Levels:
    """How far up each parameter is.

    Attributes:
        of: level by name in the model: 0 = embeddings and what else feeds the layers, 1 = the lowest layer, ...,
            num_layers + 1 = the head, a pooler, and a norm after the last layer.
        num_layers: 0 where the model has no list of them, as one that computes a layer again and again.
    """

    of: dict[str, int]
    num_layers: int

    def scale(self, name: str, decay: float) -> float:
        """The learning rate of a parameter relative to the head's: that of each layer is `decay` of the one above."""
        return float(decay ** max(0, self.num_layers - self.of[name]))


def is_head(weight: str, model: Any) -> bool:
    """Whether a classifier has it beyond its encoder; where only an encoder is given it is drawn from the seed."""
    inside = model.base_model is not model and weight.startswith(f"{model.base_model_prefix}.")
    return not inside or ".pooler." in weight


def layer_names(model: Any) -> list[tuple[str, ...]]:
    """What the names of each layer's parameters begin with, the lowest first; [] where no list has all layers.

    XLM has a list of attentions, one of norms, and so on: the layer is what has the same place in each.
    """
    count = getattr(model.config, "num_hidden_layers", 0)
    whole = set(getattr(model, "_no_split_modules", None) or ())
    lists: list[str] = []
    layers: dict[tuple[str, int], list[str]] = {}
    for name, part in model.named_modules():
        if not isinstance(part, nn.ModuleList) or not len(part) or any(name.startswith(f"{own}.") for own in lists):
            continue
        # A backend may have put a class of its own before the layer's.
        if len(part) == count or whole & {kind.__name__ for kind in type(part[0]).__mro__}:
            lists.append(name)
            for place in range(len(part)):
                layers.setdefault((name.rpartition(".")[0], place), []).append(f"{name}.{place}.")
    return [tuple(names) for names in layers.values()] if len(layers) >= count else []


def levels(model: Any) -> Levels:
    """Of a transformers classifier, also with adapters, or sharded."""
    layers = layer_names(model)
    top, highest, found = len(layers) + 1, 0, {}
    below = _embeddings(model)
    for name, _ in model.named_parameters():
        layer = next((i for i, own in enumerate(layers, 1) if name.startswith(own)), None)
        if layer is not None:
            highest = max(highest, layer)
            found[name] = layer
        elif is_head(name, model) or not layers:
            found[name] = 0 if name.startswith(below) else top
        elif highest and _is_norm(name, model):
            found[name] = top if highest == len(layers) else highest  # an encoder's last is below its decoder
        else:
            found[name] = 0
    return Levels(found, len(layers))


def _embeddings(model: Any) -> str:
    """What their names begin with: the module around the table of tokens, or the table, where that is the model."""
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    parent = name.rpartition(".")[0]
    return f"{name if model.get_submodule(parent) in (model, model.base_model) else parent}."


def _is_norm(name: str, model: Any) -> bool:
    """Whether a parameter after the layers is a norm's: not one of embeddings, such as DeBERTa's of relative places."""
    module = model.get_submodule(name.rpartition(".")[0])
    return (
        "norm" in type(module).__name__.lower()
        and "embed" not in name
        and not model.config.model_type.startswith("deberta")
    )


def freeze_lowest(model: Any, config: Config) -> None:
    """Freezes what freeze_embeddings and freeze_layers name. Raises UserError where the model has no such parts, also
    for layerwise_lr_decay.
    """
    wanted = [name for name, used in (("freeze_layers", config.freeze_layers),
                                      ("layerwise_lr_decay", config.layerwise_lr_decay < 1)) if used]  # fmt: skip
    if not (wanted or config.freeze_embeddings):
        return
    found, kind = levels(model), model.config.model_type
    if wanted and not found.num_layers:
        raise UserError(f"{wanted[0]}: {kind} has no list of all its layers, as where one is computed again and again; "
                        f"leave out {wanted[0]}")  # fmt: skip
    if config.freeze_layers > found.num_layers:
        raise UserError(
            f"freeze_layers {config.freeze_layers}: {kind} has {found.num_layers} layers here; give at most that"
        )
    if not (config.freeze_embeddings or config.freeze_layers):
        return
    for name, parameter in model.named_parameters():
        if found.of[name] <= config.freeze_layers:
            parameter.requires_grad_(False)
    sizes = [(p.requires_grad, p.numel()) for p in model.parameters()]
    layers = f" and the lowest {config.freeze_layers} of {found.num_layers} layers" if config.freeze_layers else ""
    log.info(f"frozen: the embeddings{layers}; {sum(size for trained, size in sizes if trained):,} of "
             f"{sum(size for _, size in sizes):,} parameters are trained")  # fmt: skip


def fingerprint_of_frozen(model: nn.Module, first: bytes = b"") -> str | None:
    """SHA-256 of the parameters that are in no checkpoint, behind `first`; None where there are none."""
    digest, frozen = hashlib.sha256(first), [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    for name, value in frozen:
        digest.update(name.encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest() if frozen else None

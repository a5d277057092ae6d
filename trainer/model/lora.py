"""LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"), by peft.

A linear layer W of the base model is frozen, and what is trained is a low-rank change of it: W + lora_alpha / lora_r *
B A, with A (lora_r, in) and B (out, lora_r). B begins as zeros, so a run begins as the model is. The head is new, so it
is trained in full. peft's layers take the places of the linear ones inside the model, which stays a plain transformers
model; peft's own wrapper is not needed, and nothing else is renamed.

Without other names, every linear layer but the head's gets an adapter: any architecture has those, which peft's own
lists do not cover, and with all of them LoRA reaches a full finetuning, with the attention's alone it does not
(Dettmers et al. 2023, "QLoRA", section 4).
"""

import dataclasses
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from trainer.base.errors import UserError
from trainer.base.files import replacing
from trainer.base.log import log
from trainer.config import Config
from trainer.model.masks import hash_key
from trainer.model.parts import fingerprint_of_frozen, is_head

ALL = ["all-linear"]  # peft's word for it
PREFIX = "base_model.model."  # peft's, of a name in its files


@dataclass(frozen=True)
class Adapted:
    """A layer that has an adapter. `turned`: its weight is (in, out), as in GPT-2, not (out, in)."""

    scaling: float
    turned: bool


@dataclass(frozen=True)
class Lora:
    """What is needed beyond the model, whose weights may lie anywhere, to write an adapter and to merge it.

    Attributes:
        settings: peft's LoraConfig, as adapter_config.json has it.
        layers: those with an adapter, by name in the model.
        trained: names of all that is in the adapter's file: adapters and head.
    """

    settings: Any
    layers: dict[str, Adapted]
    trained: tuple[str, ...]

    def merged(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The plain model's weights, given those of the model with adapters; {} stays so."""
        plain = {name.replace(".base_layer.", "."): w for name, w in weights.items() if not is_adapter(name)}
        for name, layer in self.layers.items() if weights else ():
            change = weights[f"{name}.lora_B.default.weight"] @ weights[f"{name}.lora_A.default.weight"]
            plain[f"{name}.weight"] = plain[f"{name}.weight"] + (change.T if layer.turned else change) * layer.scaling
        return plain

    def save(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Writes the adapter as peft does, given all weights of the model: PeftModel.from_pretrained(base, folder)."""
        with replacing(folder) as temporary:
            temporary.mkdir()
            self.settings.save_pretrained(temporary)
            own = {_saved_name(name): weights[name].contiguous() for name in self.trained}
            save_file(own, temporary / "adapter_model.safetensors", metadata={"format": "pt"})

    def load(self, folder: Path) -> dict[str, torch.Tensor]:
        """What `save` wrote, by the names in the model: adapters and head."""
        saved = load_file(folder / "adapter_model.safetensors")
        return {name: saved[_saved_name(name)] for name in self.trained}

    def fingerprint(self, model: nn.Module) -> str | None:
        """SHA-256 of what a checkpoint does not hold: the frozen weights, and how much an adapter counts."""
        scaling = {name: layer.scaling for name, layer in self.layers.items()}
        return fingerprint_of_frozen(model, json.dumps(scaling).encode())

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """For the model card."""
        return {
            "r": self.settings.r,
            "alpha": self.settings.lora_alpha,
            "target_modules": sorted({name.rpartition(".")[2] for name in self.layers}),
            "num_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }


def add_lora(model: Any, config: Config) -> Lora | None:
    """Gives `model` adapters, drawn from `config.seed`, and freezes all but them and the head; None with lora_r 0.

    Raises UserError where peft is missing, or a name in lora_target_modules fits no linear layer.
    """
    if config.lora_r == 0:
        return None
    try:
        import peft
    except ImportError:
        raise UserError('lora_r needs peft, which is not installed; pip install "crossrank[lora]"') from None
    head = head_modules(model)
    names = target_layers(model, head, config.lora_target_modules)
    alpha = 2 * config.lora_r if config.lora_alpha is None else config.lora_alpha
    local = config.model_name_or_path == "builtin" or Path(config.model_name_or_path).exists()
    settings = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=alpha,
        target_modules=names,
        task_type=peft.TaskType.SEQ_CLS,
        base_model_name_or_path=None if config.model_name_or_path == "builtin" else config.model_name_or_path,
        revision=None if local else config.model_revision,
    )
    torch.manual_seed(int(hash_key(config.seed, *b"lora")) >> 1)  # another stream than the head's
    with warnings.catch_warnings():
        # Of GPT-2's layers, for which peft then sets it, as it must.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        peft.inject_adapter_in_model(settings, model)
    for name in head:
        model.get_submodule(name).requires_grad_(True)
    saved = dataclasses.replace(settings, modules_to_save=head)  # which peft gives no adapter, whatever their names
    saved.target_modules = _short(names, model, head)  # as a list, since peft makes it a set, whose order is by chance
    trained = [name for name, _ in model.named_parameters() if is_adapter(name) or _inside(name, head)]
    lora = Lora(saved, {name: _adapted(model.get_submodule(name)) for name in names}, tuple(trained))
    shown = lora.describe(model)
    log.info(f"LoRA: r {shown['r']}, alpha {alpha}, on {', '.join(shown['target_modules'])}; "
             f"{shown['num_trained']:,} parameters are trained")  # fmt: skip
    return lora


def is_adapter(name: str) -> bool:
    """Whether a weight of this name is peft's."""
    return re.search(r"\.lora_[AB]\.default\.weight$", name) is not None


def head_modules(model: Any) -> list[str]:
    """The modules of the head, by name; among them BERT's pooler, which an encoder may come without."""
    weights = [name for name, _ in model.named_parameters() if is_head(name, model)]
    pooler = re.compile(r"(.*\.pooler)\.")
    return list(dict.fromkeys(found[1] if (found := pooler.match(w)) else w.split(".")[0] for w in weights))


def target_layers(model: Any, head: list[str], chosen: list[str] | None) -> list[str]:
    """Names of the layers that get an adapter, in the model's order: those that end in one of the `chosen` names.

    Raises UserError where one fits none.
    """
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    linear = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and not _inside(n, head)]
    wanted = linear if chosen in (None, ALL) else [n for n in linear if _fits(n, chosen or [])]
    lost = [own for own in chosen or [] if chosen != ALL and not any(_fits(n, [own]) for n in linear)]
    if lost or not wanted:
        there = ", ".join(sorted({n.rpartition(".")[2] for n in linear})) or "none"
        what = f"lora_target_modules: {lost[0]!r} is the name of no linear layer" if lost else "LoRA: no linear layer"
        raise UserError(f"{what} of {model.config.model_type} outside its head; there are {there}")
    return wanted


def _fits(layer: str, names: list[str]) -> bool:
    """As peft compares them."""
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def _inside(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _short(layers: list[str], model: nn.Module, head: list[str]) -> list[str]:
    """The last parts of `layers`, if no other part of the model has such a name; else `layers`."""
    last = sorted({name.rpartition(".")[2] for name in layers})
    plain = {re.sub(r"\.(base_layer|lora_\w+)(\..*)?$", "", name) for name, _ in model.named_modules()}
    return last if {n for n in plain if _fits(n, last) and not _inside(n, head)} == set(layers) else layers


def _adapted(layer: Any) -> Adapted:
    return Adapted(layer.scaling["default"], layer.fan_in_fan_out)


def _saved_name(name: str) -> str:
    return PREFIX + name.replace(".default.weight", ".weight")


def refuse_adapter(name: str) -> None:
    """Raises UserError where `name` is a folder with an adapter, which transformers would load on another's weights."""
    folder = Path(name)
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    merged = folder.with_name("model")
    here = f"; {merged} has it merged" if (merged / "config.json").is_file() else ", or merge it first by peft"
    what = f"give its base model, {base}" if base else "give its base model, which it does not name"
    raise UserError(f"{name} holds an adapter (adapter_config.json), not a model: {what}{here}")

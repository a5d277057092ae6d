"""Models and tokenizers from a folder or the hub, checked: what comes back can be trained, or has been."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.base import lean
from trainer.base.environment import offline
from trainer.base.errors import UserError, first_line
from trainer.base.files import lost_folder
from trainer.base.log import log
from trainer.config import Config, ModelConfig
from trainer.data import builtin
from trainer.labels.label_map import finder
from trainer.model.cross_encoder import CrossEncoder
from trainer.model.lora import add_lora, refuse_adapter
from trainer.model.outputs import objective_of, settle_outputs
from trainer.model.parts import freeze_lowest, is_head
from trainer.model.settings import longest_input, set_dropout, settle, settle_padding, warn_of_joined_texts
from trainer.model.unread import NothingDrawn

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


def load_tokenizer(config: ModelConfig) -> Any:
    """Raises UserError where the folder or the hub has none that crossrank can use."""
    from transformers import AutoTokenizer

    name = config.model_name_or_path

    def load() -> Any:
        # Without its files transformers makes a tokenizer of nothing but special tokens, in silence.
        if Path(name).is_dir() and not any(file for kind in VOCABULARIES for file in Path(name).glob(kind)):
            raise ValueError(f"none of {', '.join(VOCABULARIES)}")
        return AutoTokenizer.from_pretrained(name, **_hub_options(config))

    tokenizer = _explained(load, name, "tokenizer", "put the tokenizer's files beside config.json")
    if not tokenizer.is_fast:
        raise UserError(f"{name}: {type(tokenizer).__name__} has no Rust tokenizer; save the model's folder with "
                        "tokenizer.json")  # fmt: skip
    return tokenizer


def load_for_training(config: Config, label_names: Sequence[str], hollow: bool = False) -> CrossEncoder:
    """The encoder to start from, in fp32, with a head for these classes, or for one score where that is the objective;
    new weights are drawn from `config.seed`. One that is `hollow` has the same shape, and no values: see scattered.py.
    """
    with lean.further(config.trust_remote_code):
        return _for_training(config, label_names, hollow)


def _for_training(config: Config, label_names: Sequence[str], hollow: bool) -> CrossEncoder:
    name = config.model_name_or_path
    if name == "builtin":
        settings, tokenizer = builtin.make_config(), builtin.make_tokenizer()
    else:
        settings, tokenizer = _load_settings(config), load_tokenizer(config)
    old_names = [settings.id2label[i] for i in range(settings.num_labels)]
    names = settle_outputs(settings, config.objective, label_names)
    if config.dropout is not None:
        set_dropout(settings, config.dropout)
    if config.attn_implementation is not None:
        settings._attn_implementation = config.attn_implementation
    model = _hollow_model(config, settings) if hollow else _new_model(config, settings)
    if model is None:
        model, new = _load_weights(config, settings)
        _settle_head(model, [*new], old_names, names, name)
    settle_padding(model, tokenizer, name)
    warn_of_joined_texts(tokenizer, name)
    max_length = longest_input(model, tokenizer, config.max_length)
    lora = add_lora(model, config)
    freeze_lowest(model, config)
    return CrossEncoder(model, config.attn_implementation, config.unpad, tokenizer, max_length, lora, config.objective)


def _new_model(config: Config, settings: Any) -> Any | None:
    """A model of this shape with random weights; None where they come from a folder or the hub."""
    name = config.model_name_or_path
    if name == "builtin":
        with _blaming_config(name):
            return builtin.make_model(settings, config.seed)
    torch.manual_seed(config.seed)  # also for the new head of an encoder that is loaded
    return _from_config(config, settings).float() if config.init == "random" else None


def _hollow_model(config: Config, settings: Any) -> Any:
    with torch.device("meta"):
        return _from_config(config, settings).float()


def _from_config(config: ModelConfig, settings: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    with _blaming_config(config.model_name_or_path):
        return AutoModelForSequenceClassification.from_config(settings, trust_remote_code=config.trust_remote_code)


@contextmanager
def _blaming_config(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of any kind, from the module that is given the value
        raise UserError(
            f"{name}: transformers cannot make this model of its config.json and the fields that were given "
            f"({first_line(error)})"
        ) from None


def load_trained(config: ModelConfig) -> CrossEncoder:
    """A trained model's folder. Raises UserError if it has no head."""
    with lean.further(config.trust_remote_code):
        return _trained(config)


def _trained(config: ModelConfig) -> CrossEncoder:
    path = Path(config.model_name_or_path)
    check_folder(config.model_name_or_path)
    settings, tokenizer = _load_settings(config), load_tokenizer(config)
    model, new = _load_weights(config, settings)
    rows = {shape[0] for shape in new.values() if shape}
    if rows and settings.num_labels not in rows:
        raise UserError(f"{path}: its config.json names {settings.num_labels} classes, its weights are of "
                        f"{rows.pop()}; name each class once in id2label and label2id")  # fmt: skip
    if settings.num_labels < 1:
        raise UserError(f"{path}: its config.json names no output; crossrank needs classes, or one score")
    if new:
        raise UserError(f"{path} is not a trained classifier: its weights lack {', '.join([*new][:3])}; train it first")
    objective = objective_of(settings, path)
    settle_padding(model, tokenizer, config.model_name_or_path)
    max_length = longest_input(model, tokenizer, config.max_length)
    return CrossEncoder(model, tokenizer=tokenizer, max_length=max_length, objective=objective)


def check_folder(name: str) -> None:
    """Before anything is read or loaded. Raises UserError where this can be no trained model's folder."""
    if lost := lost_folder(name, hub=False):
        raise UserError(lost)
    refuse_adapter(name)
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        hint = f"; {path / 'model'} is one" if (path / "model" / "config.json").is_file() else ""
        raise UserError(f"{path} is not a model folder: it has no config.json{hint}")


def _load_settings(config: ModelConfig) -> Any:
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # its table of new weights is the classifier's head, which is what training is for
    logging.disable_progress_bar()
    refuse_adapter(config.model_name_or_path)
    settings = _explained(
        lambda: AutoConfig.from_pretrained(config.model_name_or_path, **_hub_options(config)),
        config.model_name_or_path,
        "config.json",
        "take it from where the model comes from",
    )
    settle(settings, config.model_name_or_path)
    return settings


def _load_weights(config: ModelConfig, settings: Any) -> tuple[Any, dict[str, Any]]:
    """The classifier in fp32, and its weights that were not in the folder in this shape, with that which they had."""
    from transformers import AutoModelForSequenceClassification

    name = config.model_name_or_path
    options = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}

    def load() -> Any:
        try:
            with NothingDrawn():
                return AutoModelForSequenceClassification.from_pretrained(
                    name, config=settings, **options, **_hub_options(config)
                )
        except Exception:
            _from_config(config, settings)  # where that fails, it is not for the weights
            raise

    model, info = _explained(
        load,
        name,
        "weights",
        "for a model of this shape with new weights say --init random"
        if isinstance(config, Config)  # which training has; the other verbs have no such option
        else "a trained model's folder holds model.safetensors",
    )
    for weight, value in model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(
                f"{name}: its weight {weight} holds numbers that are not finite; get a new copy of the file"
            )
    if surplus := sorted(weight for weight in info["unexpected_keys"] if _is_of_encoder(weight, model)):
        raise UserError(
            f"{name}: its weights hold {len(surplus)} tensors of the encoder that its config.json leaves out, such "
            f"as {surplus[0]}; give the config.json with which they were saved"
        )
    new = dict.fromkeys(info["missing_keys"]) | {weight: shape for weight, shape, _ in info["mismatched_keys"]}
    new = {weight: new[weight] for weight in sorted(new)}
    if strange := [weight for weight in new if not is_head(weight, model)]:
        what, saved = strange[0], new[strange[0]]
        wrong = f"its weights lack {len(strange)} tensors of the encoder, such as {what}, which it has"
        if saved:
            wrong = f"{what} has the shape {[*saved]} in its weights, and {[*model.state_dict()[what].shape]}"
        raise UserError(f"{name}: {wrong} by its config.json; give both as they were saved together")
    return model, new


# Numbers that are counted, not trained: older versions of transformers have saved them.
COUNTED = ("position_ids", "token_type_ids", "inv_freq", "masked_bias")


def _is_of_encoder(weight: str, model: Any) -> bool:
    """Whether a tensor of a file would be in this model's encoder, which need not be named there."""
    parts = weight.removeprefix(f"{model.base_model_prefix}.").split(".")
    inside = isinstance(getattr(model.base_model, parts[0], None), (nn.Module, nn.Parameter))
    return inside and model.base_model is not model and "pooler" not in parts and parts[-1] not in COUNTED


def _hub_options(config: ModelConfig) -> dict[str, Any]:
    return {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}


def _settle_head(model: Any, new: list[str], old: list[str], names: list[str], place: str) -> None:
    """Keeps the meaning of a trained head, and says where it has another one than the data's classes `names`."""
    kept = not any(is_head(weight, model) and ".pooler." not in weight for weight in new)
    find = finder(old)
    meant = [find(name) or "" for name in names]  # whatever their case
    if sorted(meant) == sorted(old):
        if kept and meant != old:
            _reorder_classes(model, [old.index(name) for name in meant])
    # LABEL_0 and so on is what a new head's classes are called.
    elif max(len(old), len(names)) > 1 and not set(old) <= {f"LABEL_{i}" for i in range(len(old))}:
        what = "goes on as that of" if kept else "is drawn anew for"
        log.warning(f"{place}: its config.json has the classes {', '.join(old)}; the head {what} "
                    f"{'one score' if len(names) == 1 else ', '.join(names)}")  # fmt: skip


def _reorder_classes(model: Any, order: list[int]) -> None:
    """Gives the last layer's classes another order, so that a trained head keeps its meaning."""
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.copy_(parameter[order])


def _explained(load: Callable[[], Any], name: str, what: str, fix: str) -> Any:
    """load(), or one UserError that says what is missing where, and what to do."""
    if lost := lost_folder(name):
        raise UserError(lost)
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # damaged files surface as any kind of error in four libraries
        reason, told = first_line(error), str(error)
    if "trust_remote_code" in told:
        raise UserError(f"{name} brings Python code of its own; read it, then say --trust_remote_code true")
    if "weights_only" in told:
        raise UserError(f"{name}: its pytorch_model.bin is a pickle that holds more than weights, and loading it could "
                        "run any code; have its maker save it as model.safetensors")  # fmt: skip
    if Path(name).is_dir():
        raise UserError(f"{name} has no {what} that can be loaded ({reason}); {fix}")
    forbidden = " (HF_HUB_OFFLINE is set)" if offline() else ""
    raise UserError(
        f"{name!r} is no folder here, and its {what} could not be loaded from the hub{forbidden} ({reason}). Without "
        "network, give a local folder in its place"
    )

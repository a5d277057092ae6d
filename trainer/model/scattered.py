"""A model whose values lie on rank 0 alone, in the CPU's memory, until a backend that shards has made room for them.

Rank 0 loads it as every run does, with every check and the same random numbers for what is new. The others make a model
of the same shape without values, on torch's meta device. The backend shards that, and then rank 0 sends a tensor at a
time, of which each rank keeps its part: no device ever holds more than its part and the largest tensor.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from trainer.base.errors import UserError, first_line
from trainer.base.log import log
from trainer.config import Config
from trainer.data.tokens import Tokens
from trainer.model.cross_encoder import CrossEncoder
from trainer.model.loading import load_for_training
from trainer.model.probe import examine
from trainer.ranks import World
from trainer.together import together


def load_scattered(config: Config, world: World, label_names: Sequence[str]) -> CrossEncoder:
    """The encoder to start from. Where that is not possible in this way, each rank has all of it, as elsewhere.

    Every rank takes part.
    """
    why, mistake = whole_because(config), None
    model: CrossEncoder | None = None
    if why is None:
        try:
            model = load_for_training(config, label_names, hollow=not world.is_main)
            why = stray(model)
        except Exception as error:  # of any kind, from the model's own code
            why = first_line(error)
            if world.is_main:
                if not isinstance(error, UserError):
                    raise
                mistake = str(error)
    # Weights that cannot be read are so for who reads them; a program that goes on does so on all ranks.
    if mistake := world.broadcast(mistake):
        raise UserError(mistake)
    if world.all(why is None):
        assert model is not None
        model.hollow = True
        return model
    log.info(f"each rank loads the whole model before it is sharded: {why or 'another rank can make none without'}")
    held = model if world.is_main else None
    return together(world, lambda: held or load_for_training(config, label_names), UserError).to(world.device)


def whole_because(config: Config) -> str | None:
    """Why each rank needs the values beforehand; None if it does not."""
    if config.torch_compile:
        return "torch_compile needs them"
    if config.attn_implementation not in (None, "eager", "sdpa"):
        return f"attention {config.attn_implementation} may need them on the device"
    return None


def stray(model: CrossEncoder) -> str | None:
    """Which of its tensors cannot be replaced, if there is one."""
    for name, part in model.named_modules():
        for attribute, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                return f"{name}.{attribute} is a tensor, and neither a parameter nor a buffer"
    return None


def examine_on_main(model: CrossEncoder, world: World, tokens: Tokens, attention_is_given: bool) -> None:
    """`examine`; what rank 0 finds out settles a hollow model on the others too."""
    if not model.hollow:
        examine(model, tokens, attention_is_given)
        return
    found: dict[str, Any] | None = None
    if world.is_main:
        examine(model, tokens, attention_is_given, world.device.type)
        found = {
            "trained": [name for name, p in model.named_parameters() if p.requires_grad],
            "attention": model.model.config._attn_implementation,
            "sites": model.calls.sites,
            "draws": model.draws,
            "one_length": model.one_length,
        }
    found = world.broadcast(found)
    assert found is not None
    if not world.is_main:
        trained = {*found["trained"]}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        if model.layout is None and model.model.config._attn_implementation != found["attention"]:
            model.model.set_attn_implementation(found["attention"])
        model.calls.sites = found["sites"] and [(dim, site) for dim, site in found["sites"]]
        model.draws, model.one_length = found["draws"], found["one_length"]


def fingerprint_on_main(model: CrossEncoder, world: World) -> str | None:
    """`frozen_fingerprint`, which a hollow model has on rank 0 only."""
    if not model.hollow:
        return model.frozen_fingerprint
    found: str | None = world.broadcast(model.frozen_fingerprint if world.is_main else None)
    return found


def lay_aside(module: nn.Module) -> dict[str, torch.Tensor]:
    """Takes the values out of rank 0's module, which is hollow then as the others' are; {} elsewhere.

    What has several names stays one parameter, and its values are under the first.
    """
    values = {name: own.detach() for name, own in _own(module) if not own.is_meta}
    hollow: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, own in part._parameters.items():
            if own is not None and not own.is_meta:
                empty = torch.empty_like(own, device="meta")
                part._parameters[name] = hollow.setdefault(id(own), nn.Parameter(empty, own.requires_grad))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device="meta")
    return values


def _own(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers(remove_duplicate=False)


def sent(full: torch.Tensor | None, like: torch.Tensor, world: World) -> torch.Tensor:
    """Rank 0's `full` tensor, on every rank's device; elsewhere None is given, and it has the shape of `like`."""
    got = torch.empty(like.shape, dtype=like.dtype) if full is None else full.contiguous()
    got = got.to(world.device)
    if got.numel():
        world.broadcast_(got.flatten().view(torch.uint8))  # in place: it is contiguous
    return got


def fill_buffers(module: nn.Module, values: dict[str, torch.Tensor], world: World) -> None:
    """Gives each buffer its values, of rank 0, on the device."""
    for name, buffer in list(module.named_buffers(remove_duplicate=False)):
        place, _, own = name.rpartition(".")
        module.get_submodule(place)._buffers[own] = sent(values.pop(name, None), buffer, world)

"""AdamW, and what of the learning rate each parameter gets."""

from typing import Any

import torch
from torch import nn

from trainer.config import OptimisationConfig
from trainer.model.parts import levels


def parameter_groups(model: Any, config: OptimisationConfig) -> list[dict[str, Any]]:
    """The parameters that decay, and biases and norms, which do not; by what of the learning rate they get, `scale`."""
    scale_of = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    if config.layerwise_lr_decay < 1:
        found = levels(model.model)
        scale_of = {f"model.{name}": found.scale(name, config.layerwise_lr_decay) for name in found.of}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}  # DeepSpeed takes no empty one
    for decays in (True, False):
        for name, p in model.named_parameters():
            # Biases and the weights of norms are vectors.
            if p.requires_grad and (p.ndim > 1) == decays:
                groups.setdefault((scale_of[name], decays), []).append(p)
    return [
        {"params": params, "weight_decay": config.weight_decay if decays else 0.0, "scale": scale}
        for (scale, decays), params in groups.items()
    ]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """For the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def make_optimizer(groups: list[dict[str, Any]], config: OptimisationConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) in its fused form."""
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )

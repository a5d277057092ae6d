"""AdamW and the learning rate, which is a pure function of the step."""

import math
from typing import Any

import torch
from torch import nn

from trainer.config import OptimisationConfig


def parameter_groups(model: nn.Module, config: OptimisationConfig) -> list[dict[str, Any]]:
    """The parameters that decay, and biases and norms, which do not."""
    # Biases and the weights of norms are vectors.
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    plain = [p for p in trained if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]  # DeepSpeed takes no empty one


def make_optimizer(groups: list[dict[str, Any]], config: OptimisationConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) in its fused form."""
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def warmup_steps(config: OptimisationConfig, num_steps: int) -> int:
    return config.warmup_steps if config.warmup_steps > 0 else math.ceil(num_steps * config.warmup_ratio)


def learning_rate(step: int, num_steps: int, config: OptimisationConfig) -> float:
    """The rate of optimizer step `step`, counted from 0: linear warmup, then the schedule. As in transformers."""
    warmup = warmup_steps(config, num_steps)
    kind = config.lr_scheduler_type
    if kind != "constant" and step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    factor = {"linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}.get(kind, 1.0)
    return config.learning_rate * factor

"""Whether the static step's gradients are right, on the very machine: compared with the plain step's.

Two ways to compute in bfloat16 round differently, so their difference says little. What can be asked is that the new
way is no farther from fp32 than the old one, in any part of the model.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from trainer.data.sampler import Step
from trainer.model.precision import autocast, products
from trainer.step.graphs import NotAsExpected
from trainer.step.plain import PlainStep

PARTS = 4  # in which the fp32 gradient is computed: it takes twice the memory, which no one has tried
FARTHER = 2.0  # how much farther from fp32 than the plain step's a gradient may be
UPDATE = 1e-2  # how far, relative to its size, an update may be off
ROUNDING = 1e-4  # of a gradient's norm: more than the order of sums does in fp32


def compare(plain: PlainStep, current: Step, rows: np.ndarray, fast: Callable[[], object]) -> None:
    """Raises NotAsExpected where `fast` leaves wrong gradients of the micro-batch `rows`.

    Of each layer's parameters together, the distance from fp32 may be at most FARTHER times the plain step's.
    """
    named = [(name, p) for name, p in plain.model.model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    with _full_fp32():
        exact = _gradients(parameters, lambda: _plain(plain, current, np.array_split(rows, PARTS), bf16=False))
    sizes = _norms(named, exact)

    def distances_of(work: Callable[[], object]) -> dict[str, float]:
        found = _gradients(parameters, work)
        torch._foreach_sub_(found, exact)
        return _norms(named, found)

    allowed = distances_of(lambda: _plain(plain, current, [rows], plain.config.bf16))
    distances = distances_of(fast)
    if not np.isfinite([*sizes.values(), *allowed.values()]).all():
        return  # it is not the form of the step: the run is about to end with its own error
    whole = float(np.sqrt(sum(size**2 for size in sizes.values())))
    # What is next to nothing is rounding of what is not.
    limits = {part: FARTHER * allowed[part] + ROUNDING * max(size, 1e-2 * whole) for part, size in sizes.items()}
    wrong = [part for part, limit in limits.items() if not distances[part] <= limit]
    if wrong:
        worst = max(wrong, key=lambda part: distances[part] / sizes[part] if sizes[part] else np.inf)
        raise NotAsExpected(f"the gradient of {worst} is {distances[worst]:.1e} away from the one in fp32, which is "
                            f"{sizes[worst]:.1e} long; the plain step's is {allowed[worst]:.1e} away")  # fmt: skip


def compare_update(
    plain: PlainStep, old: Callable[[torch.Tensor], torch.Tensor], rate: float, norm: torch.Tensor
) -> None:
    """Raises NotAsExpected where weights and moments are not what AdamW at this `rate` makes of what they were, `old`.

    `norm`: () that of the gradient, which is to be clipped. The gradient is told by the first moment.
    """
    optimizer, limit = plain.backend.optimizer, plain.config.max_grad_norm or np.inf
    squares, errors = torch.zeros_like(norm), [torch.zeros_like(norm)]
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            number, first, second = (optimizer.state[p][name] for name in ("step", "exp_avg", "exp_avg_sq"))
            gradient = (first - beta1 * old(first)) / (1 - beta1)
            squares += gradient.square().sum()
            expected = beta2 * old(second) + (1 - beta2) * gradient.square()
            errors.append((second - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
            own = rate * group["scale"]
            root = (second / (1 - beta2**number)).sqrt() + group["eps"]
            expected = old(p) * (1 - own * group["weight_decay"]) - own / (1 - beta1**number) * first / root
            errors.append((p - expected).abs().max() / (own + 1e-3 * expected.abs().max()).clamp(min=1e-30))
    clipped = norm.clamp(max=limit)
    errors.append((squares.sqrt() - clipped).abs() / clipped.clamp(min=1e-30))
    worst = torch.stack([error.detach() for error in errors]).max()
    if worst > UPDATE:
        raise NotAsExpected(f"the update is {float(worst):.1e} away from what AdamW makes of the gradient")


def _plain(plain: PlainStep, current: Step, parts: list[np.ndarray], bf16: bool) -> None:
    device = plain.world.device
    for rows in parts:
        if len(rows):
            batch = plain.batch(current, rows)
            with products(device, bf16), torch.enable_grad():
                with autocast(device, bf16):
                    logits = plain.model(batch)
                (plain.loss(logits, batch) / plain.loss.divisor(current.rows)).backward()
    plain.forget()


def _gradients(parameters: list[nn.Parameter], work: Callable[[], object]) -> list[torch.Tensor]:
    """What `work` leaves. Raises NotAsExpected where it leaves none."""
    try:
        work()
        gradients = [p.grad for p in parameters]
    finally:
        for parameter in parameters:
            parameter.grad = None
    if any(gradient is None for gradient in gradients):
        raise NotAsExpected("it leaves a parameter without a gradient")
    return [gradient for gradient in gradients if gradient is not None]


def _norms(named: list[tuple[str, nn.Parameter]], values: list[torch.Tensor]) -> dict[str, float]:
    """Of each module's parameters together: a key's bias alone has a gradient of nothing but rounding."""
    squares: dict[str, float] = defaultdict(float)
    norms = torch.stack(list(torch._foreach_norm(values))).cpu().tolist()
    for (name, _), norm in zip(named, norms, strict=True):
        squares[name.rpartition(".")[0] or name] += norm**2
    return {part: float(np.sqrt(square)) for part, square in squares.items()}


@contextmanager
def _full_fp32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

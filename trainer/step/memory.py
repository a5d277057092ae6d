"""How many pairs a forward can hold: tried on the GPU before the first step."""

import numpy as np
import torch

from trainer.base.errors import TrainingFailed, out_of_memory
from trainer.base.log import log
from trainer.data.sampler import GlobalBatchSampler, Step
from trainer.step.plain import PlainStep


def fit_micro_batches(plain: PlainStep, sampler: GlobalBatchSampler) -> None:
    """Halves the micro-batch until the heaviest one of the run fits into the GPU's memory, on every rank.

    The order of the samples is known beforehand, so this can be tried before the first step. A step is then
    computed in more forwards: the same mathematics, but other bits, so that an exact run ends here.
    """
    if not plain.backend.replicated:
        return
    steps = sampler.extremes(plain.split.tokens.lengths) if plain.world.is_main else ()
    told = plain.world.broadcast([[own.step, own.epoch, own.rows.tolist()] for own in steps])
    heaviest, longest = (Step(step, epoch, np.array(rows)) for step, epoch, rows in told)
    exact = plain.config.exact_shards is not None
    while not plain.world.all(fits(plain, heaviest) and fits(plain, longest)):
        if plain.micro_batch_size == 1:
            raise TrainingFailed("a single pair does not fit into the GPU's memory; lower --max_length, or set "
                                 "--gradient_checkpointing true")  # fmt: skip
        if exact:
            raise TrainingFailed(
                f"the GPU's memory does not hold {plain.micro_batch_size} pairs in a forward, and under exact_shards "
                "fewer would be other bits; begin a new run with a lower --per_device_train_batch_size"
            )
        plain.micro_batch_size = -(-plain.micro_batch_size // 2)
        log.info(f"not enough GPU memory: continuing with {plain.micro_batch_size} pairs per forward, which does not "
                 "change the run")  # fmt: skip


def fits(plain: PlainStep, step: Step) -> bool:
    """Whether this rank has the memory for `step`'s largest micro-batch, beside the optimizer's state."""
    plain.model.train()
    lengths = plain.split.tokens.lengths
    micro_batches = plain.micro_batches(step)
    rows = max(micro_batches, key=lambda rows: lengths[rows].sum())
    try:
        # A resumed run has its moments already.
        new = [p for p in plain.model.parameters() if p.requires_grad and p not in plain.backend.optimizer.state]
        reserved = [torch.empty_like(p) for p in new for moment in range(2)]
        size = sum(p.numel() for p in plain.model.parameters() if p.requires_grad)
        sums = [torch.empty(size, device=plain.world.device) for _ in range(plain.num_sums)]
        for _ in micro_batches[:2]:  # the first one's gradients are there while the second one is computed
            plain.backward(step, rows, last=False)
        del reserved, sums
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        plain.model.zero_grad()
        torch.cuda.empty_cache()
    return True

"""How many pairs a forward can hold: tried on the GPU before the first step."""

import torch

from trainer.base.errors import TrainingFailed, out_of_memory
from trainer.base.log import log
from trainer.data.sampler import Step
from trainer.loop import Trainer


def fit_micro_batches(trainer: Trainer) -> None:
    """Halves the micro-batch until the heaviest one of the run fits into the GPU's memory, on every rank.

    The order of the samples is known beforehand, so this can be tried before the first step. A step is then
    computed in more forwards: the same mathematics.
    """
    if not trainer.backend.replicated:
        return
    lengths = trainer.data["train"].tokens.lengths
    heaviest, longest = trainer.sampler.heaviest(lengths), trainer.sampler.longest(lengths)
    while not trainer.world.all(fits(trainer, heaviest) and fits(trainer, longest)):
        if trainer.micro_batch_size == 1:
            raise TrainingFailed("a single pair does not fit into the GPU's memory; lower --max_length, or set "
                                 "--gradient_checkpointing true")  # fmt: skip
        trainer.micro_batch_size = -(-trainer.micro_batch_size // 2)
        log.info(f"not enough GPU memory: continuing with {trainer.micro_batch_size} pairs per forward, which does not "
                 "change the run")  # fmt: skip


def fits(trainer: Trainer, step: Step) -> bool:
    """Whether this rank has the memory for `step`'s largest micro-batch, beside the optimizer's state."""
    trainer.model.train()
    lengths = trainer.data["train"].tokens.lengths
    micro_batches = trainer.micro_batches(step)
    rows = max(micro_batches, key=lambda rows: lengths[rows].sum())
    try:
        # A resumed run has its moments already.
        new = [p for p in trainer.model.parameters() if p.requires_grad and p not in trainer.backend.optimizer.state]
        reserved = [torch.empty_like(p) for p in new for moment in range(2)]
        for _ in micro_batches[:2]:  # the first one's gradients are there while the second one is computed
            trainer.backward(step, rows, last=False)
        del reserved
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        trainer.model.zero_grad()
        torch.cuda.empty_cache()
    return True

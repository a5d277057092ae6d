"""The training loop. Start reading here: `Trainer.loop` is all of it.

Sources of the method: AdamW with linear warmup and decay on sentence pairs as in Devlin et al. 2019; the
hyperparameters' meaning as in transformers' TrainingArguments.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from trainer.backends import Single
from trainer.backends.optim import learning_rate
from trainer.base.errors import TrainingFailed
from trainer.base.log import log
from trainer.config import Config
from trainer.data.sampler import GlobalBatchSampler, Step, deal, num_forwards
from trainer.data.sources import Role
from trainer.data.tokens import Split
from trainer.evaluate import Evaluation, evaluate
from trainer.model.batch import IGNORED, Batch
from trainer.model.cross_encoder import CrossEncoder
from trainer.model.dropout import hash_key
from trainer.model.precision import autocast, products
from trainer.ranks import World
from trainer.run.about import note
from trainer.run.output import Output
from trainer.run.preempt import Preemption
from trainer.run.state import Identity, State
from trainer.step.graphs import NotAsExpected
from trainer.step.static import StaticStep


@dataclass(kw_only=True)
class Trainer:
    """A run under way: what the loop needs.

    Attributes:
        forward: the model as the backend calls it.
        micro_batch_size: pairs in one forward of one rank, at most.
        static: what takes the steps; None = they are plain.
    """

    config: Config
    world: World
    data: dict[Role, Split]
    sampler: GlobalBatchSampler
    identity: Identity
    model: CrossEncoder
    backend: Single
    forward: Callable[[Batch], torch.Tensor]
    output: Output
    state: State
    preemption: Preemption
    micro_batch_size: int
    static: StaticStep | None = None

    def loop(self) -> None:
        """Every optimizer step that is left, with its logging, evaluations and checkpoints."""
        config, state = self.config, self.state
        state.window.start()
        self.evaluate_before()
        self.model.train()
        for current in self.sampler.steps(state.step):
            state.step = current.step + 1  # a checkpoint or an evaluation comes after the step
            rate = learning_rate(current.step, self.sampler.num_steps, config)
            norm = self.take(current, rate)
            self.output.journal.bar.update()
            if state.step % config.logging_steps == 0 or state.step == self.sampler.num_steps:
                self.log(norm, rate)
            if self.due(config.eval_strategy, config.eval_steps, last=config.load_best_model_at_end):
                self.evaluate_and_keep_best()
            if self.due(config.save_strategy, config.save_steps, last=True):
                self.save()
            self.preemption.check()

    def take(self, current: Step, rate: float) -> torch.Tensor:
        """Takes an optimizer step. Returns the gradient's norm, on the device."""
        size, tokens = len(current.rows), int(self.data["train"].tokens.lengths[current.rows].sum())
        if self.static is not None:
            try:
                self.static(current, rate)
            except NotAsExpected as error:
                self.distrust(str(error))
            else:
                self.state.window.add(size, tokens)
                return self.static.norm
        if self.model.draws:
            seed_torch(self.config.seed, current.step, self.world.rank)
        loss = torch.zeros((), device=self.world.device)
        micro_batches = self.micro_batches(current)
        for rows in micro_batches:
            loss += self.backward(current, rows, last=rows is micro_batches[-1])
        norm = self.backend.step(rate, self.config.max_grad_norm)
        if not self.skipped(norm):
            self.state.window.count(current.step + 1, loss, norm)
            self.state.window.add(size, tokens)
        return norm

    def distrust(self, reason: str) -> None:
        """From now on steps are plain."""
        assert self.static is not None
        self.static.close()
        self.static = None
        log.warning(f"the {self.state.step_form} step is not used, all steps are plain: {reason}")
        self.state.step_form = f"plain, since another form failed: {reason}"
        if self.world.is_main:
            note(self.output.folder, step_form=self.state.step_form)

    def due(self, strategy: str, every: int, last: bool) -> bool:
        """Whether something that happens every so often, and maybe at the last step, happens now."""
        if strategy == "no":
            return False
        if self.state.step == self.sampler.num_steps:
            return last
        return self.state.step % (every if strategy == "steps" else self.sampler.steps_per_epoch) == 0

    def micro_batches(self, current: Step, rank: int | None = None) -> list[np.ndarray]:
        """The rows of each of a rank's micro-batches, this one's by default; an empty one still takes part."""
        rank = self.world.rank if rank is None else rank
        lengths = self.data["train"].tokens.lengths[current.rows]
        count = num_forwards(self.micro_batch_size, len(current.rows), self.world.size)
        parts = deal(lengths, self.world.size * count)
        return [current.rows[part] for part in parts[rank * count :][:count]]

    def backward(self, current: Step, rows: np.ndarray, last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch. Returns its part of the step's loss, on the device."""
        config, device = self.config, self.world.device
        batch = self.batch(current, rows)
        with products(device, config.bf16), self.backend.accumulate(last):
            with autocast(device, config.bf16):
                logits = self.forward(batch)
            # A sum over these pairs divided by the global count: any split gives the same gradient.
            loss = self.loss(logits, batch) / len(current.rows)
            self.backend.backward(loss)
        return loss.detach()

    def batch(
        self, current: Step, rows: np.ndarray, device: torch.device | None = None, num_pairs: int | None = None
    ) -> Batch:
        """The micro-batch `rows` of a step; see CrossEncoder.batch."""
        split = self.data["train"]
        longest = int(split.tokens.lengths[current.rows].max())
        keys = {"seed": self.config.seed, "step": current.step}
        device = device or self.world.device
        return self.model.batch(split.tokens, split.pairs.label, rows, device, longest, num_pairs, **keys)

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Summed over the pairs of a batch, given their logits (pairs, classes)."""
        smoothing = self.config.label_smoothing_factor
        return cross_entropy(
            logits.float(), batch.labels, reduction="sum", ignore_index=IGNORED, label_smoothing=smoothing
        )

    def skipped(self, norm: torch.Tensor) -> bool:
        """Whether the step was left out for its gradient, as skip_nonfinite allows. Raises TrainingFailed."""
        allowed, totals, step = self.config.skip_nonfinite, self.state.totals, self.state.step
        if allowed == 0 or math.isfinite(float(norm)):
            return False
        totals.skipped_steps += 1
        if totals.skipped_steps > allowed:
            raise TrainingFailed(f"step {step}: gradient norm {float(norm)}, and {allowed} such steps were skipped "
                                 "before; lower --learning_rate")  # fmt: skip
        log.warning(f"step {step} is skipped: its gradient norm is {float(norm)}")
        return True

    def refuse_nonfinite(self) -> None:
        """Raises TrainingFailed, on every rank, where a loss or gradient norm was not finite since the last log."""
        found = torch.zeros(self.world.size, 2, dtype=torch.int64)
        found[self.world.rank] = self.state.window.nonfinite.cpu()
        found = self.world.sum(found)
        if not found.any():
            return
        step = int(found[found > 0].min()) - 1
        where = [rank for rank in range(self.world.size) if found[rank, 0] == step + 1]
        current, pairs = self.sampler.at(step), self.data["train"].pairs
        rows = np.concatenate([part for rank in where for part in self.micro_batches(current, rank)] or [current.rows])
        shown = ", ".join(map(str, np.sort(pairs.row[rows])[:16])) + (", ..." if len(rows) > 16 else "")
        what = f"loss on rank {', '.join(map(str, where))}" if where else "gradient norm"
        raise TrainingFailed(
            f"step {step + 1}: the {what} is not finite; the pairs are rows {shown} of {pairs.name}, and their tokens "
            f"are sound. Lower --learning_rate, or look for damaged weights in {self.config.model_name_or_path}; "
            "the checkpoints are of earlier steps"
        )

    def log(self, norm: torch.Tensor, rate: float) -> None:
        """Waits for the device, as only this and a checkpoint do in the loop, and begins a new window."""
        state, window = self.state, self.state.window
        self.refuse_nonfinite()
        loss = float(self.world.sum(window.loss)) / max(1, window.steps)
        seconds = window.seconds
        state.totals.add(window, seconds)
        self.output.journal.log_training(
            {
                "step": state.step,
                "epoch": state.step / self.sampler.steps_per_epoch,
                "loss": loss,
                "grad_norm": float(norm) if math.isfinite(float(norm)) else None,  # None: that step was skipped
                "learning_rate": rate,
                "samples_per_second": window.samples / seconds,
                "tokens_per_second": window.tokens / seconds,
            }
        )
        window.restart()

    def save(self) -> None:
        """Begins to write a checkpoint of everything that the run needs to resume exactly."""
        state, output = self.state, self.output
        if state.saved_step == state.step:
            return
        self.refuse_nonfinite()
        energy = output.energy(state.totals.energy)
        saved = state.to_json(self.identity, self.world, self.backend.name, output.journal.num_events, energy)
        tensors = self.backend.save_state()
        if self.world.is_main:
            output.checkpoints.save(state.step, tensors, saved)
        state.saved_step = state.step

    def evaluate_before(self) -> None:
        """What is to be scored before the first step: the start, or what an interruption left."""
        if self.state.pending_evaluation:
            self.evaluate_and_keep_best()
        elif self.config.eval_on_start and self.state.step == 0:
            with self.state.window.pause():
                self.evaluate("dev", step=0)

    def evaluate_and_keep_best(self) -> None:
        """While it lasts, a checkpoint says that it is still to be done. Without a dev split there is nothing to do."""
        state = self.state
        state.pending_evaluation = "dev" in self.data
        if not state.pending_evaluation:
            return
        with state.window.pause():
            self.keep_if_best(self.evaluate("dev", state.step).scores)
            state.pending_evaluation = False

    def evaluate(self, role: Role, step: int) -> Evaluation:
        """Scores the weights of `step` on a split."""
        config, split, totals = self.config, self.data[role], self.state.totals
        started = time.perf_counter()
        batch_size = config.per_device_eval_batch_size
        result = evaluate(self.model, split, self.world, batch_size, config.bf16, self.preemption.check)
        self.model.train()
        totals.eval_seconds += time.perf_counter() - started
        totals.evaluated += len(split)
        place = {"step": step, "epoch": step / self.sampler.steps_per_epoch, "split": split.name}
        self.output.journal.log_evaluation(place | result.scores)
        return result

    def keep_if_best(self, scores: dict[str, Any]) -> None:
        """Saves the model when it is the best so far, if the best is what the run shall end with."""
        name, best = self.config.metric_for_best_model, self.state.best
        value = -scores[name] if name == "loss" else scores[name]
        if self.config.load_best_model_at_end and (best is None or value > best[0]):
            self.state.best = value, self.state.step
            self.save_model()

    def save_model(self) -> None:
        weights = self.model.with_frozen_rows(self.backend.full_weights(self.model.model))
        if self.world.is_main:
            self.model.save(weights, self.output.model)
        self.world.barrier()


def seed_torch(seed: int, step: int, rank: int) -> None:
    """torch's own random stream, for what does not draw by sample: a function of (seed, step, rank)."""
    torch.manual_seed(int(hash_key(seed, step, rank)) >> 1)

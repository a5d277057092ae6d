"""The training loop. Start reading here: `Trainer.loop` is all of it.

Sources of the method: AdamW with linear warmup and decay on sentence pairs as in Devlin et al. 2019; the
hyperparameters' meaning as in transformers' TrainingArguments.
"""

import math
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from trainer.backends import Single
from trainer.base.errors import TrainingFailed
from trainer.base.log import log
from trainer.config import Config
from trainer.data.sampler import GlobalBatchSampler, Step
from trainer.data.tokens import Split
from trainer.evaluate import Evaluation, evaluate
from trainer.metrics import goodness
from trainer.model.cross_encoder import CrossEncoder
from trainer.ranks import World
from trainer.run.about import note
from trainer.run.output import Output
from trainer.run.preempt import Preemption
from trainer.run.state import Identity, State
from trainer.schedules import Schedule
from trainer.step.graphs import NotAsExpected
from trainer.step.plain import PlainStep
from trainer.step.static import StaticStep


@dataclass(kw_only=True)
class Trainer:
    """A run under way: what the loop needs.

    Attributes:
        static: what takes the steps in place of `plain`, if anything does.
        scored: evaluations of the dev split by the step whose weights they are of: the last one and the best one, which
            the end of the run need not compute again.
    """

    config: Config
    world: World
    data: dict[str, Split]
    sampler: GlobalBatchSampler
    schedule: Schedule
    identity: Identity
    model: CrossEncoder
    backend: Single
    output: Output
    state: State
    preemption: Preemption
    plain: PlainStep
    static: StaticStep | None = None
    scored: dict[int, Evaluation] = field(default_factory=dict)

    def loop(self) -> None:
        """Every optimizer step that is left, with its logging, evaluations and checkpoints."""
        config, state = self.config, self.state
        state.window.start()
        self.evaluate_before()
        self.model.train()
        for current in takewhile(lambda _: not self.stopped_early, self.sampler.steps(state.step)):
            state.step = current.step + 1  # a checkpoint or an evaluation comes after the step
            rate = self.schedule(current.step)
            norm = self.take(current, rate)
            self.output.journal.bar.update()
            if state.step % config.logging_steps == 0 or self.may_be_last:
                self.log(norm, rate)
            if self.evaluation_is_due:
                self.evaluate_and_keep_best()
            if self.due(config.save_strategy, config.save_steps, last=True):
                self.save()
            self.preemption.check()

    @property
    def keeps_best(self) -> bool:
        """Whether the run ends with its best model."""
        return self.config.keeps_best("dev" in self.data)

    @property
    def stopped_early(self) -> bool:
        """Whether the evaluations have been no better for so long that the run is over."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.state.waited >= patience

    @property
    def may_be_last(self) -> bool:
        """Whether this step can be the run's last, as far as is known before its evaluation."""
        patience = self.config.early_stopping_patience
        may_stop = patience is not None and self.state.waited + 1 >= patience and self.evaluation_is_due
        return may_stop or self.state.step == self.sampler.num_steps

    @property
    def evaluation_is_due(self) -> bool:
        return self.due(self.config.eval_strategy, self.config.eval_steps, last=self.keeps_best)

    def take(self, current: Step, rate: float) -> torch.Tensor:
        """Takes an optimizer step, in the form that is trusted. Returns the gradient's norm, on the device."""
        if self.static is not None:
            try:
                return self.static(current, rate)
            except NotAsExpected as error:
                self.distrust(str(error))
        return self.plain(current, rate)

    def distrust(self, reason: str) -> None:
        """From now on steps are plain."""
        self.settle(None)
        log.warning(f"the {self.state.step_form} step is not used, all steps are plain: {reason}")
        self.state.step_form = f"plain, since another form failed: {reason}"
        if self.world.is_main:
            note(self.output.folder, step_form=self.state.step_form)

    def settle(self, static: StaticStep | None) -> None:
        """Steps are taken by `static` from now on; by None, plain. What took them gives its memory back."""
        if self.static is not None:
            self.static.close()
        self.static = static

    def due(self, strategy: str, every: int, last: bool) -> bool:
        """Whether something that happens every so often, and maybe at the last step, happens now."""
        if strategy == "no":
            return False
        if self.state.step == self.sampler.num_steps or self.stopped_early:
            return last
        return self.state.step % (every if strategy == "steps" else self.sampler.steps_per_epoch) == 0

    def refuse_nonfinite(self) -> None:
        """Raises TrainingFailed, on every rank, where a loss or gradient norm was not finite since the last log."""
        own = self.state.window.nonfinite.cpu()
        if self.world.all(not own.any()):
            return
        found = torch.zeros(self.world.size, 2, dtype=torch.int64)
        found[self.world.rank] = own
        found = self.world.sum(found)
        step = int(found[found > 0].min()) - 1
        where = [rank for rank in range(self.world.size) if found[rank, 0] == step + 1]
        current, pairs = self.sampler.at(step), self.data["train"].pairs
        rows = np.concatenate(
            [part for rank in where for part in self.plain.micro_batches(current, rank)] or [current.rows]
        )
        what = f"loss on rank {', '.join(map(str, where))}" if where else "gradient norm"
        raise TrainingFailed(
            f"step {step + 1}: the {what} is not finite; the pairs are {pairs.all_at(rows)}, and their tokens are "
            f"sound. Lower --learning_rate, or look for damaged weights in {self.config.model_name_or_path}; "
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
        output.checkpoints.wait()  # there is room for one copy, not for two
        energy = output.energy(state.totals.energy)
        saved = state.to_json(self.identity, self.world, self.backend.name, output.journal.num_events, energy)
        output.checkpoints.save(state.step, self.backend.save_state(), saved)
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
            self.scored = {step: own for step, own in self.scored.items() if step in (state.step, self.best_step)}
        if self.stopped_early:
            self.say_stopped()

    def evaluate(self, role: str, step: int) -> Evaluation:
        """Scores the weights of `step` on a split."""
        config, split, totals = self.config, self.data[role], self.state.totals
        result = self.scored.get(step) if role == "dev" else None
        if result is None:
            started = time.perf_counter()
            batch_size = config.per_device_eval_batch_size
            check = partial(self.preemption.check, "evaluation")
            result = evaluate(self.model, split, self.world, batch_size, config.bf16, check)
            self.model.train()
            totals.eval_seconds += time.perf_counter() - started
            totals.evaluated += len(split)
        if role == "dev":
            self.scored[step] = result
        place = {"step": step, "epoch": step / self.sampler.steps_per_epoch, "split": split.name}
        self.output.journal.log_evaluation(place | result.scores)
        return result

    def keep_if_best(self, scores: dict[str, Any]) -> None:
        """Notes the best value so far, and saves its model if the run shall end with it; counts those that are not.

        As in transformers, any better value is the best one, and one that is better by more than the threshold ends the
        waiting.
        """
        config, best = self.config, self.state.best
        value = goodness(scores, config.best_metric)
        better = best is None or value > best[0] + config.early_stopping_threshold
        self.state.waited = 0 if better else self.state.waited + 1
        if best is None or value > best[0]:
            self.state.best = value, self.state.step
            if self.keeps_best:
                self.save_model()

    @property
    def best_step(self) -> int | None:
        """Of the best evaluation."""
        return self.state.best[1] if self.state.best else None

    def say_stopped(self) -> None:
        config, step, planned = self.config, self.state.step, self.sampler.num_steps
        self.output.journal.end_at(step)
        by = f" by more than {config.early_stopping_threshold:g}" if config.early_stopping_threshold else ""
        if self.world.is_main:
            log.info(f"stopped early at step {step} of {planned}: {self.state.waited} evaluation(s) with no better "
                     f"{config.best_metric}{by}; the best is that of step {self.best_step}")  # fmt: skip

    def save_model(self) -> None:
        weights = self.model.with_frozen_rows(self.backend.full_weights(self.model.model))
        if self.world.is_main:
            self.model.save(weights, self.output.model)
        self.world.barrier()

"""The training loop, and what it keeps while it runs.

Sources of the method: AdamW with linear warmup and decay on sentence pairs as in Devlin et al. 2019; the
hyperparameters' meaning as in transformers' TrainingArguments.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from filelock import FileLock
from torch.nn.functional import cross_entropy

from trainer.backends import Single
from trainer.backends.optim import learning_rate
from trainer.config import Config, Preempted, TrainingFailed, UserError, num_forwards
from trainer.data.sampler import GlobalBatchSampler, Step, deal
from trainer.data.sources import Pairs, Role, split_name
from trainer.data.tokens import Tokens
from trainer.evaluate import Evaluation, evaluate
from trainer.model.batch import IGNORED
from trainer.model.cross_encoder import CrossEncoder, save_trained
from trainer.model.dropout import hash_key
from trainer.model.precision import autocast, products
from trainer.ranks import World
from trainer.run import folder as run
from trainer.run.checkpoint import Checkpoint, Checkpoints
from trainer.run.energy import Meter, write_csv
from trainer.run.folder import Journal
from trainer.run.preempt import Preemption


@dataclass
class Window:
    """What has happened since the last log line; what is on the device stays there until it is logged."""

    loss: torch.Tensor
    nonfinite: torch.Tensor  # (2,) first step + 1 whose own loss, or whose gradient norm, was not finite; 0 = none
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def new(cls, device: torch.device) -> Window:
        return cls(torch.zeros((), device=device), torch.zeros(2, dtype=torch.int64, device=device))

    def add(self, step: int, loss: torch.Tensor, norm: torch.Tensor, samples: int, tokens: int) -> None:
        self.loss += loss
        bad = ~torch.isfinite(torch.stack([loss, norm.to(loss.device)]))
        self.nonfinite = torch.where((self.nonfinite == 0) & bad, step + 1, self.nonfinite)
        self.steps, self.samples, self.tokens = self.steps + 1, self.samples + samples, self.tokens + tokens

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is not training does not count as its time."""
        paused = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused


@dataclass
class Totals:
    """Of the whole run so far; seconds do not overlap."""

    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    evaluated: int = 0
    interruptions: int = 0
    skipped_steps: int = 0
    energy: list[dict[str, Any]] = field(default_factory=list)  # a row a node and stretch of the run, those before


@dataclass(kw_only=True)
class Trainer:
    """A run under way: what the loop needs, and how far it is."""

    config: Config
    world: World
    folder: Path
    journal: Journal
    meter: Meter
    about: dict[str, Any]  # for about.json
    splits: dict[Role, Pairs]
    tokens: dict[Role, Tokens]
    sampler: GlobalBatchSampler
    model: CrossEncoder
    tokenizer: Any
    max_length: int
    backend: Single
    micro_batch_size: int
    preemption: Preemption
    checkpoints: Checkpoints
    start: Checkpoint | None  # where to go on from; on rank 0 alone
    lock: FileLock | None
    state: dict[str, Any] | None  # of `start`, on every rank
    forward: Any  # the model as the backend calls it
    window: Window = field(init=False)
    totals: Totals = field(default_factory=Totals)
    best: tuple[float, int] | None = None  # value of metric_for_best_model, higher is better, and the step that had it
    saved_step: int = -1
    pending_evaluation: bool = False

    def loop(self) -> None:
        """Every optimizer step that is left, with its logging, evaluations and checkpoints."""
        config, device = self.config, self.world.device
        lengths = self.tokens["train"].lengths
        self.window = Window.new(device)
        self.restore()
        if config.eval_on_start and self.state is None:
            with self.window.pause():
                self.evaluate("dev", step=0)
        self.model.train()
        for current in self.sampler:
            rate = learning_rate(current.step, self.sampler.num_steps, config)
            seed_torch(config.seed, current.step, self.world.rank)
            loss = torch.zeros((), device=device)
            shares = self.shares(current)
            for rows in shares:
                loss += self.backward(current, rows, last=rows is shares[-1])
            norm = self.backend.step(rate, config.max_grad_norm)
            if not self.skipped(current.step, norm):
                self.window.add(current.step, loss, norm, len(current.rows), int(lengths[current.rows].sum()))
            self.journal.bar.update()
            done = current.step + 1
            if done % config.logging_steps == 0 or done == self.sampler.num_steps:
                self.log(done, norm, rate)
            if self.due(config.eval_strategy, config.eval_steps, done, last=config.load_best_model_at_end):
                self.evaluate_and_keep_best(done)
            if self.due(config.save_strategy, config.save_steps, done, last=True):
                self.save()
            self.preemption.check()

    def restore(self) -> None:
        """Goes on where the checkpoint was written: weights, moments, position, and what had been counted."""
        if self.state is None:
            return
        state = self.state
        if state.get("rest") != self.rest:
            raise UserError("the checkpoint cannot be gone on with here: its run set other rows of the embedding table "
                            "aside; give the same model_name_or_path, init, seed and weight_decay")  # fmt: skip
        self.backend.load_state(self.start.tensors if self.start else {}, state["num_updates"])
        self.start = None  # its tensors are as large as the model's state
        self.totals, self.saved_step = Totals(**state["totals"]), self.sampler.step
        # Another run's best model is not here; the best of this one begins anew.
        best = state["best"] if self.world.broadcast((self.folder / "model").exists()) else None
        self.best = best and (best[0], best[1])
        self.totals.interruptions += 1
        window = state["window"]
        self.window.loss += window["loss"] if self.world.is_main else 0.0
        self.window.steps, self.window.samples, self.window.tokens = (window[k] for k in ("steps", "samples", "tokens"))
        self.window.started -= window["seconds"]
        if state["pending_evaluation"]:
            self.evaluate_and_keep_best(self.sampler.step)

    def save(self) -> None:
        """Begins to write a checkpoint of everything that the run needs to go on exactly."""
        if self.saved_step == self.sampler.step:
            return
        self.refuse_nonfinite()
        window = self.window
        state = {
            "sampler": self.sampler.state_dict(),
            "data": {role: tokens.fingerprint for role, tokens in self.tokens.items()},
            "rest": self.rest,
            "num_updates": self.sampler.step - self.totals.skipped_steps,
            "totals": dataclasses.asdict(self.totals) | {"energy": self.energy()},
            "best": self.best,
            "window": {
                "loss": float(self.world.sum(window.loss.clone())),
                "steps": window.steps,
                "samples": window.samples,
                "tokens": window.tokens,
                "seconds": time.perf_counter() - window.started,
            },
            "pending_evaluation": self.pending_evaluation,
            "num_events": self.journal.num_events,
            "world_size": self.world.size,
            "backend": self.backend.name,
            "versions": run.versions(),
        }
        tensors = self.backend.save_state()
        if self.world.is_main:
            self.checkpoints.save(self.sampler.step, tensors, state)
        self.saved_step = self.sampler.step

    @cached_property
    def rest(self) -> str | None:
        """Fingerprint of the embedding rows that are no parameters, and so in no checkpoint."""
        return self.model.vocabulary[1].fingerprint() if self.model.vocabulary else None

    def energy(self) -> list[dict[str, Any]]:
        """The rows of all stretches, this one up to now, on rank 0; also in emissions.csv. Every rank takes part."""
        rows = self.totals.energy + self.meter.rows()
        if self.world.is_main and rows:
            try:
                write_csv(self.folder / "emissions.csv", rows)
            except OSError as error:  # the rows are in the checkpoint
                self.say(f"warning: emissions.csv cannot be written: {error.strerror}")
        return rows

    def leave(self) -> NoReturn:
        """Saves on request. Raises Preempted with what to tell the user."""
        where = "before the first step"
        if self.sampler.step > 0:
            self.save()
            self.checkpoints.wait()
            where = f"at step {self.sampler.step}"
        self.world.barrier()
        cause = self.preemption.requested or "another rank"
        same = "the same command again"
        if self.config.output_dir is None:
            same = f"the same command with --output_dir {self.folder}"
        raise Preempted(f"stopped {where} by {cause}; start {same} to go on" if self.world.is_main else "")

    def due(self, strategy: str, every: int, done: int, last: bool) -> bool:
        """Whether something that happens every so often, and maybe at the last step, happens after step `done`."""
        if strategy == "no":
            return False
        if done == self.sampler.num_steps:
            return last
        return done % (every if strategy == "steps" else self.sampler.steps_per_epoch) == 0

    def skipped(self, step: int, norm: torch.Tensor) -> bool:
        """Whether the step was left out for its gradient, as skip_nonfinite allows. Raises TrainingFailed."""
        if self.config.skip_nonfinite == 0 or math.isfinite(float(norm)):
            return False
        self.totals.skipped_steps += 1
        if self.totals.skipped_steps > self.config.skip_nonfinite:
            raise TrainingFailed(
                f"step {step + 1}: gradient norm {float(norm)}, and {self.config.skip_nonfinite} such steps were "
                "skipped before; lower --learning_rate"
            )
        self.say(f"warning: step {step + 1} is skipped: its gradient norm is {float(norm)}")
        return True

    def refuse_nonfinite(self) -> None:
        """Raises TrainingFailed, on every rank, where a loss or gradient norm was not finite since the last log."""
        found = torch.zeros(self.world.size, 2, dtype=torch.int64)
        found[self.world.rank] = self.window.nonfinite.cpu()
        found = self.world.sum(found)
        if not found.any():
            return
        step = int(found[found > 0].min()) - 1
        ranks = [rank for rank in range(self.world.size) if found[rank, 0] == step + 1]
        pairs = self.splits["train"]
        rows = self.sampler.at(step).rows
        if ranks:
            rows = np.concatenate([np.concatenate(self.shares(self.sampler.at(step), rank)) for rank in ranks])
        shown = ", ".join(map(str, np.sort(pairs.row[rows])[:16])) + (", ..." if len(rows) > 16 else "")
        what = f"loss on rank {', '.join(map(str, ranks))}" if ranks else "gradient norm"
        raise TrainingFailed(
            f"step {step + 1}: the {what} is not finite; the pairs are rows {shown} of {pairs.name}, and their tokens "
            f"are sound. Lower --learning_rate, or look for damaged weights in {self.config.model_name_or_path}; "
            "the checkpoints are of earlier steps"
        )

    def evaluate_and_keep_best(self, done: int) -> None:
        """While it lasts, a checkpoint says that it is still to be done."""
        with self.window.pause():
            self.pending_evaluation = True
            self.keep_if_best(self.evaluate("dev", step=done).scores, done)
            self.pending_evaluation = False

    def say(self, text: str) -> None:
        if self.world.is_main:
            run.say(text)

    def shares(self, current: Step, rank: int | None = None) -> list[np.ndarray]:
        """The rows of each of a rank's micro-batches, this one's unless said; an empty one still takes part."""
        rank = self.world.rank if rank is None else rank
        lengths = self.tokens["train"].lengths[current.rows]
        count = num_forwards(self.micro_batch_size, len(current.rows), self.world.size)
        parts = deal(lengths, self.world.size * count)
        return [current.rows[part] for part in parts[rank * count :][:count]]

    def backward(self, current: Step, rows: np.ndarray, last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch. Returns its part of the step's loss, on the device."""
        config, device = self.config, self.world.device
        tokens, labels = self.tokens["train"], self.splits["train"].label
        batch = self.model.batch(tokens, labels, rows, device, seed=config.seed, step=current.step)
        with products(device, config.bf16), self.backend.accumulate(last):
            with autocast(device, config.bf16):
                logits = self.forward(batch)
            # A sum over this share divided by the global count: any split gives the same gradient.
            loss = cross_entropy(
                logits.float(),
                batch.labels,
                reduction="sum",
                ignore_index=IGNORED,
                label_smoothing=config.label_smoothing_factor,
            ) / len(current.rows)
            self.backend.backward(loss)
        return loss.detach()

    def log(self, done: int, norm: torch.Tensor, rate: float) -> None:
        """Waits for the device, as only this and a checkpoint do in the loop, and begins a new window."""
        window = self.window
        self.refuse_nonfinite()
        loss = float(self.world.sum(window.loss)) / max(1, window.steps)
        seconds = time.perf_counter() - window.started
        self.totals.train_seconds += seconds
        self.totals.samples += window.samples
        self.totals.tokens += window.tokens
        self.journal.train(
            {
                "step": done,
                "epoch": done / self.sampler.steps_per_epoch,
                "loss": loss,
                "grad_norm": float(norm) if math.isfinite(float(norm)) else None,  # None: that step was skipped
                "learning_rate": rate,
                "samples_per_second": window.samples / seconds,
                "tokens_per_second": window.tokens / seconds,
            }
        )
        self.window = Window.new(self.world.device)

    def evaluate(self, role: Role, step: int) -> Evaluation:
        started = time.perf_counter()
        result = evaluate(
            self.model,
            self.splits[role],
            self.tokens[role],
            self.world,
            self.config.per_device_eval_batch_size,
            self.config.bf16,
            self.preemption.check,
        )
        self.model.train()
        self.totals.eval_seconds += time.perf_counter() - started
        self.totals.evaluated += len(self.splits[role])
        if not math.isfinite(result.scores["loss"]):
            raise TrainingFailed(
                f"the model's loss on {self.splits[role].name} is {result.scores['loss']} at step {step}"
            )
        place = {"step": step, "epoch": step / self.sampler.steps_per_epoch, "split": split_name(self.config, role)}
        self.journal.eval(place | result.scores)
        return result

    def keep_if_best(self, scores: dict[str, Any], done: int) -> None:
        """Saves the model when it is the best so far, if the best is what the run shall end with."""
        name = self.config.metric_for_best_model
        value = -scores[name] if name == "loss" else scores[name]
        if self.config.load_best_model_at_end and (self.best is None or value > self.best[0]):
            self.best = value, done
            self.save_model()

    def save_model(self) -> None:
        weights = self.model.whole(self.backend.full_weights(self.model.model))
        if self.world.is_main:
            save_trained(self.model.model, weights, self.tokenizer, self.max_length, self.folder / "model")
        self.world.barrier()


def seed_torch(seed: int, step: int, rank: int) -> None:
    """torch's own random stream, for what does not draw by sample: a function of (seed, step, rank)."""
    torch.manual_seed(int(hash_key(seed, step, rank)) >> 1)

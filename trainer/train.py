"""The training run: set up, loop, finish.

Sources of the method: AdamW with linear warmup and decay on sentence pairs as in Devlin et al. 2019; the
hyperparameters' meaning as in transformers' TrainingArguments.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from trainer import dist, run
from trainer.backends import Single, make_backend
from trainer.batch import IGNORED
from trainer.config import METRICS, Config, TrainingFailed, UserError, global_batch_size, num_forwards, total_steps
from trainer.data import Pairs, Role, load_splits, split_name
from trainer.dist import World
from trainer.dropout import hash_key
from trainer.evaluate import Evaluation, evaluate, write_predictions
from trainer.model import CrossEncoder, compile_layers, load_for_training, longest_input, save_trained
from trainer.optim import learning_rate
from trainer.precision import allow_tf32, autocast, check_bf16, products
from trainer.run import Journal
from trainer.sampler import GlobalBatchSampler, Step, deal
from trainer.tokens import Tokens, cache_folder, tokenize


@dataclass
class Window:
    """What has happened since the last log line; the loss stays on the device until it is logged."""

    loss: torch.Tensor
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, samples: int, tokens: int) -> None:
        self.steps, self.samples, self.tokens = self.steps + 1, self.samples + samples, self.tokens + tokens


@dataclass
class Totals:
    """Of the whole run so far; seconds do not overlap."""

    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    evaluated: int = 0


@dataclass
class Trainer:
    """A run under way: what the loop needs, and how far it is."""

    config: Config
    world: World
    folder: Path
    journal: Journal
    splits: dict[Role, Pairs]
    tokens: dict[Role, Tokens]
    sampler: GlobalBatchSampler
    model: CrossEncoder
    tokenizer: Any
    max_length: int
    backend: Single
    micro_batch_size: int
    forward: Any = None
    totals: Totals = field(default_factory=Totals)
    best: float | None = None

    def loop(self) -> None:
        """Every optimizer step that is left, with its logging and evaluations."""
        config, world = self.config, self.world
        lengths = self.tokens["train"].lengths
        self.forward = self.backend.prepare(self.model)
        self.fit_micro_batches()
        if config.eval_on_start:
            self.evaluate("dev", step=self.sampler.step)
        window = Window(torch.zeros((), device=world.device))
        for current in self.sampler:
            rate = learning_rate(current.step, self.sampler.num_steps, config)
            self.model.train()
            seed_torch(config.seed, current.step, world.rank)
            shares = self.shares(current)
            for rows in shares:
                window.loss += self.backward(current, rows, last=rows is shares[-1])
            norm = self.backend.step(rate, config.max_grad_norm)
            window.add(len(current.rows), int(lengths[current.rows].sum()))
            self.journal.bar.update()
            done = current.step + 1
            if done % config.logging_steps == 0 or done == self.sampler.num_steps:
                self.log(window, done, norm, rate)
                window = Window(torch.zeros((), device=world.device))
            if self.evaluation_due(done):
                started = time.perf_counter()
                self.keep_if_best(self.evaluate("dev", step=done).scores)
                window.started += time.perf_counter() - started

    def shares(self, current: Step) -> list[np.ndarray]:
        """The rows of each of this rank's micro-batches; an empty one still takes part."""
        lengths = self.tokens["train"].lengths[current.rows]
        count = num_forwards(self.micro_batch_size, len(current.rows), self.world.size)
        parts = deal(lengths, self.world.size * count)
        return [current.rows[part] for part in parts[self.world.rank * count :][:count]]

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

    def fit_micro_batches(self) -> None:
        """Halves the micro-batch until the heaviest one of the run fits into the GPU's memory, on every rank.

        The order of the samples is known beforehand, so this can be tried before the first step. A step is then
        computed in more forwards: the same mathematics.
        """
        if self.world.device.type != "cuda" or not self.backend.replicated:
            return
        heaviest = self.sampler.heaviest(self.tokens["train"].lengths)
        while not self.world.all(self.fits(heaviest)):
            if self.micro_batch_size == 1:
                raise TrainingFailed("a single pair does not fit into the GPU's memory; lower --max_length, or set "
                                     "--gradient_checkpointing true")  # fmt: skip
            self.micro_batch_size = -(-self.micro_batch_size // 2)
            if self.world.is_main:
                run.say(f"the GPU's memory is too small; going on with {self.micro_batch_size} pairs a forward, "
                        "the same mathematics")  # fmt: skip

    def fits(self, step: Step) -> bool:
        """Whether this rank has the memory for `step`'s largest micro-batch, beside the optimizer's state."""
        self.model.train()
        rows = max(self.shares(step), key=lambda rows: self.tokens["train"].lengths[rows].sum())
        try:
            reserved = [torch.empty_like(p) for p in self.model.parameters() for moment in range(2)]
            self.backward(step, rows, last=False)
            del reserved
        except torch.OutOfMemoryError:
            return False
        finally:
            self.model.zero_grad()
            torch.cuda.empty_cache()
        return True

    def log(self, window: Window, done: int, norm: torch.Tensor, rate: float) -> None:
        """The only place of the loop that waits for the device."""
        loss = float(self.world.sum(window.loss)) / window.steps
        seconds = time.perf_counter() - window.started
        self.totals.train_seconds += seconds
        self.totals.samples += window.samples
        self.totals.tokens += window.tokens
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            raise TrainingFailed(
                f"loss {loss}, gradient norm {float(norm)} in step {done} or the {window.steps - 1} before it; lower "
                f"--learning_rate, or look for damaged weights in {self.config.model_name_or_path}"
            )
        self.journal.train(
            {
                "step": done,
                "epoch": done / self.sampler.steps_per_epoch,
                "loss": loss,
                "grad_norm": float(norm),
                "learning_rate": rate,
                "samples_per_second": window.samples / seconds,
                "tokens_per_second": window.tokens / seconds,
            }
        )

    def evaluation_due(self, done: int) -> bool:
        strategy, per_epoch = self.config.eval_strategy, self.sampler.steps_per_epoch
        if "dev" not in self.splits or strategy == "no":
            return False
        # The last step's evaluation is the final one, unless the best model is yet to be chosen.
        if done == self.sampler.num_steps:
            return self.config.load_best_model_at_end
        return done % (self.config.eval_steps if strategy == "steps" else per_epoch) == 0

    def evaluate(self, role: Role, step: int) -> Evaluation:
        started = time.perf_counter()
        result = evaluate(
            self.model,
            self.splits[role],
            self.tokens[role],
            self.world,
            self.config.per_device_eval_batch_size,
            self.config.bf16,
        )
        self.totals.eval_seconds += time.perf_counter() - started
        self.totals.evaluated += len(self.splits[role])
        if not math.isfinite(result.scores["loss"]):
            raise TrainingFailed(
                f"the model's loss on {self.splits[role].name} is {result.scores['loss']} at step {step}"
            )
        place = {"step": step, "epoch": step / self.sampler.steps_per_epoch, "split": split_name(self.config, role)}
        self.journal.eval(place | result.scores)
        return result

    def keep_if_best(self, scores: dict[str, Any]) -> None:
        """Saves the model when it is the best so far, if the best is what the run shall end with."""
        name = self.config.metric_for_best_model
        value = -scores[name] if name == "loss" else scores[name]
        if self.config.load_best_model_at_end and (self.best is None or value > self.best):
            self.best = value
            self.save_model()

    def save_model(self) -> None:
        weights = self.backend.full_weights(self.model.model)
        if self.world.is_main:
            save_trained(self.model.model, weights, self.tokenizer, self.max_length, self.folder / "model")
        self.world.barrier()

    def finish(self) -> dict[str, Any]:
        """The model, the final scores and predictions, results.json."""
        if self.config.load_best_model_at_end:
            from safetensors.torch import load_file

            best = load_file(self.folder / "model" / "model.safetensors") if self.world.is_main else {}
            self.backend.load_weights(self.model.model, best)
        else:
            self.save_model()
        metrics = {}
        for role in ("dev", "test"):
            if role in self.splits:
                result = self.evaluate(role, step=self.sampler.num_steps)
                metrics[split_name(self.config, role)] = result.scores
                if result.logits is not None:
                    path = self.folder / "predictions" / f"{split_name(self.config, role)}.parquet"
                    write_predictions(path, self.splits[role], result.logits)
        results = self.results(metrics)
        if self.world.is_main:
            run.write_json(self.folder / "results.json", results)
        return results

    def results(self, metrics: dict[str, Any]) -> dict[str, Any]:
        totals = self.totals
        return {
            "metrics": metrics,
            "train": {
                "seconds": totals.train_seconds,
                "samples_per_second": totals.samples / totals.train_seconds,
                "tokens_per_second": totals.tokens / totals.train_seconds,
                "steps": self.sampler.num_steps,
                "epochs": self.sampler.num_steps / self.sampler.steps_per_epoch,
            },
            "eval": {
                "seconds": totals.eval_seconds,
                "samples_per_second": totals.evaluated / totals.eval_seconds if totals.evaluated else None,
            },
            "world_size": self.world.size,
            "backend": self.backend.name,
            "versions": run.versions(),
            "git": run.git_state(),
        }


def seed_torch(seed: int, step: int, rank: int) -> None:
    """torch's own random stream, for what does not draw by sample: a function of (seed, step, rank)."""
    torch.manual_seed(int(hash_key(seed, step, rank)) >> 1)


def prepare(config: Config, world: World) -> Trainer:
    """Reads and checks everything that the run needs, before its first step. Raises UserError."""
    say = run.say if world.is_main else lambda text: None
    backend = make_backend(config, world)
    folder = Path(world.broadcast(str(run.folder_of(config)) if world.is_main else None))
    allow_tf32(config.tf32)
    if config.bf16 and (warning := check_bf16(world.device)):
        say(f"warning: {warning}")
    splits = load_splits(config)
    if "dev" not in splits and (config.eval_on_start or config.load_best_model_at_end):
        raise UserError("eval_on_start and load_best_model_at_end need a dev split: give --validation_file FILE")
    label_names = splits["train"].label_names
    model, tokenizer = load_for_training(config, label_names, config.seed)
    max_length = longest_input(model, tokenizer, config.max_length)
    tokens = {}
    for role, pairs in splits.items():
        tokens[role] = tokenize(pairs, tokenizer, max_length, cache_folder(), say, progress=world.is_main)
        say(describe(pairs, tokens[role], max_length))
    cross_encoder = CrossEncoder(model, config.attn_implementation, config.unpad).to(world.device)
    if cross_encoder.note:
        say(cross_encoder.note)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.torch_compile:
        compile_layers(cross_encoder)
    batch_size = global_batch_size(config, world.size)
    num_steps = total_steps(config, len(splits["train"]), batch_size)
    seed = config.seed if config.data_seed is None else config.data_seed
    sampler = GlobalBatchSampler(len(splits["train"]), batch_size, seed, num_steps, tokens["train"].fingerprint)
    if world.is_main:
        run.claim(folder, config)
    journal = Journal(folder if world.is_main else None, num_steps)
    num_parameters = sum(p.numel() for p in model.parameters())
    say(
        f"{num_parameters:,} parameters on {world.device.type}, {world.size} rank(s), backend {backend.name}; "
        f"{num_steps} steps of {batch_size} pairs; writing {folder}"
    )
    return Trainer(
        config,
        world,
        folder,
        journal,
        splits,
        tokens,
        sampler,
        cross_encoder,
        tokenizer,
        max_length,
        backend,
        config.per_device_train_batch_size,
    )


def describe(pairs: Pairs, tokens: Tokens, max_length: int) -> str:
    """One line on a split: its size, and every pair that was dropped or cut."""
    parts = [f"{pairs.name}: {len(pairs):,} pairs, {tokens.lengths.mean():.1f} tokens each"]
    names = pairs.label_names
    parts.append(f"{len(names)} classes: " + "/".join(names[:5]) + ("/..." if len(names) > 5 else ""))
    if pairs.num_dropped:
        parts.append(f"{pairs.num_dropped:,} more dropped (no consensus label)")
    if num_cut := int(tokens.truncated.sum()):
        parts.append(f"{num_cut:,} cut to {max_length} tokens")
    return f"{', '.join(parts)} ({tokens.bytes_per_pair:.0f} bytes a pair)"


def train(config: Config) -> dict[str, Any]:
    """The whole run on this rank. Returns what results.json holds."""
    world = dist.start(config.ddp_timeout)
    trainer = prepare(config, world)
    try:
        trainer.loop()
        results = trainer.finish()
    except torch.OutOfMemoryError:
        raise TrainingFailed(
            f"the GPU's memory is used up by {trainer.micro_batch_size} pairs a forward; lower "
            "--per_device_train_batch_size, which does not change the run"
        ) from None
    trainer.backend.close()
    trainer.journal.close()
    if world.is_main:
        for split, scores in results["metrics"].items():
            run.say(f"{split}: " + ", ".join(f"{name} {scores[name]:.4f}" for name in METRICS))
        run.say(f"model: {trainer.folder / 'model'}")
    return results

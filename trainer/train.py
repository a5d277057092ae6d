"""A training run from end to end: read and check everything, train, leave the model and its scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from trainer import ranks
from trainer.backends import make_backend
from trainer.config import (
    METRICS,
    Config,
    Preempted,
    TrainingFailed,
    UserError,
    global_batch_size,
    total_steps,
)
from trainer.data.sampler import GlobalBatchSampler, Step
from trainer.data.sources import Pairs, Role, load_splits, split_name
from trainer.data.tokens import Tokens, cache_folder, tokenize
from trainer.evaluate import Evaluation, evaluate, write_predictions
from trainer.files import write_json
from trainer.loop import Trainer
from trainer.model.cross_encoder import CrossEncoder, compile_layers, load_for_training, longest_input
from trainer.model.precision import allow_tf32, check_bf16
from trainer.ranks import World
from trainer.run import energy
from trainer.run import folder as run
from trainer.run.about import about, example_scores
from trainer.run.checkpoint import Checkpoint, Checkpoints, cannot_write, load_given
from trainer.run.energy import Meter
from trainer.run.folder import Journal
from trainer.run.preempt import Preemption
from trainer.run.trackers import start_trackers


def prepare(config: Config, world: World, preemption: Preemption | None = None) -> Trainer:
    """Reads and checks everything that the run needs, before its first step. Raises UserError."""
    say = run.say if world.is_main else lambda text: None
    preemption = preemption or Preemption(world, [])
    backend = make_backend(config, world)
    opened, resuming = run.open_run(config) if world.is_main else (None, None)
    name, resuming = world.broadcast([str(opened), resuming])
    folder = Path(name)
    allow_tf32(config.tf32)
    if config.bf16 and (warning := check_bf16(world.device)):
        say(f"warning: {warning}")
    splits = load_splits(config)
    if "dev" not in splits and (config.eval_on_start or config.load_best_model_at_end):
        raise UserError("eval_on_start and load_best_model_at_end need a dev split: give --validation_file FILE")
    model, tokenizer = load_for_training(config, splits["train"].label_names, config.seed)
    max_length = longest_input(model, tokenizer, config.max_length)
    meter = Meter(config, world, say)  # from here on it is work, not looking for mistakes
    tokens = {
        role: tokenize(pairs, tokenizer, max_length, cache_folder(), say, world.is_main, preemption.check_alone)
        for role, pairs in splits.items()
    }
    for role, pairs in splits.items():
        say(describe(pairs, tokens[role], max_length))
        if int(tokens[role].ids.max()) >= model.config.vocab_size:
            raise UserError(f"the tokenizer has more tokens than the model's {model.config.vocab_size}; they do not "
                            "belong together")  # fmt: skip
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
    checkpoints = Checkpoints(folder / "checkpoints", config.save_total_limit)
    start, lock = None, None
    if world.is_main:
        lock = run.claim(folder, config)
        checkpoints.clear_remains()
        start = find_start(config, checkpoints, resuming, say)
    state = world.broadcast(start.state if start else None)
    if state is not None:
        sampler.load_state_dict(state["sampler"])
        for role, fingerprint in state.get("data", {}).items():
            if role in tokens and tokens[role].fingerprint != fingerprint:
                raise UserError(f"{splits[role].name} is not the {role} data with which the run began")
    if world.is_main and resuming:
        own = start is not None and start.path.parent == checkpoints.folder
        run.rewind(folder / "metrics.jsonl", state if own else None)
    trackers = start_trackers(config, folder, sampler.step, say) if world.is_main else []
    journal = Journal(folder if world.is_main else None, num_steps, sampler.step, trackers)
    described = about(config, splits, tokens, batch_size, model, max_length, world) | {"backend": backend.name}
    num_parameters = sum(p.numel() for p in model.parameters())
    say(
        f"{num_parameters:,} parameters on {world.device.type}, {world.size} rank(s), backend {backend.name}; "
        f"{num_steps} steps of {batch_size} pairs; writing {folder}"
    )
    if config.weight_decay == 0:
        cross_encoder.set_unused_rows_aside(tokens["train"])
        if cross_encoder.vocabulary:
            _, table = cross_encoder.vocabulary
            say(f"{len(table.rest):,} of {len(table.place):,} tokens are in no training pair: they keep their vectors")
    if start:
        say(f"going on at step {sampler.step} from {start.path}")
    return Trainer(
        config=config,
        world=world,
        folder=folder,
        journal=journal,
        meter=meter,
        about=described,
        splits=splits,
        tokens=tokens,
        sampler=sampler,
        tokenizer=tokenizer,
        max_length=max_length,
        backend=backend,
        preemption=preemption,
        checkpoints=checkpoints,
        start=start,
        lock=lock,
        state=state,
        model=cross_encoder,
        forward=backend.prepare(cross_encoder),
        micro_batch_size=config.per_device_train_batch_size,
    )


def find_start(
    config: Config, checkpoints: Checkpoints, resuming: bool, say: Callable[[str], None]
) -> Checkpoint | None:
    """The checkpoint to go on from: the newest whole one of an unfinished run, else the one that the user names."""
    newest = checkpoints.newest(say) if resuming else None
    if newest is None and config.resume_from_checkpoint not in ("auto", "none"):
        return load_given(Path(config.resume_from_checkpoint).expanduser())
    if newest is None and resuming:
        say(f"the run in {checkpoints.folder.parent} has no checkpoint yet: it starts anew")
    return newest


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


def fit_micro_batches(trainer: Trainer) -> None:
    """Halves the micro-batch until the heaviest one of the run fits into the GPU's memory, on every rank.

    The order of the samples is known beforehand, so this can be tried before the first step. A step is then
    computed in more forwards: the same mathematics.
    """
    if not trainer.backend.replicated:
        return
    heaviest = trainer.sampler.heaviest(trainer.tokens["train"].lengths)
    longest = trainer.sampler.longest(trainer.tokens["train"].lengths)
    while not trainer.world.all(fits(trainer, heaviest) and fits(trainer, longest)):
        if trainer.micro_batch_size == 1:
            raise TrainingFailed("a single pair does not fit into the GPU's memory; lower --max_length, or set "
                                 "--gradient_checkpointing true")  # fmt: skip
        trainer.micro_batch_size = -(-trainer.micro_batch_size // 2)
        trainer.say(f"the GPU's memory is too small; going on with {trainer.micro_batch_size} pairs a forward, "
                 "the same mathematics")  # fmt: skip


def fits(trainer: Trainer, step: Step) -> bool:
    """Whether this rank has the memory for `step`'s largest micro-batch, beside the optimizer's state."""
    trainer.model.train()
    rows = max(trainer.shares(step), key=lambda rows: trainer.tokens["train"].lengths[rows].sum())
    try:
        reserved = [torch.empty_like(p) for p in trainer.model.parameters() for moment in range(2)]
        trainer.backward(step, rows, last=False)
        del reserved
    except torch.OutOfMemoryError:
        return False
    finally:
        trainer.model.zero_grad()
        torch.cuda.empty_cache()
    return True


def finish(trainer: Trainer) -> dict[str, Any]:
    """The model, the final scores and predictions, results.json."""
    if trainer.config.load_best_model_at_end:
        from safetensors.torch import load_file

        best = load_file(trainer.folder / "model" / "model.safetensors") if trainer.world.is_main else {}
        trainer.backend.load_weights(trainer.model.model, trainer.model.used(best))
    else:
        trainer.save_model()
    step = trainer.best[1] if trainer.best else trainer.sampler.num_steps
    if trainer.best:
        trainer.say(f"the best model is that of step {step}: its final scores")
    metrics: dict[str, Any] = {}
    examples: list[dict[str, Any]] = []
    for role in ("dev", "test"):
        if role in trainer.splits:
            result = trainer.evaluate(role, step=step)
            metrics[split_name(trainer.config, role)] = result.scores
            exact = in_fp32(trainer, role) if trainer.config.bf16 else result
            if exact is not result:
                result.scores["fp32"] = {name: exact.scores[name] for name in METRICS}
            if exact.logits is not None and not examples:
                examples = example_scores(trainer.splits[role], exact.logits)
            if result.logits is not None:
                path = trainer.folder / "predictions" / f"{split_name(trainer.config, role)}.parquet"
                write_predictions(path, trainer.splits[role], result.logits)
    summary: dict[str, Any] = trainer.world.broadcast(summarise(trainer, metrics) | {"examples": examples})
    trainer.checkpoints.wait()
    if trainer.world.is_main:
        write_json(trainer.folder / "results.json", summary)
    return summary


def in_fp32(trainer: Trainer, role: Role) -> Evaluation:
    """The same split scored without autocast, as most users of the model will run it."""
    return evaluate(
        trainer.model,
        trainer.splits[role],
        trainer.tokens[role],
        trainer.world,
        trainer.config.per_device_eval_batch_size,
        bf16=False,
        check=trainer.preemption.check,
    )


def summarise(trainer: Trainer, metrics: dict[str, Any]) -> dict[str, Any]:
    totals = trainer.totals
    return {
        "metrics": metrics,
        "train": {
            "seconds": totals.train_seconds,
            "samples_per_second": totals.samples / totals.train_seconds,
            "tokens_per_second": totals.tokens / totals.train_seconds,
            "steps": trainer.sampler.num_steps,
            "best_step": trainer.best[1] if trainer.best else None,
            "epochs": trainer.sampler.num_steps / trainer.sampler.steps_per_epoch,
            "interruptions": totals.interruptions,
            "skipped_steps": totals.skipped_steps,
        },
        "eval": {
            "seconds": totals.eval_seconds,
            "samples_per_second": totals.evaluated / totals.eval_seconds if totals.evaluated else None,
        },
        "world_size": trainer.world.size,
        "backend": trainer.backend.name,
        "energy": energy.summarise(trainer.energy(), totals.samples),
        "versions": run.versions(),
        "git": run.git_state(),
    }


def train(config: Config, report: Callable[[Path], None] | None = None) -> dict[str, Any]:
    """The whole run on this rank. Returns what results.json holds. Raises Preempted after a signal.

    `report` gets the folder of the finished run, on rank 0.
    """
    world = ranks.start(config.ddp_timeout)
    preemption = Preemption(world, config.preemption_signals)
    try:
        trainer = prepare(config, world, preemption)
        results = complete(trainer)
        if world.is_main:
            for split, scores in results["metrics"].items():
                run.say(f"{split}: " + ", ".join(f"{name} {scores[name]:.4f}" for name in METRICS))
            if report:
                report(trainer.folder)
            run.say(f"model: {trainer.folder / 'model'}")
        return results
    finally:
        preemption.close()


def complete(trainer: Trainer) -> dict[str, Any]:
    """From the first step that is left to results.json, and whatever comes in between."""
    config, world = trainer.config, trainer.world
    try:
        if world.is_main:
            write_json(trainer.folder / "about.json", trainer.about)
        if world.device.type == "cuda":
            fit_micro_batches(trainer)
        trainer.loop()
        return finish(trainer)
    except Preempted:
        trainer.leave()
    except torch.OutOfMemoryError:
        raise TrainingFailed(
            f"the GPU's memory is used up by {trainer.micro_batch_size} pairs a forward; lower "
            "--per_device_train_batch_size, which does not change the run"
        ) from None
    except (OSError, SafetensorError) as error:  # everything has been read; what is left is writing
        raise cannot_write(trainer.folder, error) from None
    except RuntimeError as error:
        if reason := ranks.explain(error, world, config.ddp_timeout):
            raise TrainingFailed(f"step {trainer.sampler.step}: {reason}") from None
        raise
    finally:
        trainer.meter.close()
        try:
            trainer.checkpoints.wait()  # a rank that fails leaves at once, but not in the middle of a checkpoint
        finally:
            trainer.journal.close()

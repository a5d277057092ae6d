"""A training run from end to end: read and check everything, train, write the model and its scores."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers.optimization  # noqa: F401 - for schedules.py; here, before other threads import anything
from safetensors import SafetensorError

from trainer import ranks
from trainer.backends import make_backend
from trainer.base.errors import Preempted, RankGone, TrainingFailed, UserError, first_line, out_of_memory
from trainer.base.fields import rule
from trainer.base.files import write_json
from trainer.base.log import log
from trainer.config import Config
from trainer.data.load import data_team, load_splits
from trainer.data.mix import Mix
from trainer.data.pairs import Pairs
from trainer.data.sampler import GlobalBatchSampler, global_batch_size, total_steps
from trainer.data.team import Team
from trainer.data.tokenize import tokenize
from trainer.data.tokens import Encoder, Split
from trainer.finish import finish
from trainer.loop import Trainer
from trainer.metrics import score_line
from trainer.model.cross_encoder import CrossEncoder, checkpoint_activations, compile_layers, model_facts
from trainer.model.loading import load_for_training
from trainer.model.precision import check_bf16, settle_products
from trainer.model.scattered import examine_on_main, fingerprint_on_main, load_scattered
from trainer.ranks import World
from trainer.run.about import about, note
from trainer.run.checkpoint import Checkpoints, cannot_write
from trainer.run.energy import Meter
from trainer.run.folder import claim, open_run, write_config
from trainer.run.journal import Journal, rewind
from trainer.run.output import Output
from trainer.run.pins import pinned, pins
from trainer.run.preempt import Preemption
from trainer.run.resume import Start, resume
from trainer.run.state import Identity, State
from trainer.run.trackers import start_trackers
from trainer.run.versions import code_hash, versions
from trainer.schedules import Schedule
from trainer.step.exact import ExactStep
from trainer.step.form import make_step
from trainer.step.loss import class_weights
from trainer.step.memory import fit_micro_batches
from trainer.step.plain import PlainStep
from trainer.together import together


def train(config: Config, report: Callable[[Path], None] | None = None) -> dict[str, Any]:
    """The run on this rank, from end to end. Returns what results.json holds. Raises Preempted after a signal.

    `report` gets the folder of the finished run, on rank 0.
    """
    world = ranks.start(config.ddp_timeout)
    preemption = Preemption(world, config.preemption_signals)
    try:
        with pinned(config, world):
            trainer = prepare(config, world, preemption)
            results = complete(trainer)
        if world.is_main:
            for split, scores in results["metrics"].items():
                log.info(f"{split}: {score_line(scores)}")
            if report:
                report(trainer.output.folder)
            log.info(f"model: {trainer.output.model}")
            log.info("transformers.pipeline cuts no pair to max_length unless it is called with truncation=True")
        return results
    finally:
        preemption.close()


def prepare(config: Config, world: World, preemption: Preemption | None = None) -> Trainer:
    """Reads and checks everything that the run needs, before its first step. Raises UserError."""
    preemption = preemption or Preemption(world, [])
    agree_on_run(config, world)
    backend = make_backend(config, world)
    opened = open_run(config, world)
    team = data_team(world, config)
    pairs = read_pairs(config, team, preemption)
    model = build_model(config, world, pairs["train"].label_names, backend.scatters)
    meter = Meter(config, world)  # from here on it is work, not looking for mistakes
    data = tokenize_splits(config, team, pairs, model, preemption)
    sampler = make_sampler(config, world, data["train"])
    schedule = Schedule(config, sampler.num_steps)
    with failures(config, world, opened.path):
        identity = freeze(config, world, model, data, sampler, pins(config, world))
    world.agree(lambda: identity.data | model_facts(model) | {"device": world.device.type} | (identity.exact or {}))
    opened, lock = claim(opened, config, world)
    checkpoints = Checkpoints(opened.path / "checkpoints", config.save_total_limit, world, config.ddp_timeout)
    with failures(config, world, opened.path):
        start = resume(config, world, opened, checkpoints, identity, {role: own.name for role, own in pairs.items()})
        forward = backend.prepare(model)
        if start.tensors is not None:
            backend.load_state(start.tensors, start.state.num_updates)
        wiring = {"backend": backend.name, "num_nodes": world.num_nodes(), "exact": identity.exact}
        described = about(config, data, sampler, model, world, wiring) if world.is_main else None
        journal = open_journal(config, opened.path, sampler.num_steps, start, described)
    own: dict[str, Any] = {"config": config, "world": world, "model": model, "backend": backend, "state": start.state}
    plain = (PlainStep if config.exact_shards is None else ExactStep)(
        **own,
        split=data["train"],
        forward=forward,
        micro_batch_size=config.per_device_train_batch_size,
        batch_size=sampler.batch_size,
    )
    return Trainer(
        **own,
        data=data,
        sampler=sampler,
        schedule=schedule,
        identity=identity,
        output=Output(opened.path, journal, checkpoints, meter, lock),
        preemption=preemption,
        plain=plain,
    )


def agree_on_run(config: Config, world: World) -> None:
    """Raises UserError where the ranks were started with other settings, or run other code."""
    shared = (own for own in dataclasses.fields(config) if rule(own).kind in ("run", "method", "upkeep"))
    world.agree(lambda: {own.name: getattr(config, own.name) for own in shared} | versions() | {"code": code_hash()})


def read_pairs(config: Config, team: Team, preemption: Preemption) -> dict[str, Pairs]:
    splits = load_splits(config, config.objective, team, preemption.check_this_rank)
    needs = [name for name in ("eval_on_start", "load_best_model_at_end", "early_stopping_patience")
             if getattr(config, name)]  # fmt: skip
    if "dev" not in splits and needs:
        verb = "needs" if len(needs) == 1 else "need"
        raise UserError(f"{' and '.join(needs)} {verb} a dev split: give --validation_file FILE")
    class_weights(config, splits["train"])  # for its errors
    if "dev" not in splits and config.eval_strategy != "no":
        log.info("no dev split: nothing is evaluated while the run trains; --validation_file FILE gives one")
    return splits


def build_model(config: Config, world: World, label_names: tuple[str, ...], scatters: bool = False) -> CrossEncoder:
    """The encoder to start from, on the device, or hollow, where the backend `scatters` it."""
    if config.step_form == "captured" and world.device.type == "cpu":
        raise UserError("step_form captured needs a CUDA device; say --step_form static, or leave it out")
    settle_products(config.tf32)
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention has no backward that repeats its bits
    if config.bf16 and (warning := check_bf16(world.device)):
        log.warning(warning)
    if scatters:
        model = load_scattered(config, world, label_names)
    else:
        model = together(world, lambda: load_for_training(config, label_names), UserError).to(world.device)
    if model.note:
        log.info(model.note)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    if config.torch_compile:
        compile_layers(model)
    return model


def tokenize_splits(
    config: Config, team: Team, pairs: dict[str, Pairs], model: CrossEncoder, preemption: Preemption
) -> dict[str, Split]:
    """Says the size of each split, and every pair that was dropped or cut."""
    encoder, check = Encoder(model.tokenizer, model.max_length), preemption.check_this_rank
    data: dict[str, Split] = {}
    for role, own in pairs.items():
        tokens = tokenize(own, encoder, team, role, config.verify_data, team.world.is_main, check)
        data[role] = Split(own.split, own, tokens)
    for split in data.values():
        log.info(split.describe(model.max_length))
        model.check(split.pairs, split.tokens)
    return data


def make_sampler(config: Config, world: World, train_split: Split) -> GlobalBatchSampler:
    batch_size, mix = global_batch_size(config, world.size), Mix.of(config.source_weights, train_split.pairs)
    num_samples = len(train_split) if mix is None else len(mix)
    if mix is not None:
        log.info(f"an epoch has {num_samples:,} pairs: {mix.describe()}")
    if batch_size > num_samples:
        log.info(f"a step has {num_samples:,} pairs, all that there are: fewer than its batch of {batch_size:,}")
    num_steps = total_steps(config, num_samples, batch_size)
    fingerprint = train_split.tokens.fingerprint
    return GlobalBatchSampler(num_samples, batch_size, config.order_seed, num_steps, fingerprint, mix)


def freeze(
    config: Config,
    world: World,
    model: CrossEncoder,
    data: dict[str, Split],
    sampler: GlobalBatchSampler,
    exact: dict[str, Any] | None,
) -> Identity:
    """Freezes what training cannot change. What the run is, is settled then."""
    examine_on_main(model, world, data["train"].tokens, config.attn_implementation is not None)
    if config.weight_decay == 0:
        model.freeze_unused_rows(data["train"].tokens)
    if model.used_rows:
        _, table = model.used_rows
        log.info(f"{len(table.frozen):,} of {len(table.place):,} tokens are in no training pair: their rows are frozen")
    fingerprints: dict[str, str] = {role: split.tokens.fingerprint for role, split in data.items()}
    return Identity(sampler, fingerprints, fingerprint_on_main(model, world), exact)


def open_journal(
    config: Config, folder: Path, num_steps: int, start: Start, described: dict[str, Any] | None
) -> Journal:
    """Says what the run is, on rank 0, and in about.json; `described` is None on other ranks."""
    step = start.state.step
    if described is None:
        return Journal(None, num_steps, step)
    log.info(
        f"{described['model']['num_parameters']:,} parameters on {described['device']}, {described['world_size']} "
        f"rank(s), backend {described['backend']}; {num_steps} steps of {described['global_batch_size']} pairs; "
        f"writing {folder}"
    )
    write_config(folder, config)
    write_json(folder / "about.json", described)
    rewind(folder, start.num_events)
    return Journal(folder, num_steps, step, start_trackers(config, folder, step))


def complete(trainer: Trainer) -> dict[str, Any]:
    """From the first step that is left to results.json, and whatever comes in between."""
    gone = False
    try:
        with failures(trainer.config, trainer.world, trainer.output.folder, trainer.state):
            try:
                settle_step(trainer)
                trainer.loop()
                trainer.settle(None)
                return finish(trainer)
            except Preempted:
                save_and_stop(trainer)
    except (RankGone, torch.distributed.DistError):  # the second of NCCL, in words that change
        gone = True
        raise
    finally:
        trainer.output.close(gone)


def settle_step(trainer: Trainer) -> None:
    """How many pairs a forward has, and how a step is taken."""
    if trainer.world.device.type == "cuda":
        fit_micro_batches(trainer.plain, trainer.sampler)
    trainer.settle(make_step(trainer.plain))
    if trainer.world.is_main:
        note(trainer.output.folder, step_form=trainer.state.step_form)


@contextmanager
def failures(config: Config, world: World, folder: Path, state: State | None = None) -> Iterator[None]:
    """Once everything has been read, what goes wrong is memory, disk or network: one clear error."""
    try:
        yield
    except TrainingFailed:  # a RuntimeError too, and clear already
        raise
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from None
    except RuntimeError as error:
        if out_of_memory(error):
            raise TrainingFailed(
                "the GPU's memory is used up; lower --per_device_train_batch_size "
                f"({config.per_device_train_batch_size}), which does not change the run"
            ) from None
        if "does not have a deterministic implementation" in str(error):
            raise TrainingFailed(f"exact_shards: {first_line(error)}; leave exact_shards out for this model") from None
        if reason := ranks.explain(error, world, config.ddp_timeout):
            raise RankGone(f"step {state.step}: {reason}" if state else reason) from None
        raise


def save_and_stop(trainer: Trainer) -> NoReturn:
    """Saves on request. Raises Preempted with what to tell the user."""
    where = "before the first step"
    if trainer.state.step > 0:
        trainer.save()
        trainer.output.checkpoints.wait()
        where = f"at step {trainer.state.step}"
    trainer.world.barrier()
    cause = trainer.preemption.requested or "another rank"
    same = "the same command again"
    if trainer.config.output_dir is None:
        same = f"the same command with --output_dir {trainer.output.folder}"
    raise Preempted(f"stopped {where} by {cause}; start {same} to resume" if trainer.world.is_main else "")

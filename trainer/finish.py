"""The end of a run: the model, its final scores and predictions, results.json."""

import hashlib
from pathlib import Path
from typing import Any

from trainer.base.files import write_json
from trainer.base.log import log
from trainer.evaluate import Evaluation, evaluate, predicted, write_predictions
from trainer.loop import Trainer
from trainer.metrics import score_names
from trainer.run import energy
from trainer.run.about import confident_errors, example_scores, now
from trainer.run.versions import git_state, versions


def finish(trainer: Trainer) -> dict[str, Any]:
    """What results.json holds, on every rank. The run is finished when that file is there."""
    output, step = trainer.output, settle_weights(trainer)
    metrics: dict[str, Any] = {}
    objective = trainer.model.objective
    examples: list[dict[str, Any]] = []
    errors: dict[str, Any] = {}
    tested = [role for role in trainer.data if role.startswith("test")] or ["dev"]
    for role, split in trainer.data.items():
        if role == "train":
            continue
        result, exact = final_scores(trainer, role, step)
        metrics[split.name] = result.scores
        if exact.logits is not None and not examples:
            examples = example_scores(split.pairs, exact.logits, objective)
        if result.logits is not None:
            scores = predicted(split.pairs, result.logits, objective)
            write_predictions(output.folder / "predictions" / f"{split.name}.parquet", split.pairs, scores)
            if role in tested:
                threshold = result.scores.get("f1_threshold")
                errors[split.name] = confident_errors(split.pairs, scores, objective, threshold)
    kept = {"examples": examples, "errors": errors, "finished_at": now()}
    summary: dict[str, Any] = trainer.world.broadcast(summarise(trainer, metrics) | kept)
    output.checkpoints.wait()
    if trainer.world.is_main:
        write_json(output.folder / "results.json", summary)
    return summary


def settle_weights(trainer: Trainer) -> int:
    """The run's final weights, in memory and in its folder. Returns the step that they are of."""
    state, best = trainer.state, trainer.best_step if trainer.keeps_best else None
    if best is None:
        trainer.save_model()
    elif best != state.step:
        # With LoRA the frozen weights are in no file that is read back.
        frozen = trainer.backend.full_weights(trainer.model.model) if trainer.model.lora else {}
        weights = frozen | trainer.model.saved_weights(trainer.output.model) if trainer.world.is_main else {}
        trainer.backend.load_weights(trainer.model.model, trainer.model.without_frozen_rows(weights))
    if best is not None:
        log.info(f"the best model is that of step {best}: its final scores")
    return state.step if best is None else best


def final_scores(trainer: Trainer, role: str, step: int) -> tuple[Evaluation, Evaluation]:
    """As trained, and without autocast, as most users of the model will run it; its scores are added as `fp32`."""
    config, result = trainer.config, trainer.evaluate(role, step)
    if not config.bf16:
        return result, result
    size, check = config.per_device_eval_batch_size, trainer.preemption.check
    exact = evaluate(trainer.model, trainer.data[role], trainer.world, size, bf16=False, check=check)
    result.scores["fp32"] = {name: exact.scores[name] for name in (*score_names(exact.scores), "loss")}
    return result, exact


def summarise(trainer: Trainer, metrics: dict[str, Any]) -> dict[str, Any]:
    state, totals = trainer.state, trainer.state.totals
    return {
        "metrics": metrics,
        "train": {
            "seconds": totals.train_seconds,
            "samples_per_second": totals.samples / totals.train_seconds,
            "tokens_per_second": totals.tokens / totals.train_seconds,
            "steps": state.step,
            "planned_steps": trainer.sampler.num_steps,
            "stopped_early_at": state.step if trainer.stopped_early else None,
            "best_step": trainer.best_step if trainer.keeps_best else None,
            "epochs": state.step / trainer.sampler.steps_per_epoch,
            "interruptions": totals.interruptions,
            "skipped_steps": totals.skipped_steps,
        },
        "eval": {
            "seconds": totals.eval_seconds,
            "samples_per_second": totals.evaluated / totals.eval_seconds if totals.evaluated else None,
        },
        "world_size": trainer.world.size,
        "backend": trainer.backend.name,
        "energy": energy.summarise(trainer.output.energy(totals.energy), totals.samples),
        "versions": versions(),
        "git": git_state(),
        "model_sha256": sha256_of_weights(trainer.output.model) if trainer.world.is_main else None,
    }


def sha256_of_weights(folder: Path) -> str:
    """Of the bytes of a model's safetensors files, one after the other: of model.safetensors, where it is the only."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()

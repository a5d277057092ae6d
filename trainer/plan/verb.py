"""`crossrank plan`: reads the data as a run does, makes the plan, and shows it."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from trainer.base.errors import UserError
from trainer.base.log import log, start_log
from trainer.config import Config
from trainer.data.load import cache_folder
from trainer.data.pairs import Pairs
from trainer.data.team import alone
from trainer.data.tokens import Split
from trainer.plan.answer import make
from trainer.plan.asked import PlanConfig, check
from trainer.plan.gauge import measure, measured_on
from trainer.plan.plan import Planner, planner
from trainer.plan.show import draw, table
from trainer.ranks import ALONE
from trainer.run.preempt import Preemption
from trainer.train import read_pairs, tokenize_splits


def show_plan(config: Config, asked: PlanConfig) -> None:
    """Prints the plan, and draws its picture. Raises UserError for a run that does not fit, with what would."""
    start_log(is_main=True)
    if asked.json:
        log.setLevel(logging.WARNING)
    picture = asked.picture
    if picture and not picture.endswith((".svg", ".png")):
        raise UserError(f"picture {picture}: its name must end with .svg or .png")
    if picture and not Path(picture).absolute().parent.is_dir():
        raise UserError(f"picture {picture}: no such folder")
    if config.backend == "single" and (ranks := asked.nodes * asked.gpus_per_node) > 1:
        raise UserError(f"backend single cannot wire {ranks} ranks; use --backend ddp")
    check(asked if asked.measure is None else dataclasses.replace(asked, device="cpu"))
    if asked.measure is not None:
        measure(config, Path(asked.measure), asked.gpus_per_node)
        asked = dataclasses.replace(asked, device=asked.measure, measure=None)
    own = prepared(config, asked)
    if (before := own.device.measured_on) not in (None, now := measured_on(config)):
        log.warning(
            f"{asked.device} was measured on {before}, and this run is {now}: the plan is a guess; measure anew"
        )
    try:
        plan = make(own)
    finally:
        own.close()
    print(json.dumps(plan, indent=1) if asked.json else table(plan))
    if picture:
        draw(plan, Path(picture))
    if not plan["memory"]["fits"]:
        raise UserError(what_lacks(own, plan))


def what_lacks(own: Planner, plan: dict[str, Any]) -> str:
    """In words, with what would fit."""
    need, limit, would = plan["memory"]["total"], plan["memory"]["limit"], list(plan["choice"]["would_fit"])
    title, ranks = own.device.title, own.asked.gpus_per_node
    said = f"a rank needs {need / 1e9:.1f} GB"
    if own.device.kind == "cpu" and ranks > 1:
        said = f"{ranks} ranks of a machine need {ranks * need / 1e9:.1f} GB"
        if fewer := int(limit // need):
            would = [f"{fewer} ranks a machine, by --gpus_per_node {fewer}"]
    return f"{said}, and {title} has {limit / 1e9:.1f} GB; what fits: {'; or '.join(would)}"


def prepared(config: Config, asked: PlanConfig) -> Planner:
    """With the real data, tokenised by the real tokenizer; of the model no weights are read."""
    pairs = read_pairs(config, alone(cache_folder()), Preemption(ALONE, []))
    names = pairs["train"].label_names
    own = planner(config, asked, names, {})
    own = dataclasses.replace(own, data=splits(config, own, pairs))
    own.settle()
    return own


def splits(config: Config, own: Planner, pairs: dict[str, Pairs]) -> dict[str, Split]:
    return tokenize_splits(config, alone(cache_folder()), pairs, own.subject.model, Preemption(ALONE, []))

"""The splits that the fields name: read once a node, and mapped by every rank.

One process of a node, or of all nodes that share the cache's file system, reads the sources and settles labels, classes
and sources. It writes what every pair is as arrays into the cache, and the other ranks map these.
"""

import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from trainer.base.errors import UserError
from trainer.base.fields import mapped
from trainer.base.folders import caches
from trainer.config import DataConfig
from trainer.data.join import Part, join
from trainer.data.keep import kept, opened
from trainer.data.mix import Mix
from trainer.data.pairs import Pairs, Spooled
from trainer.data.sources import columns_of, origins_of, spool_of
from trainer.data.stored import Check, nothing
from trainer.data.team import Team, alone, team_of
from trainer.labels.label_map import check_known
from trainer.options import Objective
from trainer.ranks import World
from trainer.rows.places import listed
from trainer.rows.splits import Role, named_sets

LONGEST_TITLE = 100  # characters of several names together


def load_splits(
    config: DataConfig, objective: Objective = "cross_entropy", team: Team | None = None, check: Check = nothing
) -> dict[str, Pairs]:
    """The train split and what there is of dev and test, with one set of classes. Raises UserError.

    Every rank of the team takes part, None = there are no others; `check` is called now and then while one reads and
    the others wait, and may raise to stop.
    """
    return _once(team, lambda: _splits(config, objective, check), check)


def load_scored(
    config: DataConfig,
    classes: Sequence[str] | None,
    of_model: bool = False,
    objective: Objective = "cross_entropy",
    team: Team | None = None,
    check: Check = nothing,
) -> dict[str, Pairs]:
    """What there is of dev and test: the test sets are "test", "test 2", "test 3" and so on. As load_splits else."""
    return _once(team, lambda: _scored(config, classes, of_model, objective, check), check)


def data_team(world: World, config: DataConfig) -> Team:
    """The ranks that share this one's cache, and read what it reads. Every rank takes part."""
    items = [config.files(role) for role in ("train", "dev", "test")]
    asked = [[os.path.realpath(item) for item in own or []] for own in items]
    return team_of(world, cache_folder(), [*asked, config.dataset_name])


def cache_folder() -> Path:
    """$CROSSRANK_CACHE, or crossrank/ in $XDG_CACHE_HOME or ~/.cache."""
    return caches(os.environ)["CROSSRANK_CACHE"]


def _once(given: Team | None, load: Callable[[], dict[str, Pairs]], check: Check) -> dict[str, Pairs]:
    """What `load` returns, called by one rank of the team; see team.py."""
    team = given or alone(cache_folder())

    def make() -> dict[str, str]:
        return {role: str(kept(own, team.folder / "pairs", check)) for role, own in load().items()}

    splits = {role: opened(Path(path)) for role, path in team.once("pairs", make, check).items()}
    for role, pairs in splits.items():
        if team.world.is_main and role != "train" and isinstance(pairs.texts, Spooled):
            pairs.texts.hold()  # the end of the run shows some of them
    return splits


def _splits(config: DataConfig, objective: Objective, check: Check) -> dict[str, Pairs]:
    found = load_pairs(config, "train", objective=objective, check=check)
    if not found:
        raise UserError("no training data: give --train_file FILE, or a --dataset_name that has a train split")
    (train,) = found
    check_known("label_map", mapped(config.label_map), train.said, train.name)
    if train.label.min() == train.label.max():
        cut = "; shuffle them, or raise max_train_samples" if train.num_available > len(train) else ""
        if train.mapped and len(train.label_names) == 1:
            cut = f"; label_map takes {train.mapped}: leave one of the classes as it is"
        raise UserError(f"{train.describe()}, all with label {train.target(0)}: there is nothing to learn{cut}")
    Mix.of(config.source_weights, train)  # a mistake there shows before anything is computed
    return {"train": train} | _scored(config, train.label_names, False, objective, check)


def _scored(
    config: DataConfig, classes: Sequence[str] | None, of_model: bool, objective: Objective, check: Check
) -> dict[str, Pairs]:
    splits: dict[str, Pairs] = {}
    for pairs in load_pairs(config, "dev", classes, of_model, objective, check):
        splits["dev"] = pairs
    for number, pairs in enumerate(load_pairs(config, "test", classes, of_model, objective, check), 1):
        splits["test" if number == 1 else f"test {number}"] = pairs
    if splits:
        check_maps(config, splits.values(), classes or (), of_model)
    return splits


def check_maps(config: DataConfig, splits: Collection[Pairs], classes: Sequence[str], of_model: bool) -> None:
    """Raises UserError where a map of scoring names what neither the model nor any of the sets knows."""
    known = [*classes, *(name for pairs in splits for name in pairs.said)]
    where = listed([pairs.name for pairs in splits])
    for field in ("label_map", "eval_label_map") if of_model else ("eval_label_map",):
        check_known(field, mapped(getattr(config, field)), known, f"{where} or the model")


def load_pairs(
    config: DataConfig,
    role: Role,
    classes: Sequence[str] | None = None,
    of_model: bool = False,
    objective: Objective = "cross_entropy",
    check: Check = nothing,
) -> list[Pairs]:
    """The role's split, or every test set; none where the data has none, or none with labels, which is said.

    `classes` are those of the training split or, with `of_model`, of a model; None = from this split.
    """
    origins, columns = origins_of(config, role, objective), columns_of(config, objective)
    sets = [[origin] for origin in origins] if role == "test" else [origins]
    made: dict[str, Pairs] = {}
    for own in sets:
        spools = [spool_of(origin, columns, role, config.verify_data, check) for origin in own]
        parts = [Part(origin.name, spool) for origin, spool in zip(own, spools, strict=True) if spool is not None]
        if not parts:
            continue
        name = split_name(_title(config, [part.source for part in parts], len(sets)), role)
        if (other := next((made[known] for known in made if known.lower() == name.lower()), None)) is not None:
            raise UserError(f"two test sets would be called {name!r}: {other.name} and {parts[0].place}; give them "
                            "names, as in NAME=PATH")  # fmt: skip
        files = tuple(file for origin in own for file in origin.files if config.has_files)
        pairs = join(parts, config, role, classes, of_model, objective)
        made[name] = replace(pairs, split=name, files=files)
    return list(made.values())


def _title(config: DataConfig, names: list[str], num_sets: int) -> str:
    """What the data of a split are called: by the data set's name, where there is one and nothing to tell apart."""
    if config.has_files and config.dataset_name and num_sets == 1:
        names = [title for title, _, _ in named_sets(config.dataset_name, None)]
    together = "+".join(names)
    return together if len(names) < 4 and len(together) <= LONGEST_TITLE else f"{names[0]}+{len(names) - 1}"


def split_name(title: str, role: Role) -> str:
    """`AllNLI-dev`, `snli-test`, ...: as reports, file names and metrics call a split."""
    if re.fullmatch(rf"(.*[^a-z])?{role}", title, re.IGNORECASE):
        return title
    return f"{'AllNLI' if title == 'all-nli' else title}-{role}"

"""Command-line parsing: dataclass fields in, a validated Config out; every mistake is one UserError.

Options are the fields of `trainer.config`, with their docstrings as help. Their values stay text until the fields take
them (base/fields.py), as those of YAML files and of Python do: one way in.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from trainer.base.environment import read_place
from trainer.base.errors import UserError, unknown
from trainer.base.fields import TRUTH, checked, default, kinds, rule
from trainer.base.log import log, start_log
from trainer.config import GROUPS, Config, DataConfig, read_yaml

RECIPES = Path(__file__).parent / "recipes"
Own = TypeVar("Own")


class Parser(argparse.ArgumentParser):
    """Raises UserError in place of leaving the program."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


LIST = "A,B"  # the value of a list


class Once(argparse.Action):
    """Of a list: the second one would take the place of the first, where who gives two means both."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if hasattr(namespace, self.dest):
            raise UserError(f"--{self.dest} is given twice; give all of it at once, as --{self.dest} {LIST.lower()}")
        setattr(namespace, self.dest, values)


def make_parser(prog: str, groups: tuple[type, ...], explained: bool = True, **kwargs: Any) -> Parser:
    """A parser whose options are the fields of `groups`, each group under its own heading.

    Without `explained` their docstrings are not read for --help, which takes longer than all else.
    """
    parser = Parser(prog=prog, allow_abbrev=False, argument_default=argparse.SUPPRESS, **kwargs)
    for group in groups:
        section, texts = parser.add_argument_group(group.__doc__), _help(group) if explained else {}
        for own in dataclasses.fields(group):
            flag: dict[str, Any] = {}
            if rule(own).repeats:
                flag = {"action": "append"}
            elif kinds(group)[own.name] in (bool, bool | None):
                flag = {"nargs": "?", "const": "true"}
            elif shown(kinds(group)[own.name]) == LIST:
                flag = {"action": Once}
            # argparse formats help with %, and shows a default only where it sets it.
            text = f"{texts.get(own.name, '')} (default: {default(own)})".replace("%", "%%")
            section.add_argument(f"--{own.name}", metavar=shown(kinds(group)[own.name]), help=text, **flag)
    return parser


def shown(kind: Any) -> str:
    """A field's type for --help: its words, or what kind of value it takes."""
    if get_origin(kind) in (Union, UnionType):
        return shown(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    if get_origin(kind) is list:
        return LIST
    return {int: "N", float: "X", bool: "BOOL"}.get(kind, "TEXT")


def _help(group: type) -> dict[str, str]:
    import docstring_parser

    found = [
        param for part in reversed(group.__mro__[:-1]) for param in docstring_parser.parse_from_object(part).params
    ]
    return {param.arg_name: " ".join((param.description or "").split()) for param in found}


def parse(parser: Parser, argv: list[str]) -> dict[str, Any]:
    """The options that `argv` names, as text. Raises UserError for an unknown one, or one without its value."""
    options = {name: action for action in parser._actions for name in action.option_strings}
    for arg in argv:
        name = _name(arg)
        if arg.startswith("--") and name not in options:
            raise UserError(unknown("option", name, [o for o in options if o.startswith("--")]))
    return vars(parser.parse_args(_joined(argv, options)))


def _name(arg: str) -> str:
    """--learning-rate=1 is --learning_rate."""
    return "--" + arg.partition("=")[0][2:].replace("-", "_")


def _joined(argv: list[str], options: dict[str, argparse.Action]) -> list[str]:
    """`--name value` as `--name=value`, so that a value may begin with a dash; a bare flag takes only a truth value."""
    joined: list[str] = []
    waits = False  # the last word is an option that has no value yet
    for arg in argv:
        if arg.startswith("--"):
            name, equals, value = _name(arg), *arg.partition("=")[1:]
            joined.append(name + equals + value)
            waits = not equals
        elif waits and (options[_name(joined[-1])].nargs is None or arg.lower() in TRUTH):
            joined[-1] += f"={arg}"
            waits = False
        else:
            joined.append(arg)
            waits = False
    return joined


def parse_plan(argv: list[str], group: Callable[..., Own]) -> tuple[Config, Own]:
    """The Config of the run that `crossrank plan ARGV` plans, and the plan's own fields, `group`."""
    what = "Memory, time, scaling and cost of a run before it is queued."
    kind: Any = group
    given = parse(train_parser(asks_for_help(argv), "plan", (kind, *GROUPS), what), argv)
    own = {name: given.pop(name) for name in kinds(kind) if name in given}
    return resolved(given), group(**checked(own, kind))


def asks_for_help(argv: list[str]) -> bool:
    return "--help" in argv or "-h" in argv


def train_parser(
    explained: bool = True,
    verb: str = "train",
    groups: tuple[type, ...] = GROUPS,
    what: str = "Fine-tune a cross-encoder on sentence pairs.",
) -> Parser:
    """Of a verb that takes the fields of a run."""
    parser = make_parser(
        f"crossrank {verb}",
        groups,
        explained,
        usage=f"crossrank {verb} [--recipe NAME] [--config FILE.yaml] [--field value ...]",
        description=f"{what} Precedence: a field's default < recipe < config file < command line.",
    )
    parser.add_argument("--recipe", help="named settings shipped with crossrank, such as demo or allnli-100k")
    parser.add_argument("--config", help="YAML file of fields, such as the config.yaml of an earlier run")
    return parser


def parse_train(argv: list[str], fields: dict[str, Any] | None = None) -> Config:
    """The Config of `crossrank train ARGV`, over which `fields` go. Raises UserError; SystemExit(0) after --help."""
    return resolved(parse(train_parser(asks_for_help(argv)), argv), fields)


def resolved(given: dict[str, Any], fields: dict[str, Any] | None = None) -> Config:
    """The Config of the options `given`, recipe and config file among them, over which `fields` go."""
    recipe, config = given.pop("recipe", None), given.pop("config", None)
    values: dict[str, Any] = {}
    if recipe is not None:
        values = {"run_name": recipe} | read_yaml(recipe_path(recipe))
    if config is not None:
        values = _over(values, read_yaml(Path(os.path.expanduser(config))), f"recipe {recipe}")
    place = f"config file {config}" if config is not None else f"recipe {recipe}"
    return Config(**_over(values, checked(given | (fields or {}), Config), place))


# Fields that name a data set.
DATA = ("dataset_name", "train_file", "validation_file", "test_file")


def _over(values: dict[str, Any], own: dict[str, Any], place: str) -> dict[str, Any]:
    """`own` over `values` of `place`. What those say of their data is not true of other data, so it is left out."""
    if not any(own.get(name) is not None and own[name] != values.get(name) for name in DATA):
        return values | own
    of_data = [name for name in kinds(DataConfig) if name in values]
    left_out = [name for name in of_data if values[name] is not None and name not in own]
    if left_out:
        start_log(is_main=read_place(os.environ).rank == 0)
        log.info(f"left out, since {place} is of other data: {', '.join(left_out)}")
    return {name: value for name, value in values.items() if name not in of_data} | own


def recipe_path(name: str) -> Path:
    """The file of a recipe that is shipped with the package. Raises UserError for an unknown name."""
    valid = [path.stem for path in RECIPES.glob("*.yaml")]
    if name not in valid:
        raise UserError(unknown("recipe", name, valid))
    return RECIPES / f"{name}.yaml"


def grouped(values: dict[str, Any], *groups: Any) -> list[Any]:
    """Each of `groups` with those `values` that are its fields. Raises UserError for a field of none of them."""
    values = checked(values, *groups)
    return [group(**{name: value for name, value in values.items() if name in kinds(group)}) for group in groups]

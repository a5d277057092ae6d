"""Command-line parsing: dataclass fields in, a validated Config out; every mistake is one UserError.

jsonargparse turns the dataclasses of `trainer.config` into options with their docstrings as help. What is added here:
recipes, the precedence of the four sources, bare boolean flags (`--bf16`), and the nearest valid name in errors.
"""

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from trainer.base.errors import UserError, unknown
from trainer.config import GROUPS, Config, read_yaml

RECIPES = Path(__file__).parent / "recipes"


def make_parser(prog: str, groups: tuple[type, ...], explained: bool = True, **kwargs: Any) -> ArgumentParser:
    """A parser whose options are the fields of `groups`, flat, each group under its own heading.

    Without `explained` their docstrings are not read for --help, which takes longer than all else.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=explained)
    parser = ArgumentParser(prog=prog, exit_on_error=False, default_env=False, **kwargs)
    for group in groups:
        parser.add_class_arguments(group, None, fail_untyped=True)
    return parser


def parse(parser: ArgumentParser, argv: list[str], **settings: Any) -> dict[str, Any]:
    """The options that `argv` names, typed. Raises UserError for an unknown option or a value of the wrong type."""
    options = {name: action for action in parser._actions for name in action.option_strings}
    argv = [part for arg in argv for part in _split(_dashes(arg), options)]
    for arg in argv:
        name = arg.partition("=")[0]
        if arg.startswith("--") and name not in options:
            raise UserError(unknown("option", name, [o for o in options if o.startswith("--")]))
    try:
        return parser.parse_args(_spell_out_flags(argv, options), **settings).as_dict()
    except (argparse.ArgumentError, argparse.ArgumentTypeError) as error:
        raise UserError(_plain(error)) from None


def _plain(error: Exception) -> str:
    """A parser's error on one line, in the words of the command line."""
    text = re.sub(r'Parser key "(\w+)":', r"field \1:", " ".join(str(error).split()))
    return re.sub(r"<class '([\w.]+)'>", r"\1", text).replace("typing.", "")


def _dashes(arg: str) -> str:
    """--learning-rate is --learning_rate."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def _split(arg: str, options: dict[str, argparse.Action]) -> list[str]:
    """--label_names=a,b is --label_names a,b."""
    name, equals, value = arg.partition("=")
    return [name, value] if equals and "list" in str(_type(options, name)) else [arg]


def _spell_out_flags(argv: list[str], options: dict[str, argparse.Action]) -> list[str]:
    """A bare `--bf16` means `--bf16 true`, as in transformers; `a,b` means the list `["a", "b"]`."""
    spelled = []
    for position, arg in enumerate(argv):
        spelled.append(arg)
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        if position and not arg.startswith(("[", "--")) and "list" in str(_type(options, argv[position - 1])):
            spelled[-1] = json.dumps([name.strip() for name in arg.split(",")])
        if _type(options, arg) is bool and following.startswith("--"):
            spelled.append("true")
    return spelled


def _type(options: dict[str, argparse.Action], name: str) -> Any:
    return getattr(options.get(name), "_typehint", None)


def asks_for_help(argv: list[str]) -> bool:
    return "--help" in argv or "-h" in argv


def train_parser(explained: bool = True) -> ArgumentParser:
    parser = make_parser(
        "crossrank train",
        GROUPS,
        explained,
        usage="crossrank train [--recipe NAME] [--config FILE.yaml] [--field value ...]",
        description="Fine-tune a cross-encoder on sentence pairs. Precedence: a field's default < recipe < config "
        "file < command line.",
    )
    parser.add_argument("--recipe", help="named settings shipped with crossrank, such as demo or allnli-100k")
    parser.add_argument("--config", help="YAML file of fields, such as the config.yaml of an earlier run")
    return parser


def parse_train(argv: list[str], fields: dict[str, Any] | None = None) -> Config:
    """The Config of `crossrank train ARGV`, over which `fields` go. Raises UserError; SystemExit(0) after --help."""
    parser = train_parser(asks_for_help(argv))
    given = parse(parser, argv, defaults=False)
    recipe, config = given.pop("recipe", None), given.pop("config", None)
    values: dict[str, Any] = {}
    if recipe is not None:
        values |= {"run_name": recipe} | _typed_yaml(recipe_path(recipe), parser)
    if config is not None:
        values |= _typed_yaml(Path(config), parser)
    names = {own.name for own in dataclasses.fields(Config)}
    for name in fields or {}:
        if name not in names:
            raise UserError(unknown("field", name, names))
    return Config(**values | given | (fields or {}))


def recipe_path(name: str) -> Path:
    """The file of a recipe that is shipped with the package. Raises UserError for an unknown name."""
    valid = [path.stem for path in RECIPES.glob("*.yaml")]
    if name not in valid:
        raise UserError(unknown("recipe", name, valid))
    return RECIPES / f"{name}.yaml"


def _typed_yaml(path: Path, parser: ArgumentParser) -> dict[str, Any]:
    values = read_yaml(path)
    try:
        return parser.parse_object(values, defaults=False).as_dict()
    except (argparse.ArgumentError, argparse.ArgumentTypeError) as error:
        raise UserError(f"{path}: {_plain(error)}") from None


def given_fields(values: dict[str, Any], group: type) -> dict[str, Any]:
    """The part of parsed `values` that belongs to the dataclass `group`."""
    return {field.name: values[field.name] for field in dataclasses.fields(group) if field.name in values}

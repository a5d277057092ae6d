"""YAML 1.2: `1e-5` is a number, `no` and `off` are words, `010` is ten.

PyYAML reads YAML 1.1, where the first is text, the second False, and the third eight.
"""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from trainer.base.errors import UserError, reason


def _yaml() -> YAML:
    made: Any = YAML(typ="safe", pure=True)
    made.default_flow_style = False
    made.sort_base_mapping_type_on_output = False
    return made


def read_mapping(path: Path) -> dict[str, Any]:
    """The `name: value` lines of a file. Raises UserError naming the file."""
    try:
        values = _yaml().load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, YAMLError) as error:
        raise UserError(f"cannot read config file {path}: {_why(error)}") from None
    if values is None:  # a file of comments sets nothing
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `field: value` lines, found a {type(values).__name__}")
    return values


def _why(error: Exception) -> str:
    """What is wrong, and in which line, counted from 1 as editors do; ruamel's advice is for programs."""
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = f"line {mark.line + 1}: " if mark else ""
    return line + " ".join(str(problem or reason(error)).split())


def dump(values: dict[str, Any]) -> str:
    """What read_mapping reads back."""
    text = io.StringIO()
    _yaml().dump(values, text)
    return text.getvalue()

"""YAML 1.2 (its core schema): `1e-5` is a number, `no` and `off` are words, `010` is ten.

PyYAML reads YAML 1.1, where the first is text, the second False, and the third eight.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from trainer.base.errors import UserError

SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _name, (_pattern, _first) in SCALARS.items():
    for _end in (_Loader, _Dumper):
        _end.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), [*_first, *([""] if _name == "null" else [])]
        )
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(node.value, 0) if node.value[:2] in ("0o", "0x") else int(node.value, 10),
)


def read_mapping(path: Path) -> dict[str, Any]:
    """The `name: value` lines of a file. Raises UserError naming the file."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}  # noqa: S506
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read config file {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `field: value` lines, found a {type(values).__name__}")
    return values


def dump(values: dict[str, Any]) -> str:
    """What read_mapping reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)

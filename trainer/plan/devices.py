"""Devices and links: the table that is shipped, and files of the same form, checked field by field."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from trainer.base.errors import UserError, unknown
from trainer.base.fields import Fields, checked, kinds, option
from trainer.base.yaml_files import read_mapping

TABLE = Path(__file__).parent / "devices.yaml"
WORDS = ("title", "kind", "link", "measured_on")  # that need no source
OPTIONAL = ("sharing", "measured_on", "process_of_several", "slack_of_several")
BARE = re.compile(r"(\d+(?:\.\d+)?) *([kKMGT]?)(bit|B)(?:/s|ps)?")
UNITS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True, kw_only=True)
class Device(Fields):
    """What computes. Rates are of one rank by itself; see devices.yaml."""

    title: str
    kind: Literal["gpu", "cpu"]
    link: str
    measured_on: str | None = None  # see gauge.measured_on
    memory: float = option(above=0)
    linear_bf16: float = option(above=0)
    linear_tf32: float = option(above=0)
    linear_fp32: float = option(above=0)
    linear_reached: float = option(above=0, at_most=1)
    attention_reached: float = option(above=0, at_most=1)
    bandwidth: float = option(above=0)
    bandwidth_reached: float = option(above=0, at_most=1)
    optimizer_reached: float = option(above=0, at_most=1)
    operation: float = option(at_least=0)
    replayed: float = option(at_least=0)
    step: float = option(at_least=0)
    process: float = option(at_least=0)
    slack: float = option(at_least=1)
    process_of_several: float | None = option(None, at_least=0)
    slack_of_several: float | None = option(None, at_least=1)
    watts: float = option(above=0)
    sharing: list[str] = option(factory=lambda: ["1=1"])

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = [self._shared(text)[0] for text in self.sharing]
        if counts != sorted({*counts}) or counts[:1] != [1]:
            raise UserError(f"sharing must begin with 1=1, and its numbers of ranks must ascend, got {self.sharing}")

    @staticmethod
    def _shared(text: str) -> tuple[int, float]:
        ranks, _, speed = text.partition("=")
        try:
            found = int(ranks), float(speed)
        except ValueError:
            found = 0, 0.0
        if found[0] < 1 or not 0 < found[1] <= 1:
            raise UserError("sharing must be texts such as 2=0.6, a number of ranks and the speed of each, above 0 and "
                            f"at most 1, got {text!r}")  # fmt: skip
        return found

    def resident(self, alone: bool) -> tuple[float, float]:
        """`process` and `slack` of one rank alone, or of each of several, which are as one alone where not measured."""
        several = (self.process_of_several, self.slack_of_several)
        if alone or several[0] is None or several[1] is None:
            return self.process, self.slack
        return several[0], several[1]

    def share(self, ranks: int) -> float:
        """Speed of each of so many ranks on one machine, relative to one alone: between those that are known in
        proportion, above them as parts of one whole. A GPU is not shared."""
        if self.kind == "gpu":
            return 1.0
        known = [self._shared(text) for text in self.sharing]
        last, speed = known[-1]
        if ranks >= last:
            return speed * last / ranks
        below = max((pair for pair in known if pair[0] <= ranks), default=(1, 1.0))
        above = min(pair for pair in known if pair[0] >= ranks)
        part = 0.0 if above[0] == below[0] else (ranks - below[0]) / (above[0] - below[0])
        return below[1] + part * (above[1] - below[1])


@dataclass(frozen=True, kw_only=True)
class Link(Fields):
    """What gradients travel by: bytes/s in each direction, the part that is reached, seconds a message."""

    bandwidth: float = option(above=0)
    reached: float = option(above=0, at_most=1)
    latency: float = option(at_least=0)


GROUPS: dict[str, Any] = {"devices": Device, "links": Link}


@cache
def table() -> dict[str, dict[str, dict[str, Any]]]:
    """What is shipped."""
    return read_mapping(TABLE)


def find_device(name: str) -> tuple[Device, dict[str, Any]]:
    """A device of the table, or the only one of a file, and its entries with their sources. Raises UserError."""
    if name in table()["devices"]:
        return _made("devices", name, table()["devices"][name], name)
    if not _is_file(name):
        raise UserError(
            _unknown("device", name, "devices", "the path of a file such as crossrank plan --measure here.yaml writes")
        )
    entries = _section(name, "devices")
    if len(entries) != 1:
        raise UserError(f"{name}: devices must hold one device, found {len(entries)}")
    ((title, own),) = entries.items()
    return _made("devices", name, own, title)


def find_link(name: str, file: str | None = None) -> Link:
    """A link of the table, N of them as NAMExN, a bandwidth such as 1Gbit, or the only one of a file. `file`: of a
    device, whose links come first. Raises UserError."""
    if file is not None and _is_file(file) and name in (read_mapping(Path(file)).get("links") or {}):
        return _made("links", file, _section(file, "links")[name], name)[0]
    base, times, count = name.rpartition("x")
    if not (times and count.isdigit() and int(count) > 0):
        base, count = name, "1"
    known = table()["links"]
    if base in known:
        link = _made("links", base, known[base], base)[0]
        return Link(bandwidth=link.bandwidth * int(count), reached=link.reached, latency=link.latency)
    if found := BARE.fullmatch(name):
        number, unit, kind = found.groups()
        size = float(number) * UNITS[unit] / (8 if kind == "bit" else 1)
        if size > 0:
            return Link(bandwidth=size, reached=0.93, latency=5e-5)  # ethernet1's
    if not _is_file(name):
        raise UserError(_unknown("link", name, "links", "N of one as infiniband400x8, a bandwidth such as 25Gbit or "
                                 "3GB/s, or the path of a file"))  # fmt: skip
    entries = _section(name, "links")
    if len(entries) != 1:
        raise UserError(f"{name}: links must hold one link, found {len(entries)}")
    return _made("links", name, next(iter(entries.values())), name)[0]


def _unknown(kind: str, name: str, group: str, other: str) -> str:
    return f"unknown {kind} {name!r}; known are {', '.join(table()[group])}; or give {other}"


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or Path(name).is_file()


def _section(name: str, group: str) -> dict[str, Any]:
    values = read_mapping(Path(name))
    if strange := [key for key in values if key not in GROUPS]:
        raise UserError(f"{name}: unknown entry {strange[0]!r}; a file of devices has devices and links")
    found = values.get(group)
    if group not in values:
        raise UserError(f"{name} has no {group}, and one is asked for; add it, or say --{group[:-1]} NAME")
    if not isinstance(found, dict) or not all(isinstance(own, dict) for own in found.values()):
        raise UserError(f"{name}: {group} must hold `name: {{field: ...}}` entries")
    return found


def _made(group: str, place: str, entries: dict[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    """The device or link of `entries`. Raises UserError that names the field."""
    kind, values = GROUPS[group], {}
    if strange := [field for field in entries if field not in kinds(kind)]:
        raise UserError(f"{place}: {unknown('entry', strange[0], kinds(kind))}; {TABLE} explains them")
    for field, entry in entries.items():
        if field in WORDS:
            values[field] = entry
            continue
        if not isinstance(entry, dict) or set(entry) != {"value", "source"} or not str(entry["source"]).strip():
            raise UserError(f"{place}: {field} must be {{value: ..., source: where it is from}}")
        values[field] = entry["value"]
    values = checked(values, kind, place=place)
    needed = [field for field in kinds(kind) if field not in values and field not in OPTIONAL]
    if needed:
        raise UserError(f"{place}: {name} lacks {', '.join(needed)}")
    try:
        return kind(**values), entries
    except UserError as error:
        raise UserError(f"{place}: {error}") from None

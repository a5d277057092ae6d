"""What the tests of reports share: a short run's options, run folders with changed files, the elements of a page."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

DEMO = ["--recipe", "demo", "--max_train_samples", "640", "--max_eval_samples", "101", "--max_test_samples", "101",
        "--logging_steps", "1", "--eval_steps", "10", "--max_steps", "24", "--train_batch_size", "32"]  # fmt: skip

# All that Markdown and HTML know.
EVIL = ["<script>alert(1)</script>", "a | b || c", "line one\nline two\r\n| x |", "![x](http://example.com/x.png)",
        "`code` *bold* _it_ [l](javascript:alert(1)) $x$ # h", "\u202ereversed\x07", "x" * 100_000,
        "```\n# fence"]  # fmt: skip


def edited(folder: Path, target: Path, file: str, change) -> Path:
    """`target`, a copy of the run unless it is there, with one of its JSON files changed."""
    if not target.exists():
        shutil.copytree(folder, target)
    value = json.loads((target / file).read_text())
    change(value)
    (target / file).write_text(json.dumps(value))
    return target


class Elements(HTMLParser):
    """The elements of a page: names, addresses, and the ids of its sections in their order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.addresses: set[str] = set()
        self.ids: list[str] = []
        self.classes: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.found.add(tag)
        self.addresses |= {given[name] for name in ("src", "href", "xlink:href") if name in given}
        if "id" in given:
            self.ids.append(given["id"])
        self.classes += (given.get("class") or "").split()

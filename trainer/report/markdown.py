"""Markdown and HTML from the words of others: escaped, shortened, in tables that hold together."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent
LONGEST = 300
# A _ inside a word is a _ to Markdown, too.
MARKUP = re.compile(r"[&<>|`*\[\]\\$~#]|://|(?<!\w)_|_(?!\w)")
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(value: object, longest: int | None = None) -> str:
    """Printable text; what is longer than `longest` ends in "..."."""
    text = UNPRINTABLE.sub("\ufffd", str(value).replace("\r\n", "\n").replace("\r", "\n"))
    return text if longest is None or len(text) <= longest else text[:longest] + "..."


def escape(value: object, longest: int = LONGEST) -> Markup:
    """Plain text for any place of a Markdown document, a table's cell among them: one line that means no markup."""
    text = str(value)
    if len(text) > longest:
        text = text[:longest] + "..."
    text = UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = MARKUP.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), text)
    return Markup(text.replace("\n", "<br>").replace("\t", " "))  # noqa: S704


def code(value: object) -> Markup:
    """The same as code: <code> and entities, because backticks show an entity's letters."""
    return Markup(f"<code>{escape(value)}</code>")  # noqa: S704


def line(value: object) -> Markup:
    """A line inside a fenced block, where only the fence itself has a meaning."""
    return Markup(UNPRINTABLE.sub("\ufffd", str(value)).replace("\n", " ").replace("```", "` ` `"))  # noqa: S704


def table(header: Sequence[object], rows: Sequence[Sequence[object]], align: str = "") -> Markup:
    """A Markdown table of cells that are escaped already; `align` has l or c for each column."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    align = align or "l" * len(header)
    rule = [
        f":{'-' * width}:" if kind == "c" else f":{'-' * (width + 1)}"
        for width, kind in zip(widths, align, strict=True)
    ]
    lines = [f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in cells]
    return Markup("\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]]))  # noqa: S704


class Table(NamedTuple):
    """Cells as they are: text, which Markdown and HTML escape each in its way, or Markup, which only HTML takes."""

    header: list[str]
    rows: list[list[Any]]

    def markdown(self) -> Markup:
        return table([escape(cell) for cell in self.header], [[escape(cell) for cell in row] for row in self.rows])


def environment() -> Environment:
    """Escapes whatever a template does not hand to one of the functions above."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    made.filters |= {"text": escape, "code": code, "line": line, "python": lambda text: Markup(repr(text))}  # noqa: S704
    made.globals |= {"table": table}
    return made


def render(template: str, **values: Any) -> str:
    return environment().get_template(template).render(**values)


def page(template: str, **values: Any) -> str:
    """HTML that needs nothing but itself. All text in it is escaped and printable, whoever wrote it."""
    made = environment()
    made.finalize = lambda value: plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value
    return made.get_template(template).render(**values)

"""The three ways in which a run ends early, and the words in which it says so."""

import difflib
from collections.abc import Iterable

EXIT_CODE = 85  # preempted: start the same command again


class UserError(ValueError):
    """A mistake in the user's input; its message names the place and the fix, and is printed without a traceback."""


class TrainingFailed(RuntimeError):
    """The run cannot continue, through no mistake in the input; printed without a traceback."""


class Preempted(Exception):
    """The ranks have agreed to stop, since one was asked to; the message is for the user."""


def first_line(error: Exception) -> str:
    """A library's error, cut to what fits into a line of ours."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def reason(error: OSError) -> str:
    """What the operating system says, without number and file name."""
    return error.strerror or str(error)


def named(error: OSError) -> str:
    """The same, behind the file that it is about."""
    return reason(error) if error.filename is None else f"{error.filename}: {reason(error)}"


def unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    """Error text for a name that does not exist: with the nearest valid one, or all of them."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(sorted(names))}"
    return f"unknown {kind} {name!r}; {hint}"

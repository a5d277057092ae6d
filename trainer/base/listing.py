"""What transformers' models are called and which file each is in, kept from one start to the next.

Each process that imports transformers reads all of its models' 2,300 files to find out, twice: a fifth of a start's
time, and a third of its calls of the file system. It is the same as long as the package's RECORD is, which pip writes
with every file's hash; where there is none, or the package is a checkout, it is read once a process.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.base.files import replacing
from trainer.base.folders import caches

Structure = dict[frozenset[str], dict[str, set[str]]]  # by what it needs: a module, the names in it


def keep(import_utils: Any) -> None:
    """Has its define_import_structure, if there is one, keep what it says of the folder of models."""
    define = getattr(import_utils, "define_import_structure", None)
    if define is None:
        return
    models = Path(import_utils.__file__).parent.parent / "models"
    read = functools.cache(lambda: _read(models, define))

    @functools.wraps(define)
    def kept(module_path: Any, prefix: str | None = None) -> Structure:
        if Path(module_path) not in (models, models / "__init__.py"):
            return define(module_path, prefix)
        before = "" if prefix is None else f"{prefix}."
        # A copy: transformers adds to it.
        return {needs: {before + name: {*names} for name, names in own.items()} for needs, own in read().items()}

    import_utils.define_import_structure = kept


def _read(models: Path, define: Callable[[str], Structure]) -> Structure:
    """From the file, or else from the models, and then it goes into the file."""
    place = _place(models)
    if place is not None:
        with suppress(OSError, ValueError, TypeError):
            return {frozenset(needs): {name: {*names} for name, names in own.items()}
                    for needs, own in json.loads(place.read_bytes())}  # fmt: skip
    found = define(str(models))
    if place is not None:
        text = json.dumps(
            [[sorted(needs), {name: sorted(names) for name, names in own.items()}] for needs, own in found.items()]
        )
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place, durable=False) as temporary:
                temporary.write_text(text)
    return found


def _place(models: Path) -> Path | None:
    """The file, named by what it is of; None where that is not known."""
    try:
        package = importlib.metadata.distribution("transformers")
        record = package.read_text("RECORD") or ""
        of_it = Path(str(package.locate_file("transformers/models"))) == models
        changed = os.stat(models).st_mtime_ns  # by hand
    except (OSError, importlib.metadata.PackageNotFoundError):
        return None
    if not of_it or "transformers/models/__init__.py," not in record:
        return None
    key = hashlib.sha256(f"{models}\0{changed}\0{record}".encode()).hexdigest()[:16]
    return caches(os.environ)["CROSSRANK_CACHE"] / f"transformers-{key}.json"

"""Which software a run is of: versions of the packages that decide its numbers, and the commit. Needs no torch."""

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "evaluate", "numpy", "safetensors")
ROOT = Path(__file__).parent.parent.parent
CODE = ("trainer", "launcher", "ds_configs")


def versions() -> dict[str, str]:
    """Of Python and the packages that decide a run's numbers."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def code_hash() -> str:
    """SHA-256 of this copy of the project."""
    result = hashlib.sha256()
    files = [ROOT / "crossrank.py", *(path for folder in CODE for path in sorted((ROOT / folder).rglob("*")))]
    for path in files:
        if path.suffix in (".py", ".yaml", ".json"):
            result.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return result.hexdigest()


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from, and whether it has changes; None outside one."""
    here = str(Path(__file__).parent)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", here, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", __file__):
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None

"""Builds and loads device.cpp, by which a build of torch without CUDA has one CUDA device.

torch asks for its hooks once, while it is imported: `load` comes before that, so nothing here imports torch.
"""

import ctypes
import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")


def torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise RuntimeError("torch is not installed")
    return Path(found.origin).parent


@lru_cache(maxsize=1)
def torch_version() -> dict[str, Any]:
    """The names that torch/version.py defines."""
    return runpy.run_path(str(torch_folder() / "version.py"))


def why_not() -> str:
    """Why there can be no fake device here, or ""."""
    version = torch_version()
    if version.get("cuda") or version.get("hip"):
        return "this build of torch has devices of its own"
    return "" if shutil.which("g++") else "there is no g++"


@lru_cache(maxsize=1)
def load() -> None:
    """Registers the device for the rest of this process, which must not have imported torch yet."""
    if reason := why_not():
        raise RuntimeError(f"no fake CUDA device: {reason}")
    if "torch" in sys.modules:
        raise RuntimeError("no fake CUDA device: torch is imported already; call library.load() before")
    library = build()
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


def build() -> Path:
    """The shared library, compiled where this source and this torch have none yet."""
    torch = torch_folder()
    flags = ["-shared", "-fPIC", "-O0", "-w", "-std=c++20", f"-I{torch / 'include'}"]
    links = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    made_of = " ".join([torch_version()["__version__"], *flags, SOURCE.read_text()])
    folder = Path(tempfile.gettempdir()) / f"crossrank-fakecuda-{os.getuid()}"
    library = folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(mode=0o700, exist_ok=True)
    # Two processes may build at once: each under a name of its own, and the last rename wins.
    with tempfile.TemporaryDirectory(dir=folder) as own:
        made = Path(own) / "device.so"
        command = ["g++", *flags, str(SOURCE), "-o", str(made), *links]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        made.replace(library)
    return library

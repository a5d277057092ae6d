"""Imports point down: every file imports only files above it in this list."""

import ast
import subprocess
import sys
from pathlib import Path

ORDER = [
    "config",
    "sampler",
    "metrics",
    "builtin",
    "precision",
    "optim",
    "run",
    "dist",
    "dropout",
    "vocabulary",
    "data",
    "tokens",
    "batch",
    "attention",
    "model",
    "about",
    "preempt",
    "energy",
    "trackers",
    "checkpoint",
    "backends.single",
    "backends.ddp",
    "backends.deepspeed",
    "backends.fsdp",
    "backends",
    "evaluate",
    "loop",
    "train",
    "stream",
    "predict",
    "folder",
    "markdown",
    "plots",
    "card",
    "compare",
    "report",
    "hub",
    "cli",
    "api",
    "doctor",
    "__main__",
]
# What starts a run stands beside what runs on every rank, and sees of it what needs no torch.
LAUNCHER = ["devices", "sbatch", "follow", "preflight", "agent", "command"]
SEEN_BY_LAUNCHER = {"config", "cli", "run"}
ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "trainer"


def imported(path: Path, package: str = "trainer") -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            module = node.module.removeprefix(package).lstrip(".")
            names |= {module} if module else {alias.name for alias in node.names}
    return names


def test_every_file_has_its_place():
    files = {str(p.relative_to(FOLDER).with_suffix("")).replace("/", ".") for p in FOLDER.rglob("*.py")}
    assert {name.removesuffix(".__init__") for name in files} - {"__init__"} == set(ORDER)


def test_imports_point_down():
    for position, name in enumerate(ORDER):
        path = FOLDER / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        # A backend that needs an optional package is imported when it is asked for.
        assert imported(path) <= set(ORDER[:position]), name


def test_the_package_imports_nothing():
    assert (FOLDER / "__init__.py").read_text() == ""
    assert (ROOT / "launcher" / "__init__.py").read_text() == ""


def test_the_launcher_imports_little():
    assert {path.stem for path in (ROOT / "launcher").glob("*.py")} - {"__init__"} == set(LAUNCHER)
    for position, name in enumerate(LAUNCHER):
        path = ROOT / "launcher" / f"{name}.py"
        assert imported(path, "launcher") <= set(LAUNCHER[:position]), name
        assert imported(path) <= SEEN_BY_LAUNCHER, name


def test_the_launcher_needs_no_torch():
    modules = ", ".join(f"launcher.{name}" for name in LAUNCHER)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

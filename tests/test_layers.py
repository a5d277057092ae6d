"""Imports point down: a file or room of the trainer imports only those that stand above it in this list."""

import ast
import subprocess
import sys
from pathlib import Path

# Rooms are folders; the others are the few files beside them.
ORDER = [
    "base",
    "options",
    "schedules",
    "rules",
    "config",
    "metrics",
    "score_metrics",
    "meeting",
    "ranks",
    "together",
    "rows",
    "labels",
    "data",
    "model",
    "backends",
    "run",
    "report",
    "step",
    "evaluate",
    "loop",
    "finish",
    "train",
    "feed",
    "plan",
    "predict",
    "score",
    "cli",
    "api",
    "doctor",
    "__main__",
]
# What starts a run stands beside what runs on every rank, and sees of it what needs no torch.
LAUNCHER = ["devices", "sweep", "sbatch", "follow", "preflight", "agent", "command"]
SEEN_BY_LAUNCHER = {"base", "config", "cli", "run.versions"}
SEEN_BY_REPORT = {"base", "config", "metrics"}
ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "trainer"


def imported(path: Path, package: str = "trainer") -> set[str]:
    """The modules of `package` that a file imports, as dotted names below it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            module = node.module.removeprefix(package).lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                found = (ROOT / package / inner.replace(".", "/")).with_suffix(".py").exists()
                names.add(inner if found else module)
    return names


def rooms(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def files_of(room: str) -> list[Path]:
    return sorted((FOLDER / room).rglob("*.py")) or [FOLDER / f"{room}.py"]


def test_every_file_has_its_room():
    found = {path.relative_to(FOLDER).with_suffix("").parts[0] for path in FOLDER.rglob("*.py")}
    assert found - {"__init__"} == set(ORDER)


def test_imports_point_down():
    for position, room in enumerate(ORDER):
        for path in files_of(room):
            assert rooms(imported(path)) <= set(ORDER[: position + 1]), path


def test_no_cycles_in_a_room():
    for room in ORDER:
        graph = {}
        for path in files_of(room):
            name = ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__")
            graph[name] = {other for other in imported(path) if other.split(".")[0] == room} - {name}
        while free := [name for name, below in graph.items() if not below & graph.keys()]:
            for name in free:
                del graph[name]
        # A backend is imported by its room's front when it is asked for.
        assert not graph, f"imports in a circle: {graph}"


def test_packages_import_nothing():
    fronts = {path for package in (FOLDER, ROOT / "launcher") for path in package.rglob("__init__.py")}
    assert {path for path in fronts if path.read_text()} == {FOLDER / "backends" / "__init__.py"}


def test_the_report_needs_little():
    for path in files_of("report"):
        assert rooms(imported(path)) <= SEEN_BY_REPORT | {"report"}, path


def test_the_launcher_imports_little():
    assert {path.stem for path in (ROOT / "launcher").glob("*.py")} - {"__init__"} == set(LAUNCHER)
    for position, name in enumerate(LAUNCHER):
        path = ROOT / "launcher" / f"{name}.py"
        assert imported(path, "launcher") <= set(LAUNCHER[:position]), name
        assert {n if n in SEEN_BY_LAUNCHER else n.split(".")[0] for n in imported(path)} <= SEEN_BY_LAUNCHER, name


def test_launcher_and_report_need_no_torch():
    reports = [f"trainer.report.{path.stem}" for path in files_of("report") if path.stem != "__init__"]
    modules = ", ".join([*(f"launcher.{name}" for name in LAUNCHER), *reports])
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

"""The benchmarks run: each is started as a user would, in tiny sizes."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


def test_what_they_take_from_the_packages_is_there():
    """Most of it is imported where it is needed, hours into a benchmark."""
    taken = {
        (node.module, name.name)
        for path in (ROOT / "benchmarks").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("trainer", "launcher")
        for name in node.names
    }
    missing = []
    for module, name in sorted(taken):
        own = importlib.import_module(module)
        # A module of a package is found, not imported: one of them needs Triton.
        if not (hasattr(own, name) or (hasattr(own, "__path__") and importlib.util.find_spec(f"{module}.{name}"))):
            missing.append((module, name))
    assert not missing


@pytest.mark.full
def test_rehearsal_of_the_gpu_benchmarks(tmp_path, allnli, minilm):
    """Packed without wheels, which are for another machine."""
    start = [sys.executable, "-m"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pack, out = tmp_path / "pack", tmp_path / "out"
    command = [*start, "benchmarks.gpu.pack", pack, "--wheels"]
    subprocess.run([*map(str, command)], env=env, cwd=ROOT, check=True)
    command = [*start, "benchmarks.gpu", "--pack", pack, "--out", out, "--rehearsal", "--minutes", "60"]
    result = subprocess.run([*map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["stages"]) == 12
    assert summary["rtx_3090"]["train_seconds_of_the_recipe"] > 0
    scores = summary["stages"]["recipe"]["result"]["scores"]
    assert scores.keys() == {"AllNLI-dev", "AllNLI-test"}
    assert {path.name for path in out.iterdir()} == {"summary.json", "results.tar.gz"}
    shutil.unpack_archive(out / "results.tar.gz", tmp_path / "results")
    assert (tmp_path / "results" / "roofline-distilroberta-bf16.png").stat().st_size > 0


@pytest.mark.full
def test_the_cost_of_ranks(tmp_path):
    command = [sys.executable, "-m", "benchmarks.ranks", "--ranks", "2", "3", "--pairs", "2000", "--results", tmp_path]
    subprocess.run([*map(str, command)], env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, check=True)
    found = json.loads((tmp_path / "ranks.json").read_text())
    assert found["predicted"]["1024"]["deal_after"] < found["predicted"]["1024"]["deal_before"]
    assert found["measured"].keys() == {"2", "3"}

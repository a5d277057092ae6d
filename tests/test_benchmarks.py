"""The benchmarks run: each is started as a user would, in tiny sizes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


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

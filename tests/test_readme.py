"""Every command of the README, in the order in which they stand there; the first and the special ones in a shell."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, crossrank

README = (ROOT / "README.md").read_text()
# Commands that a test of the project cannot run, with the reason.
ELSEWHERE = {
    "make train": "installs; CI does it with make test",
    "source .venv/bin/activate": "the environment of this test is another one",
}
# A command that trains ends after so many steps, unless it says how many: `make train` goes to the end.
STEPS = "--max_steps 40"
# Needs the hub, and there is none here: the command gets as far as that, and says so in one line.
FROM_THE_HUB = "train --recipe allnli-100k --output_dir"


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, builtin_model) -> Path:
    """What a user has: an encoder, a decoder, and pairs in files of several kinds."""
    import pyarrow as pa
    from families import save_encoder
    from pyarrow import csv, parquet

    from trainer.data.builtin import LABEL_NAMES, pairs

    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(builtin_model, place / "my-encoder")
    save_encoder(place / "my-decoder", "qwen3")
    rows = [{**row, "label": LABEL_NAMES[row["label"]]} for row in pairs("train")[:240]]
    parquet.write_table(pa.Table.from_pylist(rows[:192]), place / "train.parquet")
    csv.write_csv(pa.Table.from_pylist(rows[192:216]), place / "dev.csv")
    lines = [json.dumps(row) + "\n" for row in rows[216:]]
    (place / "test.jsonl").write_text("".join(lines))
    (place / "new.jsonl").write_text("".join(lines))
    return place


def shell(command: str, folder: Path) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True)


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    """In a shell of its own, but for what is crossrank alone: loading torch each time takes most of the time."""
    plain = re.fullmatch(r"crossrank (?!launch)[^|<>&;$'\"]+", command)
    return crossrank(*shlex.split(command)[1:], check=False) if plain else shell(command, folder)


def test_every_command(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = []
    for command in commands():
        if command in ELSEWHERE:
            continue
        trains = re.search(r"\btrain --", command) and "--max_steps" not in command and "launch slurm" not in command
        command = f"{command} {STEPS}" if trains else command
        command = command.replace("--nproc-per-node 4", "--nproc-per-node 2")  # which shows as much
        result = run(command, folder) if done else shell(command, folder)
        if FROM_THE_HUB in command and "--dry_run" not in command:
            assert result.returncode != 0
            assert result.stderr.count("could not be loaded from the hub") == 1, result.stderr
        else:
            assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        done.append(command)
    assert len(done) == 12
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        result = subprocess.run([sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True,
                                env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
        assert result.returncode == 0, result.stderr
    assert (folder / "scores.csv").read_text().count("\n") == 25


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"

"""Folders beside the run's: caches and temporary files that cannot be written, as in many a container."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, crossrank

RUN = ["--recipe", "demo", "--max_train_samples", "330", "--max_eval_samples", "101", "--max_test_samples", "101",
       "--max_steps", "2", "--track_emissions", "false"]  # fmt: skip
VARIABLES = ("HOME", "HF_HOME", "TMPDIR", "CROSSRANK_CACHE", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")


def command(*arguments: object, cwd: Path, code: int = 0, **given: str) -> subprocess.CompletedProcess:
    """A real process: libraries read these variables as they are imported."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    env |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **given}
    start = [sys.executable, "-m", "crossrank", *map(str, arguments)]
    result = subprocess.run(start, env=env, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


@pytest.mark.parametrize(
    ("variable", "other"), [("HOME", "HF_HOME"), pytest.param("HF_HOME", "HOME", marks=pytest.mark.full)]
)
def test_caches_that_cannot_be_written(tmp_path, variable, other):
    """A run ends with its scores and its pictures, an evaluation with scores; one line says where the caches are."""
    (tmp_path / "file").write_text("")
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()

    def without(name: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess:
        env = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")} | {name: str(tmp_path / "file")}
        return command(*arguments, cwd=tmp_path, code=code, **env)

    result = without(variable, "train", *RUN, "--output_dir", tmp_path / "run")
    (line,) = [line for line in result.stderr.splitlines() if "warning" in line]
    assert f"{tmp_path / 'file'} is a file" in line
    assert str(tmp_path / "tmp" / f"crossrank-{os.geteuid()}") in line
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert (tmp_path / "run" / "model" / "plots" / "training.png").exists()
    model = tmp_path / "run" / "model"
    scores = without(other, "evaluate", model, "--dataset_name", "builtin", "--max_test_samples", "9")
    assert f"{tmp_path / 'file'} is a file" in scores.stderr
    assert "builtin-dev" in scores.stdout
    assert "f1_macro" not in scores.stderr
    for name in (variable, other):
        checks = json.loads(without(name, "doctor", "--json", code=1).stdout)
        wrong = {check["name"]: check for check in checks if check["ok"] is False}
        assert "HF_METRICS_CACHE" in wrong
        assert ("CROSSRANK_CACHE" in wrong) == (name == "HOME")
        assert "set HF_METRICS_CACHE to a folder" in wrong["HF_METRICS_CACHE"]["fix"]
    assert not (tmp_path / "~").exists()


def test_models_in_a_folder_that_can_only_be_read_are_found(tmp_path, monkeypatch):
    """Those baked into an image; only what must be written goes elsewhere."""
    from trainer.base import folders

    (tmp_path / "hf" / "hub").mkdir(parents=True)
    monkeypatch.setattr(folders, "obstacle", lambda folder: "read-only" if tmp_path / "hf" in folder.parents else None)
    for name in folders.caches({}):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folders.provide()
    assert "HF_HUB_CACHE" not in os.environ
    assert "crossrank-" in os.environ["HF_DATASETS_CACHE"]
    assert "CROSSRANK_CACHE" not in os.environ


def test_folders_are_looked_at_before_libraries_read_their_names(tmp_path):
    """From Python too; and all follow XDG_CACHE_HOME."""
    code = (
        "import sys; from trainer.base import folders; looked = []\n"
        "folders.provide = lambda: looked.append('huggingface_hub' in sys.modules)\n"
        "import crossrank; crossrank.train; crossrank.predict; print(looked, folders.caches({'XDG_CACHE_HOME': '/x'}))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True).stdout
    assert said.startswith("[False] ")
    assert "'CROSSRANK_CACHE': PosixPath('/x/crossrank')" in said


def test_no_bars_in_a_log(tmp_path):
    """Neither ours, however long it takes, nor that of a library."""
    from trainer.data.builtin import pairs

    (tmp_path / "pairs").mkdir()
    for split in ("train", "validation"):
        rows = "".join(json.dumps(row) + "\n" for row in pairs("dev")[:200])
        (tmp_path / "pairs" / f"{split}.jsonl").write_text(rows)
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\nfrom trainer.data import tokenize, tokens\ntokens.CHUNK = 50\n"
        "class Slow(tokenize.tqdm):\n"
        "    def __init__(self, *args, **given):\n        super().__init__(*args, **given | {'delay': 0})\n"
        "    def update(self, n):\n        time.sleep(0.2)\n        return super().update(n)\n"
        "tokenize.tqdm = Slow\nfrom trainer import __main__\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    run = ["train", *RUN[2:], "--model_name_or_path", "builtin", "--dataset_name", tmp_path / "pairs",
           "--write_report", "false", "--output_dir", tmp_path / "run"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"),
                        "CROSSRANK_CACHE": str(tmp_path / "cache")}  # fmt: skip
    result = subprocess.run([sys.executable, str(script), *map(str, run)], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert "%|" not in result.stderr
    assert "examples/s" not in result.stderr
    assert "\r" not in result.stderr


def test_no_folder_for_temporary_files(tmp_path):
    script = "import tempfile, sys; tempfile._candidate_tempdir_list = lambda: ['/proc/nowhere']\n"
    script += "from trainer import __main__; sys.exit(__main__.main(['train', '--recipe', 'demo']))"
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.strip().endswith("no folder for temporary files can be written; set TMPDIR to one")


def test_a_tmpdir_that_is_not_there(tmp_path):
    result = command("train", *RUN, "--write_report", "false", "--output_dir", tmp_path / "run", cwd=tmp_path,
                     TMPDIR=str(tmp_path / "gone"), HOME=str(tmp_path))  # fmt: skip
    assert f"TMPDIR={tmp_path / 'gone'} cannot be written" in result.stderr


def test_another_folders_error_does_not_blame_the_run(tmp_path):
    script = tmp_path / "other.py"
    script.write_text(
        "import sys\nfrom trainer import __main__, finish\n"
        "def fail(*args):\n    open('/proc/elsewhere', 'w')\n"
        "finish.write_predictions = fail\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    result = crossrank("train", *RUN, "--output_dir", tmp_path / "run", script=script, check=False)
    assert result.returncode == 1
    assert "failed: /proc/elsewhere: No such file or directory" in result.stderr
    assert "cannot write into" not in result.stderr
    assert "Traceback" not in result.stderr

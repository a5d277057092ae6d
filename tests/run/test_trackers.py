"""Trackers: what they write is what metrics.jsonl has, and none of them stops a run."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, crossrank, events

from trainer.base.errors import UserError
from trainer.cli import parse_train
from trainer.run.trackers import Guarded, Tracker, start_trackers

RUN = ["--recipe", "demo", "--max_train_samples", "330", "--max_eval_samples", "101", "--max_test_samples", "101",
       "--logging_steps", "2", "--max_steps", "12", "--save_steps", "6", "--eval_steps", "6",
       "--track_emissions", "false", "--write_report", "false"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    for package in ("tensorboard", "wandb"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("tracked") / "run"
    crossrank("train", *RUN, "--report_to", "tensorboard,wandb", "--output_dir", folder, ranks=2,
              HOME=str(folder.parent), NETRC=str(folder.parent / "none"))  # fmt: skip
    return folder


def test_tensorboard_has_every_number(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    for kind, group in (("train", "train"), ("eval", "builtin-dev")):
        logged = [e for e in events(run, kind) if e.get("split", group) == group]
        assert logged
        for name in ("loss", "epoch", *(("learning_rate", "tokens_per_second") if kind == "train" else ("f1_macro",))):
            points = [(point.step, point.value) for point in board.Scalars(f"{group}/{name}")]
            assert dict(points) == pytest.approx({e["step"]: e[name] for e in logged})


def leveldb_records(log: bytes):
    """The records of a W&B file: LevelDB's log format (blocks of 32 KiB, records in parts) after 7 bytes of its own."""
    at, whole = 7, b""
    while at + 7 <= len(log):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)  # after the checksum
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last part
            yield whole
            whole = b""


def test_wandb_offline_has_every_number(run):
    from wandb.proto import wandb_internal_pb2

    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    history = []
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            history.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    losses = {row["step"]: row["train/loss"] for row in history if "train/loss" in row}
    assert losses == pytest.approx({e["step"]: e["loss"] for e in events(run, "train")})
    scores = {row["step"]: row["builtin-dev/f1_macro"] for row in history if "builtin-dev/f1_macro" in row}
    assert scores == pytest.approx({e["step"]: e["f1_macro"] for e in events(run, "eval") if "dev" in e["split"]})


class Broken(Tracker):
    def __init__(self, when: str) -> None:
        self.when = when
        if when == "start":
            raise OSError("no luck")

    def log(self, metrics, step):
        if self.when == "log":
            raise ConnectionError("the service is down\nfor good")

    def close(self):
        if self.when == "close":
            raise RuntimeError("still uploading")


@pytest.mark.parametrize("when", ["start", "log", "close"])
def test_a_tracker_that_fails_says_so_once(when, said):
    tracker = Guarded("mine", lambda: Broken(when))
    for step in range(3):
        tracker.log({"loss": 1.0}, step)
    tracker.close()
    assert len(said) == 1
    assert "the tracker mine is off" in said[0]
    assert "\n" not in said[0]


def test_a_run_outlives_its_tracker(tmp_path):
    """A file where TensorBoard's folder should be, when the run is resumed."""
    folder = tmp_path / "run"
    crossrank("train", *RUN, "--output_dir", folder)
    (folder / "results.json").unlink()
    (folder / "tensorboard").write_text("in the way")
    result = crossrank("train", *RUN, "--report_to", "tensorboard", "--output_dir", folder)
    assert result.stderr.count("the tracker tensorboard is off") == 1
    assert (folder / "results.json").is_file()


def test_a_package_that_is_not_there(monkeypatch, tmp_path, said):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = parse_train(["--recipe", "demo", "--report_to", "wandb"])
    for tracker in start_trackers(config, tmp_path, 0):
        tracker.log({"loss": 1.0}, 1)
    assert len(said) == 1
    assert "pip install 'crossrank[wandb]'" in said[0]


def test_unknown_trackers():
    with pytest.raises(UserError, match="did you mean 'wandb'"):
        parse_train(["--recipe", "demo", "--report_to", "wandbb"])


def test_only_what_is_used_is_imported():
    code = "import sys, trainer.api; print({'wandb', 'tensorboard', 'codecarbon'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "set()", result.stderr

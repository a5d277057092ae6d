"""Resume is exact, and nothing that is damaged or hostile is ever loaded."""

import errno
import json
import os
import pickle
import shutil
import signal
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Ranks, crossrank, events, losses
from safetensors.torch import load_file

from trainer.backends.share import Share
from trainer.backends.zero_settings import CONFIGS
from trainer.cli import parse_train
from trainer.ranks import World
from trainer.run.checkpoint import Checkpoints
from trainer.run.parts import Damaged
from trainer.run.verified import load
from trainer.train import prepare

RUN = ["--recipe", "demo", "--max_train_samples", "330", "--max_eval_samples", "101", "--max_test_samples", "101",
       "--logging_steps", "1", "--num_train_epochs", "2", "--save_steps", "2", "--eval_steps", "4",
       # The weights of the last step, whatever came of the model that was best before a run was cut off.
       "--load_best_model_at_end", "false",
       "--track_emissions", "false", "--write_report", "false"]  # fmt: skip
DROPOUT = ["--dropout", "0.1"]
ZERO = {path.stem: ["--deepspeed", path.stem] for path in CONFIGS.glob("*.json")}
BACKENDS = {"ddp": [], "fsdp": ["--backend", "fsdp"], **ZERO}
MORE = [pytest.param(*names, 2, marks=pytest.mark.full) for names in (("ddp", "fsdp"), ("fsdp", "zero1"))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def bit_equal(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def interrupted(folder: Path, whole: Path, step: int) -> Path:
    """A copy of the whole run as it was when its process died after `step`."""
    shutil.copytree(whole, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "model")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs of 12 steps, all checkpoints kept: on one process, and on two ranks of every backend."""
    made: dict[str, Path] = {}

    def run(backend: str = "single", *options: str) -> Path:
        key = "-".join([backend, *options])
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            ranks = 0 if backend == "single" else 2
            wiring = [] if backend == "single" else BACKENDS[backend]
            keep = ["--save_total_limit", "null"]
            crossrank("train", *RUN, *DROPOUT, *wiring, *options, *keep, "--output_dir", made[key], ranks=ranks)
        return made[key]

    return run


SDPA = ["--attn_implementation", "sdpa"]  # it draws the masks of attention's dropout from torch's own stream


KINDS = {"fp32": [], "bf16": ["--bf16"], "own dropout": SDPA}
USUAL = [("single", *KINDS), ("ddp", *KINDS), ("fsdp", "fp32", "bf16"), ("zero2", "fp32"), ("zero3", "fp32", "bf16")]
RESUMED = [(backend, kind) for backend, *kinds in USUAL for kind in kinds]
REST = [(backend, kind) for backend in ["single", *BACKENDS] for kind in KINDS if (backend, kind) not in RESUMED]


@pytest.mark.parametrize(
    ("backend", "options"),
    [pytest.param(backend, KINDS[kind], id=f"{backend}-{kind}", marks=[pytest.mark.full] * ((backend, kind) in REST))
     for backend, kind in RESUMED + REST],
)  # fmt: skip
def test_resumed_is_bit_equal(whole, tmp_path, backend, options):
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    if options and backend not in ("single", "ddp"):
        pytest.skip("fp32 shows it")
    reference = whole(backend, *options)
    folder = interrupted(tmp_path / "run", reference, 6)
    ranks, wiring = (0, []) if backend == "single" else (2, BACKENDS[backend])
    result = crossrank("train", *RUN, *DROPOUT, *wiring, *options, "--output_dir", folder, ranks=ranks)
    assert "resuming at step 6" in result.said
    assert bit_equal(folder, reference)
    assert losses(folder) == losses(reference)
    assert json.loads((folder / "results.json").read_text())["train"]["interruptions"] == 1


@pytest.mark.parametrize("options", [[], SDPA], ids=["keyed", "own dropout"])
def test_the_random_stream_is_left_alone_where_nobody_draws(tmp_path, options):
    config = parse_train([*RUN, *DROPOUT, *options, "--max_steps", "2", "--output_dir", str(tmp_path / "run")])
    trainer = prepare(config, World(0, 1, 0, torch.device("cpu")))
    before = torch.get_rng_state()
    trainer.loop()
    trainer.output.close()
    assert torch.equal(torch.get_rng_state(), before) == (options == [])


@pytest.mark.parametrize(
    ("saved", "resumed", "ranks"),
    [("single", "ddp", 3), ("zero3", "fsdp", 3), ("zero2", "single", 0), *MORE],
)
def test_resume_on_other_ranks_and_backends(whole, tmp_path, saved, resumed, ranks):
    if "zero" in saved + resumed:
        pytest.importorskip("deepspeed")
    reference = whole(saved)
    folder = interrupted(tmp_path / "run", reference, 6)
    wiring = BACKENDS.get(resumed, [])
    crossrank("train", *RUN, *DROPOUT, *wiring, "--output_dir", folder, ranks=ranks)
    assert np.allclose(losses(folder), losses(reference), rtol=0, atol=1e-5)
    assert losses(folder)[:6] == losses(reference)[:6]


def test_another_config_is_refused(whole, tmp_path):
    folder = interrupted(tmp_path / "run", whole(), 6)
    command = ["train", *RUN, *DROPOUT, "--output_dir", folder]
    for option, value in (
        ("--learning_rate", "1e-4"),
        ("--seed", "7"),
        ("--num_train_epochs", "3"),
        ("--bf16", "true"),
    ):
        result = crossrank(*command, option, value, check=False)
        assert result.returncode == 2
        assert f"{option[2:]}: saved" in result.stderr
    result = crossrank(*command, "--max_train_samples", "320", check=False)
    assert "max_train_samples: saved 330, now 320" in result.stderr
    result = crossrank(*command, "--resume_from_checkpoint", "none", check=False)
    assert "unfinished run" in result.stderr
    crossrank(*command, "--logging_steps", "5", "--save_steps", "3", "--per_device_train_batch_size", "16")


def test_other_data_is_refused(tmp_path):
    """Under the same name, or another: what is in the files counts."""
    from trainer.data.builtin import pairs

    def write(name: str, rows: list[dict]) -> Path:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    train, dev = write("train.jsonl", pairs("train")[:128]), write("dev.jsonl", pairs("dev")[:20])
    options = ["--model_name_or_path", "builtin", "--train_file", train, "--max_steps", "4", "--save_steps", "2",
               "--train_batch_size", "32", "--save_total_limit", "null", "--track_emissions", "false",
               "--write_report", "false"]  # fmt: skip
    crossrank("train", *options, "--validation_file", dev, "--output_dir", tmp_path / "whole")
    folder = interrupted(tmp_path / "run", tmp_path / "whole", 2)
    about = (folder / "about.json").read_bytes()
    write("dev.jsonl", pairs("dev")[20:40])
    result = crossrank("train", *options, "--validation_file", dev, "--output_dir", folder, check=False)
    assert result.returncode == 2
    assert "dev.jsonl is not the dev data with which the run began" in result.stderr
    assert (folder / "about.json").read_bytes() == about
    moved = write("moved.jsonl", pairs("dev")[:20])
    crossrank("train", *options, "--validation_file", moved, "--output_dir", folder)
    assert bit_equal(folder, tmp_path / "whole")


def test_signals_mean_again_what_they_meant():
    from trainer.ranks import World
    from trainer.run.preempt import Preemption

    before = signal.getsignal(signal.SIGTERM)
    preemption = Preemption(World(0, 1, 0, torch.device("cpu")), ["SIGTERM"])
    assert signal.getsignal(signal.SIGTERM) != before
    preemption.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_named_checkpoint(whole, tmp_path):
    reference = whole()
    named = reference / "checkpoints" / "step-000008"
    crossrank("train", *RUN, *DROPOUT, "--resume_from_checkpoint", named, "--output_dir", tmp_path / "run")
    assert bit_equal(tmp_path / "run", reference)
    assert losses(tmp_path / "run") == losses(reference)[8:]
    result = crossrank("train", *RUN, *DROPOUT, "--resume_from_checkpoint", tmp_path, "--output_dir", tmp_path / "b",
                       check=False)  # fmt: skip
    assert result.returncode == 2
    assert "manifest.json is missing" in result.stderr


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARM = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "bit flipped": flip,
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
def test_damage_is_seen(whole, tmp_path, file, harm, said):
    shutil.copytree(whole() / "checkpoints", tmp_path / "checkpoints")
    checkpoints = Checkpoints(tmp_path / "checkpoints", None)
    newest = checkpoints.newest()
    HARM[harm](newest.path / file)
    with pytest.raises(Damaged):
        load(newest.path)
    assert newest.path.is_dir()
    assert checkpoints.newest().path.name == "step-000010"
    assert len(said) == 1
    assert "skipping" in said[0]
    assert "step-000012" in said[0]
    assert newest.path.with_name("step-000012.damaged-1").is_dir()


def test_two_damaged_and_then_all(whole, tmp_path):
    reference = whole()
    folder = interrupted(tmp_path / "run", reference, 12)
    for step in ("12", "10"):
        flip(folder / "checkpoints" / f"step-0000{step}" / "tensors.safetensors")
    result = crossrank("train", *RUN, *DROPOUT, "--output_dir", folder)
    assert result.stderr.count("skipping the checkpoint") == 2
    assert "resuming at step 8" in result.stderr
    assert bit_equal(folder, reference)
    assert (folder / "checkpoints" / "step-000012.damaged-1").is_dir()
    other = interrupted(tmp_path / "other", reference, 12)
    for path in (other / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    before = contents(other)
    for _ in range(2):
        result = crossrank("train", *RUN, *DROPOUT, "--output_dir", other, check=False)
        assert result.returncode == 1
        assert "all checkpoints in" in result.stderr
        assert "start over with another --output_dir" in result.stderr
        assert contents(other) == before
    # So it is where an earlier start has put them aside.
    for path in (other / "checkpoints").iterdir():
        path.rename(f"{path}.damaged-1")
    result = crossrank("train", *RUN, *DROPOUT, "--output_dir", other, check=False)
    assert "all checkpoints in" in result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """Of a run's folder, but for its lock and the times in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}  # fmt: skip


UNREADABLE = """
import errno, pathlib, sys
from trainer import __main__
original = pathlib.Path.open
class Failing:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def read(self, *size): raise OSError(errno.EIO, "Input/output error")
def open(self, mode="r", *args, **kwargs):
    if mode == "rb" and self.name == "tensors.safetensors":
        if CODE == errno.EIO:
            return Failing(original(self, mode))
        raise OSError(CODE, "no luck", str(self))
    return original(self, mode, *args, **kwargs)
pathlib.Path.open = open
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("kind", ["EACCES", "ESTALE", "EIO", "EISDIR", "ELOOP", "link", "newer"])
def test_what_cannot_be_read_is_not_damaged(whole, tmp_path, kind):
    """The run stops with the reason, and everything stays as it is."""
    folder = interrupted(tmp_path / "run", whole(), 12)
    newest, script = folder / "checkpoints" / "step-000012", None
    if kind == "EISDIR":
        (newest / "state.json").unlink()
        (newest / "state.json").mkdir()
    elif kind == "link":  # to another disk, for room
        (newest / "tensors.safetensors").rename(tmp_path / "tensors.safetensors")
        (newest / "tensors.safetensors").symlink_to(tmp_path / "tensors.safetensors")
    elif kind == "newer":
        text = (newest / "manifest.json").read_text()
        (newest / "manifest.json").write_text(text.replace("crossrank-checkpoint-1", "crossrank-checkpoint-3"))
    elif kind == "ELOOP":
        shutil.rmtree(folder / "checkpoints")
        (folder / "checkpoints").symlink_to("checkpoints")
    else:
        script = tmp_path / "unreadable.py"
        script.write_text(UNREADABLE.replace("CODE", str(getattr(errno, kind))))
    before = contents(folder)
    result = crossrank("train", *RUN, *DROPOUT, "--output_dir", folder, script=script, check=False)
    assert result.returncode == 1
    assert f"cannot read the checkpoints in {folder}" in result.stderr
    assert "nothing was changed" in result.stderr
    assert "Traceback" not in result.stderr
    assert contents(folder) == before
    if script:
        assert str(newest / "tensors.safetensors") in result.stderr
        assert "resuming at step 12" in crossrank("train", *RUN, *DROPOUT, "--output_dir", folder).stderr


def test_strangers_in_a_checkpoint_are_not_looked_at(whole, tmp_path):
    folder = interrupted(tmp_path / "run", whole(), 12)
    newest = folder / "checkpoints" / "step-000012"
    (newest / ".DS_Store").write_bytes(b"\0")
    (newest / "optimizer.pt").write_bytes(bomb(tmp_path))
    os.mkfifo(newest / ".nfs0001")  # whoever opens it waits for ever
    (folder / "checkpoints" / ".DS_Store").write_bytes(b"\0")
    (folder / "checkpoints" / "step-000014.backup").mkdir()
    result = crossrank("train", *RUN, *DROPOUT, "--output_dir", folder)
    assert "resuming at step 12" in result.stderr
    assert not (tmp_path / "executed").exists()


def test_a_named_runs_folder_stays_as_it_is(whole, tmp_path):
    """It is somebody else's, who may be writing a checkpoint right now."""
    other = interrupted(tmp_path / "other", whole(), 12)
    flip(other / "checkpoints" / "step-000012" / "state.json")
    (other / "checkpoints" / ".step-000014.77").mkdir()
    before = contents(other), sorted(os.listdir(other / "checkpoints"))
    result = crossrank("train", *RUN, *DROPOUT, "--resume_from_checkpoint", other, "--output_dir", tmp_path / "run")
    assert "resuming at step 10" in result.stderr
    assert (contents(other), sorted(os.listdir(other / "checkpoints"))) == before


def test_what_killed_runs_left_is_cleared(whole, tmp_path):
    reference = whole()
    folder = interrupted(tmp_path / "run", reference, 6)
    shutil.copytree(folder / "checkpoints" / "step-000006", folder / "checkpoints" / ".step-000014.77")
    shutil.copytree(reference / "model", folder / ".model.78")
    for name in (".results.json.79", ".metrics.jsonl.80"):
        (folder / name).write_text("{")
    (folder / ".notes.81").write_text("somebody's")
    result = crossrank("train", *RUN, *DROPOUT, "--output_dir", folder)
    assert "resuming at step 6" in result.stderr
    assert bit_equal(folder, reference)
    assert {path.name for path in folder.rglob(".*")} == {".lock", ".notes.81"}


@pytest.mark.parametrize("umask", [0o027, pytest.param(0o002, marks=pytest.mark.full)])
def test_files_follow_the_umask(tmp_path, umask):
    script = tmp_path / "umask.py"
    script.write_text(
        f"import os, sys\nfrom trainer import __main__\nos.umask({umask})\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    options = [*RUN, "--write_report", "true", "--track_emissions", "true", "--country_iso_code", "FRA"]
    crossrank(
        "train", *options, "--output_dir", tmp_path / "run", script=script, CROSSRANK_CACHE=str(tmp_path / "cache")
    )
    written = [path for place in ("run", "cache") for path in (tmp_path / place).rglob("*")]
    assert {"model.safetensors", "tensors.safetensors", "emissions.csv"} <= {path.name for path in written}
    wrong = {str(path): oct(path.stat().st_mode) for path in written
             if stat.S_IMODE(path.stat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~umask}  # fmt: skip
    assert not wrong


def test_two_runs_of_one_second(tmp_path):
    """Each has a folder of its own, where none is named."""
    script = tmp_path / "stopped.py"
    script.write_text(
        "import os, sys, time\nfrom trainer import __main__\n"
        f"os.chdir({str(tmp_path)!r})\ntime.strftime = lambda *given: '20260101-000000'\n"
        "sys.exit(__main__.main(sys.argv[1:]))\n"
    )
    runs = [Ranks(["train", *RUN], ranks, None, script, {}) for ranks in (0, 2, 0)]
    results = [run.wait() for run in runs]
    assert [result.returncode for result in results] == [0, 0, 0], [result.said for result in results]
    made = sorted((tmp_path / "runs").iterdir())
    assert [path.name for path in made] == [f"demo-20260101-000000{end}" for end in ("", "-2", "-3")]
    assert all(len(losses(path)) == 12 for path in made)


def bomb(path: Path) -> bytes:
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(path / "executed"),)

    return pickle.dumps(Bomb())


def test_hostile_checkpoints_are_refused(whole, tmp_path):
    good = whole() / "checkpoints" / "step-000012"

    def hostile(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    cases = {}
    cases["pickle beside"] = hostile("a")
    (cases["pickle beside"] / "optimizer.pt").write_bytes(bomb(tmp_path))
    cases["pickle inside"] = hostile("b")
    (cases["pickle inside"] / "tensors.safetensors").write_bytes(bomb(tmp_path))
    for name, entry in (("path", "../a/optimizer.pt"), ("absolute", "/etc/passwd")):
        cases[name] = hostile(name)
        manifest = json.loads((cases[name] / "manifest.json").read_text())
        manifest["files"][entry] = manifest["files"]["state.json"]
        (cases[name] / "manifest.json").write_text(json.dumps(manifest))
    cases["link"] = hostile("c")
    (cases["link"] / "state.json").rename(tmp_path / "state.json")
    (cases["link"] / "state.json").symlink_to(tmp_path / "state.json")
    cases["pipe"] = hostile("e")
    (cases["pipe"] / "state.json").unlink()
    os.mkfifo(cases["pipe"] / "state.json")
    cases["deep"] = hostile("f")
    (cases["deep"] / "manifest.json").write_text("[" * 100_000)
    cases["other format"] = hostile("d")
    manifest = json.loads((good / "manifest.json").read_text()) | {"format": "crossrank-checkpoint-9"}
    (cases["other format"] / "manifest.json").write_text(json.dumps(manifest))
    for name, path in cases.items():
        if name == "pickle beside":
            assert load(path).tensors.shapes == load(good).tensors.shapes
        else:  # a link, or another version's, is not proven to be damaged
            with pytest.raises(OSError if name in ("link", "other format") else Damaged):
                load(path)
        assert not (tmp_path / "executed").exists(), name


def test_the_last_good_one_stays_until_the_next_is_written(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(1, Share.of({"a": torch.ones(3)}), {"n": 1})
    checkpoints.wait()
    (tmp_path / "checkpoints" / ".step-000002.1").mkdir()  # a process that died while it wrote
    assert checkpoints.newest().state == {"n": 1}
    checkpoints.save(2, Share.of({"a": torch.ones(3)}), {"n": 2})
    checkpoints.wait()
    assert [path.name for path in checkpoints._all()] == ["step-000002"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000002"]


def test_two_runs_in_one_folder(whole, tmp_path):
    folder = tmp_path / "run"
    long = [*RUN, "--num_train_epochs", "200", "--eval_strategy", "no", "--output_dir", folder]
    first = Ranks(["train", *long], 0, None, None, {})
    while not (folder / "checkpoints" / "step-000002").exists():
        assert first.processes[0].is_alive(), first.said
    second = crossrank("train", *long, check=False)
    assert second.returncode == 2
    assert "another run is writing" in second.stderr
    first.processes[0].kill()
    first.wait()


def test_numbers_that_go_wrong(tmp_path):
    options = [*RUN, "--learning_rate", "1e30", "--max_grad_norm", "0", "--warmup_ratio", "0", "--logging_steps", "4"]
    result = crossrank("train", *options, "--output_dir", tmp_path / "a", ranks=2, check=False)
    assert result.returncode == 1
    assert result.stderr.count("is not finite") == 1
    assert "step 2: the loss on rank" in result.stderr or "step 2: the gradient norm" in result.stderr
    assert "rows " in result.stderr
    # No checkpoint is written of weights that are no numbers.
    assert not list((tmp_path / "a").glob("checkpoints/step-*"))


SPIKE = """
import sys, torch
from trainer import __main__, train
backward = train.PlainStep.backward
def spike(self, current, rows, last):
    loss = backward(self, current, rows, last)
    if current.step == 3:
        next(p for p in self.model.parameters() if p.requires_grad).grad.fill_(float('inf'))
    return loss
train.PlainStep.backward = spike
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("backend", ["single", "ddp", "fsdp"])
def test_skipped_steps_are_counted(tmp_path, backend):
    """One infinite gradient, as hardware or a loss spike might bring: that step changes nothing, nor does AdamW count
    it, so a run that is resumed behind it goes on as the uninterrupted one."""
    (tmp_path / "spike.py").write_text(SPIKE)
    ranks, wiring = (0, []) if backend == "single" else (2, BACKENDS[backend])

    def run(folder: Path, *options: str) -> str:
        command = ["train", *RUN, *wiring, "--save_total_limit", "null", *options, "--output_dir", folder]
        return crossrank(*command, ranks=ranks, script=tmp_path / "spike.py", check=False).said

    assert "step 4 is skipped" in run(tmp_path / "a", "--skip_nonfinite", "1")
    assert json.loads((tmp_path / "a" / "results.json").read_text())["train"]["skipped_steps"] == 1
    assert len(events(tmp_path / "a", "train")) == 12
    folder = interrupted(tmp_path / "again", tmp_path / "a", 6)
    assert "resuming at step 6" in run(folder, "--skip_nonfinite", "1")
    assert bit_equal(folder, tmp_path / "a")
    assert losses(folder) == losses(tmp_path / "a")
    assert "step 4: the gradient norm is not finite" in run(tmp_path / "b")

"""Checkpoints of which each rank writes its part: what kills a rank, fills its disk or hides its files from the others
costs no checkpoint that was complete."""

import json
import os
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import crossrank, losses
from safetensors.torch import load_file, save_file
from torch._C._distributed_c10d import HashStore

from trainer.backends.share import Share
from trainer.base import tensor_files
from trainer.base.errors import TrainingFailed
from trainer.ranks import World
from trainer.run import post
from trainer.run.checkpoint import Checkpoints
from trainer.run.parts import Damaged, Tensors, index_of, part_names
from trainer.run.verified import load

RUN = ["--recipe", "demo", "--max_train_samples", "330", "--max_eval_samples", "101", "--max_test_samples", "101",
       "--logging_steps", "1", "--num_train_epochs", "2", "--save_steps", "2", "--eval_strategy", "no",
       "--dropout", "0.1", "--track_emissions", "false", "--write_report", "false", "--save_total_limit", "null",
       "--backend", "fsdp"]  # fmt: skip

# Rank 1, while it writes its third part.
FAULTY = """
import os, resource, signal, sys
from trainer import __main__
from trainer.base import tensor_files
write, paths = tensor_files.write, []
def faulty(path, tensors):
    paths.append(path)
    if len(paths) != 3 or os.environ["RANK"] != "1":
        return write(path, tensors)
    if sys.argv[-1] == "killed":
        path.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        return write(path, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
tensor_files.write = faulty
sys.exit(__main__.main(sys.argv[1:-1]))
"""
# Each rank has a working folder of its own, as each node would a disk of its own.
ELSEWHERE = """
import os, sys
from trainer import __main__
os.chdir(sys.argv[1 + int(os.environ["RANK"])])
sys.exit(__main__.main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    crossrank("train", *RUN, "--output_dir", folder, ranks=2)
    return folder


def assert_same_run(folder: Path, reference: Path) -> None:
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (folder, reference))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(folder) == losses(reference)


def faulty(tmp_path: Path, kind: str) -> str:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    command = ["train", *RUN, "--output_dir", tmp_path / "run", kind]
    result = crossrank(*command, ranks=2, script=script, check=False)
    assert result.returncode != 0
    assert sorted(os.listdir(tmp_path / "run/checkpoints"))[-2:] == ["step-000002", "step-000004"]
    return result.said


def test_a_rank_is_killed_while_it_writes(whole, tmp_path):
    assert "Traceback" not in faulty(tmp_path, "killed")
    said = crossrank("train", *RUN, "--output_dir", tmp_path / "run", ranks=2).said
    assert "resuming at step 4" in said
    assert_same_run(tmp_path / "run", whole)
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def test_one_rank_cannot_write_and_then_none_sees_the_others_files(whole, tmp_path):
    """Where there is no shared disk, rank 0 gathers, and sends what it reads: the checkpoint before is of parts."""
    said = faulty(tmp_path, "full")
    assert said.count("File too large") == 1
    assert "tensors-00001-of-00002.safetensors" in said
    assert "start the same command again" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    script, other = tmp_path / "elsewhere.py", tmp_path / "other"
    script.write_text(ELSEWHERE)
    other.mkdir()
    result = crossrank(tmp_path, other, "train", *RUN, "--output_dir", "run", ranks=2, script=script)
    assert "resuming at step 4" in result.said
    assert "not all ranks see run/checkpoints" in result.said
    assert_same_run(tmp_path / "run", whole)
    assert not (other / "run").exists()
    last, reference = (load(folder / "checkpoints/step-000012").tensors for folder in (tmp_path / "run", whole))
    assert last.shapes == reference.shapes
    for key, shape in last.shapes.items():
        assert torch.equal(*(own.run(key, 1, int(np.prod(shape))) for own in (last, reference))), key


@pytest.fixture
def two(tmp_path, monkeypatch):
    """The checkpoints of two ranks, here in one process, with what they say to each other."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(post, "LAST_CALL", 0.1)
    worlds = [World(rank, 2, rank, torch.device("cpu")) for rank in range(2)]
    made = [Checkpoints(tmp_path / "checkpoints", None, world) for world in worlds]
    for own, world in zip(made, worlds, strict=True):
        own.post = post.Post("of both", world, 600)
    yield made
    dist.destroy_process_group()


def begin(rank: Checkpoints) -> None:
    """To write this rank's half of `a`, as `save` does."""
    number = rank.world.rank
    share = Share({"a": (6,)}, {"a": (3 * number, torch.full((3,), number + 1.0))}, divided=True)
    work, last = (rank._write_part, ()) if number else (partial(rank._write, 7), (np.array([[[0, 3]], [[3, 3]]]),))
    state = () if number else ({},)
    rank.pending = rank.thread.submit(work, share, *state, *last, rank.post)


def test_an_error_of_all_ranks_waits_for_a_slow_part(two, tmp_path, monkeypatch):
    """Each has its checkpoint in the end, and none leaves before that: a launcher would end the others."""
    write = tensor_files.write

    def slow(path, tensors):
        time.sleep(0.5 if path.name == part_names(2)[1] else 0)
        return write(path, tensors)

    monkeypatch.setattr(tensor_files, "write", slow)
    for rank in two:
        begin(rank)
    two[1].close()
    assert load(tmp_path / "checkpoints/step-000007").tensors.run("a", 2, 4).tolist() == [1, 2]
    two[0].close()


def test_a_part_that_never_comes_is_said(two, tmp_path, said):
    begin(two[0])
    two[0].close(gone=True)
    assert not [*(tmp_path / "checkpoints").iterdir()]
    assert said == [
        "a checkpoint is given up: rank 1 did not write its part of a checkpoint; those before it are whole"
    ]


def test_a_rank_without_memory_tells_rank_0(two, monkeypatch):
    write = tensor_files.write

    def full(path, tensors):
        if path.name == part_names(2)[1]:
            raise MemoryError("no 3 numbers")
        return write(path, tensors)

    monkeypatch.setattr(tensor_files, "write", full)
    for rank in two:
        begin(rank)
    with pytest.raises(TrainingFailed, match="rank 1 could not write its part of a checkpoint: MemoryError: no 3"):
        two[0].close()
    with pytest.raises(MemoryError):
        two[1].close()


@pytest.mark.parametrize("file", ["tensors-00001-of-00002.safetensors", "index.json"])
def test_a_damaged_part_is_seen(whole, tmp_path, file):
    folder = Path(shutil.copytree(whole / "checkpoints/step-000012", tmp_path / "step-000012"))
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() > {*part_names(2)}
    data = bytearray((folder / file).read_bytes())
    data[-3] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(Damaged, match=file):
        load(folder)
    (folder / file).unlink()
    with pytest.raises(Damaged, match=f"{file} is missing"):
        load(folder)


def test_files_are_those_that_the_library_writes(tmp_path):
    tensors = {"b/é": torch.randn(3, 5), "a": torch.randn(7), "c": torch.tensor(2.0), "none": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "theirs")
    described = tensor_files.write(tmp_path / "ours", {name: tensor.numpy() for name, tensor in tensors.items()})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with (tmp_path / "ours").open("rb") as file:
        assert tensor_files.describe(file) == described
        file.seek(0)
        header = tensor_files.read_header(file)
        out = np.empty(6, np.float32)
        header.read(file, "b/é", 4, out)
        assert np.array_equal(out, tensors["b/é"].flatten().numpy()[4:10])
        with pytest.raises(ValueError, match="has not the numbers 10 to 16"):
            header.read(file, "b/é", 10, out)


def test_any_runs_of_a_tensor_are_read(tmp_path):
    """Of three ranks, of which one has nothing of the second tensor."""
    full = {"a": torch.arange(10.0), "b": torch.arange(3.0)}
    places = np.array([[[0, 4], [0, 2]], [[4, 4], [0, 0]], [[8, 2], [2, 1]]])
    for rank, name in enumerate(part_names(3)):
        own = zip(full, places[rank], strict=True)
        tensor_files.write(tmp_path / name, {k: full[k][at : at + n].numpy() for k, (at, n) in own if n})
    index = json.loads(json.dumps(index_of({"a": (5, 2), "b": (3,)}, places)))
    tensors = Tensors.of(tmp_path, index, shared=True)
    for key in full:
        for start in range(len(full[key]) + 1):
            for stop in range(start, len(full[key]) + 1):
                assert torch.equal(tensors.run(key, start, stop), full[key][start:stop])
    gap = places.copy()
    gap[0, 1] = 0
    with pytest.raises(TrainingFailed, match="do not make up b"):
        index_of({"a": (5, 2), "b": (3,)}, gap)
    index["tensors"]["b"]["runs"][1][0] = 1
    with pytest.raises(ValueError, match="do not make up b"):
        Tensors.of(tmp_path, index, shared=True)

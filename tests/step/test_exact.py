"""The same bits on any number of ranks, of whole runs: weights by their SHA-256, and every line of the metrics."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Ranks, crossrank, events, free_port
from families import save_encoder

from trainer.base.errors import TrainingFailed, UserError
from trainer.cli import parse_train
from trainer.ranks import World
from trainer.run.pins import pinned, pins
from trainer.run.state import Window
from trainer.step import memory
from trainer.step.exact import Tree
from trainer.train import prepare, train

CPU = torch.device("cpu")
# 330 = 5 * 64 + 10 pairs: forwards of 5 pairs accumulate in a shard of 16, and in the last batch shards have 2 or 3.
RUN = ["--recipe", "demo", "--load_best_model_at_end", "false", "--max_train_samples", "330",
       "--max_eval_samples", "61", "--max_test_samples", "61", "--logging_steps", "1", "--num_train_epochs", "2",
       "--eval_steps", "5", "--dropout", "0.1", "--max_grad_norm", "0.5", "--track_emissions", "false",
       "--write_report", "false", "--exact_shards", "4", "--per_device_train_batch_size", "5"]  # fmt: skip
# 33 pairs an epoch: the last batch is one pair, and seven shards of eight have none.
SHORT = [*RUN, "--max_train_samples", "33", "--max_eval_samples", "16", "--max_test_samples", "16",
         "--train_batch_size", "16", "--exact_shards", "8"]  # fmt: skip


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def metrics(folder: Path) -> list[dict]:
    """metrics.jsonl, but for its times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_per_second")} for line in lines]


def same_bits(folder: Path, reference: Path) -> bool:
    return sha256(folder) == sha256(reference) and metrics(folder) == metrics(reference)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The uninterrupted run of 12 steps, on one process, which clips, accumulates and drops out."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    crossrank("train", *RUN, "--output_dir", folder)
    assert any(event["grad_norm"] > 0.5 for event in events(folder, "train"))
    assert len(events(folder, "eval")) == 4
    return folder


def kill(folder: Path, ranks: int, when: Callable[[], object]) -> None:
    """Starts the run, with a checkpoint every second step, and kills its last rank once `when()` holds."""
    started = Ranks(["train", *RUN, "--save_steps", "2", "--output_dir", folder], ranks, None, None, {})
    while not when():
        assert all(process.is_alive() for process in started.processes), started.said
        time.sleep(0.002)
    os.kill(started.processes[-1].pid, signal.SIGKILL)
    assert started.wait().returncode != 0


def saved(folder: Path) -> list[Path]:
    return list(folder.glob("checkpoints/step-*"))


def full(*values: object):
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_gives_the_same_bits(whole, tmp_path, ranks):
    crossrank("train", *RUN, "--output_dir", tmp_path / "run", ranks=ranks)
    assert same_bits(tmp_path / "run", whole)
    about = json.loads((tmp_path / "run" / "about.json").read_text())
    assert (about["backend"], about["exact"]["exact_shards"], about["exact"]["device"]) == ("ddp", 4, "cpu")


@pytest.mark.parametrize(
    ("name", "bf16", "ranks"),
    [
        ("builtin", "true", (0, 4)),
        ("deberta-v2", "false", (0, 2)),
        ("modernbert", "true", (0, 4)),
        full("minilm", "true", (0, 2)),
        full("builtin", "false", (0, 1, 2, 4, 8)),
        full("builtin", "true", (0, 1, 2, 4, 8)),
        full("deberta-v2", "true", (0, 2, 4, 8)),
        full("modernbert", "false", (0, 2, 4, 8)),
        full("minilm", "true", (0, 2, 4, 8)),
        full("minilm", "false", (0, 2, 4, 8)),
        full("xlnet", "false", (0, 2, 4)),
    ],
)
def test_any_model(request, tmp_path, name, bf16, ranks):
    """A last batch of one pair leaves shards empty; forwards of one pair accumulate; two epochs."""
    model = name
    if name == "minilm":
        model = request.getfixturevalue("minilm")
    elif name != "builtin":
        model = save_encoder(tmp_path / "base", name)
    options = ["--model_name_or_path", model, "--bf16", bf16, "--per_device_train_batch_size", "1"]
    for number in ranks:
        crossrank("train", *SHORT, *options, "--output_dir", tmp_path / str(number), ranks=number)
    made = {number: sha256(tmp_path / str(number)) for number in ranks}
    assert len(set(made.values())) == 1, made
    assert all(same_bits(tmp_path / str(number), tmp_path / str(ranks[0])) for number in ranks)


def test_it_can_fail(whole, tmp_path):
    """With the library's sum over ranks in the tree's place bits differ, and losses do not: the tests above see it."""
    script = tmp_path / "all_reduce.py"
    script.write_text(
        "import sys\nfrom trainer.__main__ import main\nfrom trainer.step import exact\n"
        "exact.over_ranks = lambda own, world: world.sum(own)\nsys.exit(main())\n"
    )
    crossrank("train", *RUN, "--output_dir", tmp_path / "run", ranks=4, script=script)
    assert sha256(tmp_path / "run") != sha256(whole)
    ours, theirs = (torch.tensor([e["loss"] for e in events(f, "train")]) for f in (tmp_path / "run", whole))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(4, 0), (0, 2), full(2, 4), full(2, 0), full(4, 2)])
def test_killed_and_resumed_on_another_number_of_ranks(whole, tmp_path, before, after):
    folder = tmp_path / "run"
    kill(folder, before, lambda: saved(folder) and '"step": 5' in (folder / "metrics.jsonl").read_text())
    said = crossrank("train", *RUN, "--save_steps", "2", "--output_dir", folder, ranks=after).said
    assert re.search("resuming at step [24]", said)
    assert same_bits(folder, whole)


@pytest.mark.full
def test_a_rank_is_lost_for_good(tmp_path):
    """torchrun with one or two nodes: one is killed, agent and rank, and the other goes on to the same bits."""
    folder, port = tmp_path / "run", free_port()
    run = [*RUN, "--num_train_epochs", "20", "--save_steps", "5"]
    crossrank("train", *run, "--output_dir", tmp_path / "whole")
    wiring = ["--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "exact",
              "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", "join_timeout=120,last_call_timeout=3",
              "--max-restarts", "3", "--local-addr", "127.0.0.1"]  # fmt: skip
    start = [sys.executable, "-m", "torch.distributed.run", *wiring, "-m", "crossrank", "train"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    agents = []
    for name in ("stays", "goes"):
        with (tmp_path / name).open("w") as log:
            command = [*map(str, [*start, *run, "--output_dir", folder])]
            agents.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))
        time.sleep(2)  # the first one listens
    while not saved(folder):
        assert agents[0].poll() is None, (tmp_path / "stays").read_text()
        time.sleep(0.01)
    ranks = Path(f"/proc/{agents[1].pid}/task/{agents[1].pid}/children").read_text().split()
    for process in (agents[1].pid, *map(int, ranks)):
        os.kill(process, signal.SIGKILL)
    agents[1].wait()
    assert agents[0].wait(timeout=300) == 0, (tmp_path / "stays").read_text()
    said = (tmp_path / "stays").read_text() + (tmp_path / "goes").read_text()
    assert "2 rank(s), backend ddp" in said
    assert "1 rank(s), backend single" in said
    assert same_bits(folder, tmp_path / "whole")


def test_adapters(minilm, tmp_path):
    pytest.importorskip("peft")
    options = [
        "--model_name_or_path",
        minilm,
        "--lora_r",
        "4",
        "--max_steps",
        "3",
        "--per_device_train_batch_size",
        "4",
    ]
    for ranks in (0, 2):
        crossrank("train", *SHORT, *options, "--output_dir", tmp_path / str(ranks), ranks=ranks)
    assert same_bits(tmp_path / "0", tmp_path / "2")


def test_a_loss_is_counted_once_and_is_its_ranks():
    """Rank 0 counts the loss of all; where it is not finite, the rank that has computed it is named."""
    nan, norm = torch.tensor(torch.nan), torch.tensor(1.0)
    sound, other = Window.new(CPU), Window.new(CPU)
    sound.count(3, nan, norm, own=torch.tensor(0.5))
    other.count(3, torch.tensor(0.0), norm, own=nan)
    assert (sound.nonfinite.tolist(), other.nonfinite.tolist()) == ([0, 0], [3, 0])
    assert float(other.loss) == 0.0


CHANGES = {
    "--exact_shards 8": "exact_shards: saved 4, now 8",
    "--exact_threads 2": "exact_threads: saved 1, now 2",
    "--per_device_train_batch_size 16": "bits would differ: per_device_train_batch_size: saved 5, now 16",
    "--unpad false --per_device_eval_batch_size 8": "unpad: saved True, now False",
}


@pytest.mark.parametrize("named", [False, True])
def test_what_changes_bits_is_refused_at_resume(whole, tmp_path, named):
    folder = tmp_path / "run"
    kill(folder, 0, lambda: saved(folder))
    place = ["--output_dir", folder]
    if named:
        place = ["--output_dir", tmp_path / "new", "--resume_from_checkpoint", folder]
    for options, message in CHANGES.items():
        with pytest.raises(UserError) as caught:
            train(parse_train([*map(str, [*RUN, *options.split(), *place])]))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    state = saved(folder)[0] / "state.json"
    assert json.loads(state.read_text())["exact"]["torch"] == torch.__version__


def test_another_device_is_refused(tmp_path, monkeypatch):
    """Which a test can only pretend."""
    config = parse_train([*RUN, "--output_dir", str(tmp_path / "run")])
    trainer = prepare(config, World(0, 1, 0, CPU))
    trainer.output.close()
    state, world = trainer.state, trainer.world
    saved = state.to_json(trainer.identity, world, "single", 0, [])
    saved["exact"] = saved["exact"] | {"device": "cuda", "device_name": "NVIDIA H100"}
    with pytest.raises(UserError, match="device: saved 'cuda', now 'cpu'; device_name: saved 'NVIDIA H100', now "):
        trainer.identity.check(saved, {})


@pytest.mark.parametrize("ranks", [3, 8])
def test_ranks_that_do_not_divide_the_shards(tmp_path, ranks):
    result = crossrank("train", *RUN, "--output_dir", tmp_path / "run", ranks=ranks, check=False)
    assert result.returncode == 2
    assert f"exact_shards 4 cannot be dealt evenly to {ranks} ranks; start one of 1, 2, 4" in result.said
    assert not (tmp_path / "run").exists()


def test_memory_that_does_not_suffice_is_an_error(tmp_path, monkeypatch):
    """Halved micro-batches would be other bits."""
    trainer = prepare(parse_train([*RUN, "--output_dir", str(tmp_path / "run")]), World(0, 1, 0, CPU))
    trainer.output.close()
    monkeypatch.setattr(memory, "fits", lambda plain, step: False)
    with pytest.raises(TrainingFailed, match="does not hold 5 pairs in a forward, and under exact_shards"):
        memory.fit_micro_batches(trainer.plain, trainer.sampler)
    assert trainer.plain.micro_batch_size == 5


def test_pins_are_given_back(monkeypatch):
    config = parse_train([*RUN, "--exact_threads", "3"])
    before = torch.get_num_threads()
    with pinned(config, World(0, 1, 0, CPU)):
        assert torch.get_num_threads() == 3
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()
    assert pins(parse_train(["--recipe", "demo"]), World(0, 1, 0, CPU)) is None
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with (
        pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, got ':0:0'; unset it"),
        pinned(config, World(0, 1, 0, torch.device("cuda"))),
    ):
        pass


def test_a_tree_adds_in_its_order():
    """Each number is lost beside the one before, unless it is added to its neighbour first."""
    leaves = [1.0, 2.0**-24, 2.0**-24, 2.0**-24]
    tree = Tree()
    for leaf in leaves:
        tree.add(torch.tensor([leaf]))
    assert float(tree.total()) == 1.0 + 2.0**-23
    assert float(sum(torch.tensor([leaf]) for leaf in leaves)) == 1.0
    with pytest.raises(ValueError, match="unpack"):
        Tree().total()

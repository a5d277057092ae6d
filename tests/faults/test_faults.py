"""Real processes, real signals: a run that is killed anywhere ends as one that was left alone.

`make test` runs each kind of fault once; `make test-full` many times, at random moments, whose seeds it prints.
"""

import errno
import io
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Ranks, crossrank, events, losses, torchrun
from safetensors.torch import load_file

from launcher import command as launching
from trainer.__main__ import fail
from trainer.base.log import log, start_log
from trainer.config import Config
from trainer.ranks import World
from trainer.run.preempt import Preemption

RUN = ["--recipe", "demo", "--max_train_samples", "330", "--max_eval_samples", "101", "--max_test_samples", "101",
       "--logging_steps", "1", "--num_train_epochs", "8", "--save_steps", "3", "--eval_steps", "8", "--dropout", "0.1",
       "--eval_on_start", "false", "--load_best_model_at_end", "false", "--track_emissions", "false",
       "--write_report", "false"]  # fmt: skip


def full(*values: object):
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[int, Path]:
    """The uninterrupted run of 48 steps, on one process and on two ranks."""
    folders = {}
    for ranks in (0, 2):
        folders[ranks] = tmp_path_factory.mktemp("whole") / "run"
        crossrank("train", *RUN, "--output_dir", folders[ranks], ranks=ranks)
    return folders


def assert_same_run(folder: Path, reference: Path) -> None:
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (folder, reference))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(folder) == losses(reference)
    scores = [events(f, "eval") for f in (folder, reference)]
    assert scores[0] == scores[1]


def steps_of(folder: Path) -> int:
    """Steps logged so far."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b'"event": "train"') if file.exists() else 0


def wait_for(condition, ranks: Ranks) -> bool:
    """Until it holds; False where the run has ended before."""
    while not condition():
        if not all(process.is_alive() for process in ranks.processes):
            return False
        time.sleep(0.002)
    return True


def kill_once(folder: Path, ranks: int, victims: list[int], when, number=signal.SIGKILL) -> int:
    """Starts the run and sends `victims` a signal when `when()` holds. Returns the exit code; -1 if it was too late."""
    started = Ranks(["train", *RUN, "--output_dir", folder], ranks, None, None, {})
    if not wait_for(when, started):
        return started.wait().returncode
    for victim in victims:
        os.kill(started.processes[victim].pid, number)
    return started.wait().returncode


def finish(folder: Path, ranks: int, reference: Path) -> str:
    said = crossrank("train", *RUN, "--output_dir", folder, ranks=ranks).said
    assert_same_run(folder, reference)
    return said


@pytest.mark.parametrize(("ranks", "victims"), [(0, [0]), (2, [1]), full(2, [0]), full(2, [0, 1])])
def test_killed_at_a_step(whole, tmp_path, ranks, victims):
    folder = tmp_path / "run"
    assert kill_once(folder, ranks, victims, lambda: steps_of(folder) >= 7) not in (0, 2)
    assert "resuming at step" in finish(folder, ranks, whole[ranks])


def test_killed_while_it_saves(whole, tmp_path):
    folder = tmp_path / "run"
    assert kill_once(folder, 0, [0], lambda: list(folder.glob("checkpoints/.step-*"))) == -signal.SIGKILL
    finish(folder, 0, whole[0])
    assert not list(folder.glob("checkpoints/.step-*"))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(5))
def test_killed_again_and_again(whole, tmp_path, seed):
    """Ten kills: any rank or all, at any moment, be it start, step, save or evaluation. A run that ends makes way for
    another."""
    chance = random.Random(seed)
    ranks = [0, 2][seed % 2]
    number, kills, lost, recovery = 0, 0, [], []
    while kills < 10:
        folder = tmp_path / str(number)
        started, begun, back = Ranks(["train", *RUN, "--output_dir", folder], ranks, None, None, {}), time.time(), None
        delay = chance.uniform(0.5, 5.0)
        while time.time() < begun + delay and all(process.is_alive() for process in started.processes):
            time.sleep(0.002)
            if back is None and "resuming at step" in started.said:
                back = time.time() - begun
                recovery.append(back)
        victims = list(range(max(1, ranks))) if chance.random() < 0.3 else [chance.randrange(max(1, ranks))]
        alive = [started.processes[victim] for victim in victims if started.processes[victim].is_alive()]
        for process in alive:
            process.kill()
        if started.wait().returncode == 0:
            assert_same_run(folder, whole[ranks])
            number += 1
        elif alive:
            kills += 1
            saved = [int(p.name[5:]) for p in folder.glob("checkpoints/step-*")]
            lost.append(steps_of(folder) - max(saved, default=0))
        else:
            pytest.fail(started.said)
    if (folder / "config.yaml").exists() and not (folder / "results.json").exists():
        finish(folder, ranks, whole[ranks])
    print(f"seed {seed}: {kills} kills on {max(1, ranks)} rank(s), {number + 1} runs, steps lost at each {lost}, "
          f"seconds from a start to the step it goes on from {[round(s, 1) for s in recovery]}")  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "victims", "name"),
    [full(0, [0], "SIGTERM"), (2, [1], "SIGUSR1"), full(2, [0, 1], "SIGINT"), full(2, [0, 1], "SIGHUP")],
)
def test_asked_to_stop(whole, tmp_path, ranks, victims, name):
    """One rank's signal is all ranks': they save the same step, leave with 85, and go on exactly."""
    folder = tmp_path / "run"
    assert kill_once(folder, ranks, victims, lambda: steps_of(folder) >= 7, getattr(signal, name)) == 85
    saved = [int(p.name[5:]) for p in folder.glob("checkpoints/step-*")]
    assert max(saved) == steps_of(folder)  # not a step was lost
    finish(folder, ranks, whole[ranks])


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_closed(ignored, monkeypatch):
    """The run saves, though nobody reads what it says; under nohup it goes on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    preemption = Preemption(World(0, 1, 0, torch.device("cpu")), Config(dataset_name="builtin").preemption_signals)
    try:
        assert ("SIGHUP" in launching.torchrun(launching.TorchrunConfig(), 2)[-1]) == (not ignored)
        os.kill(os.getpid(), signal.SIGHUP)
        assert preemption.requested == (None if ignored else "SIGHUP")
    finally:
        preemption.close()
        signal.signal(signal.SIGHUP, before)
    start_log(is_main=True)
    monkeypatch.setattr(sys, "stderr", Closed())
    log.info("saved")


class Closed(io.StringIO):
    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


def test_rows_are_counted_from_0(capsys):
    """Which an error says once, wherever it comes from."""
    for text, said in (("a.csv, row 3: label is empty", True), ("no row", False), ("a\nb, row 3: c", False)):
        assert fail(2, f"error: {text}") == 2
        assert ("; rows count from 0" in capsys.readouterr().err) == said


def test_asked_to_stop_while_it_evaluates(whole, tmp_path):
    """The evaluation is left at the next batch, and done again."""
    folder, script = tmp_path / "run", tmp_path / "slow.py"
    script.write_text(
        "import sys, os, signal, time\nfrom trainer import __main__, evaluate\noriginal = evaluate.in_order\n"
        "from trainer.model.cross_encoder import CrossEncoder\nforward = CrossEncoder.forward\n"
        "def once(self, batch):\n"
        "    if not self.training and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    if not self.training:\n"
        "        time.sleep(0.05)\n"  # a vote comes a quarter of a second after the last one
        "    return forward(self, batch)\n"
        "CrossEncoder.forward = once\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    result = crossrank("train", *RUN, "--per_device_eval_batch_size", "8", "--output_dir", folder, ranks=2,
                       script=script, check=False)  # fmt: skip
    assert result.returncode == 85, result.said
    assert "stopped at step 8 by another rank" in result.said
    assert not events(folder, "eval")
    crossrank("train", *RUN, "--per_device_eval_batch_size", "8", "--output_dir", folder, ranks=2)
    assert losses(folder) == losses(whole[2])
    assert len(events(folder, "eval")) == len(events(whole[2], "eval"))


def test_asked_to_stop_while_it_tokenises(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\nfrom trainer import __main__\nfrom trainer.data import tokenize, tokens\ntokens.CHUNK = 10\n"
        "bar = tokenize.tqdm.update\n"
        "def slow(self, n):\n    time.sleep(0.1)\n    return bar(self, n)\n"
        "tokenize.tqdm.update = slow\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    cache = tmp_path / "cache"
    ranks = Ranks(["train", *RUN, "--output_dir", tmp_path / "run"], 0, None, script, {"CROSSRANK_CACHE": str(cache)})
    assert wait_for(lambda: list(cache.glob("tokens/*.lock")), ranks)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    result = ranks.wait()
    assert result.returncode == 85, result.said
    assert "stopped by SIGTERM before the first step" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    folder, script = tmp_path / "run", tmp_path / "stuck.py"
    script.write_text(
        "import sys, time\nfrom trainer import __main__, train\n"
        "def stuck(self):\n"
        "    print('stuck', flush=True)\n"
        "    for _ in range(6000):\n        time.sleep(0.1)\n"
        "train.Trainer.evaluate_before = stuck\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    ranks = Ranks(["train", *RUN, "--output_dir", folder], 0, None, script, {})
    assert wait_for(lambda: "stuck" in ranks.said, ranks)
    os.kill(ranks.processes[0].pid, signal.SIGINT)
    time.sleep(0.5)
    os.kill(ranks.processes[0].pid, signal.SIGINT)
    assert ranks.wait().returncode == 130


def test_torchrun_restarts_a_killed_rank(whole, tmp_path):
    """`--max-restarts`: the agent starts the ranks again, and they resume by themselves."""
    folder, script = tmp_path / "run", tmp_path / "once.py"
    script.write_text(
        "import os, signal, sys\nfrom trainer import __main__, train\nlog = train.Trainer.log\n"
        "def die(self, norm, rate):\n"
        "    log(self, norm, rate)\n"
        "    place = os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "    if self.state.step == 10 and place == ('1', '0'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "train.Trainer.log = die\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    result = torchrun("train", *RUN, "--output_dir", folder, ranks=2, options=("--max-restarts", "2"), script=script)
    assert re.search(r"resuming at step [69] ", result.said), result.said
    assert_same_run(folder, whole[2])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_disk_full_while_it_saves(whole, small_disk):
    """A checkpoint has 3.8 MB: the third one does not fit. Two stay, and the run goes on when there is space."""
    folder = small_disk / "run"
    keep = ["--save_total_limit", "null"]
    result = crossrank("train", *RUN, *keep, "--output_dir", folder, check=False)
    assert result.returncode == 1
    assert "make space and start the same command again" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(list(folder.glob("checkpoints/step-*"))) == 2
    assert not list(folder.glob("checkpoints/.step-*"))
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    said = crossrank("train", *RUN, *keep, "--output_dir", folder).said
    assert "resuming at step 6" in said
    assert_same_run(folder, whole[0])


@pytest.mark.parametrize("what", ["loop.CrossEncoder.save", "finish.write_predictions", "finish.write_json"])
def test_disk_full_at_the_end(whole, small_disk, what):
    """Space runs out as the model, the predictions or the results are written: all but that is safe."""
    script, folder = small_disk / "full.py", small_disk / "run"
    script.write_text(
        "import os, shutil, sys, time\nfrom trainer import __main__, finish, loop\n"
        f"write = {what}\n"
        "def when_full(*args):\n"
        # The last checkpoint makes room when it is done, by the removal of the oldest.
        f"    while {{*os.listdir({str(folder / 'checkpoints')!r})}} != {{'step-000045', 'step-000048'}}:\n"
        "        time.sleep(0.01)\n"
        f"    with open({str(small_disk / 'filler')!r}, 'wb', buffering=0) as filler:\n"
        f"        while free := shutil.disk_usage({str(small_disk)!r}).free:\n"
        "            filler.write(bytes(min(free, 65536)))\n"
        "    return write(*args)\n"
        f"{what} = when_full\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    result = crossrank("train", *RUN, "--output_dir", folder, script=script, check=False)
    assert result.returncode == 1
    assert f"cannot write into {folder}" in result.stderr
    assert "make space and start the same command again" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / "results.json").exists()
    (small_disk / "filler").unlink()
    assert "resuming at step 4" in crossrank("train", *RUN, "--output_dir", folder).said
    assert_same_run(folder, whole[0])
    assert (folder / "results.json").exists()


def test_disk_full_while_it_writes_the_cache(small_disk):
    cache = small_disk / "cache"
    (small_disk / "filler").write_bytes(bytes(8 * 2**20 - 8192))
    result = crossrank("train", *RUN, "--max_steps", "1", "--output_dir", small_disk.parent / "run", check=False,
                       CROSSRANK_CACHE=str(cache))  # fmt: skip
    assert result.returncode == 2
    assert f"the cache of the data cannot be written: {cache}" in result.stderr
    assert "No space left on device" in result.stderr
    assert "set CROSSRANK_CACHE to a folder" in result.stderr
    assert not list(cache.rglob(".*"))  # nothing half written


def test_a_folder_that_cannot_be_written(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    result = crossrank("train", *RUN, "--output_dir", small_disk / "run", check=False)
    assert result.returncode == 2
    assert f"{small_disk} may not be written to" in result.stderr


def test_a_rank_that_does_not_come(tmp_path):
    """The time limit of a collective ends the job with an error that says who is missing."""
    script = tmp_path / "late.py"
    script.write_text(
        "import os, sys, time\nfrom trainer import __main__, train\nbackward = train.PlainStep.backward\n"
        "def late(self, current, rows, last):\n"
        "    if current.step == 5 and self.world.rank == 1:\n        time.sleep(1000)\n"
        "    return backward(self, current, rows, last)\n"
        "train.PlainStep.backward = late\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    result = crossrank("train", *RUN, "--ddp_timeout", "5", "--output_dir", tmp_path / "run", ranks=2, script=script,
                       check=False)  # fmt: skip
    assert result.returncode != 0
    assert "step 6: rank 1 did not arrive within 5 s" in result.said
    assert "Traceback" not in result.said


@pytest.mark.full
def test_the_agent_of_torchrun_is_killed(whole, tmp_path):
    """Its ranks are orphans that continue; nobody else gets into their folder before they are done."""
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "crossrank",
    ]
    agent = subprocess.Popen([*command, "train", *RUN, "--output_dir", str(folder)], cwd=ROOT,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while steps_of(folder) < 7:
        assert agent.poll() is None
        time.sleep(0.01)
    agent.kill()
    agent.wait()
    while not (folder / "results.json").exists():
        result = crossrank("train", *RUN, "--output_dir", folder, ranks=2, check=False)
        assert result.returncode in (0, 2), result.said
    assert_same_run(folder, whole[2])

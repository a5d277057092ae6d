"""Many ranks: they meet, agree, and hear each other, whatever their number."""

import resource
from pathlib import Path

import pytest
import torch
from conftest import crossrank

from trainer.base.errors import UserError
from trainer.feed import Feed
from trainer.meeting import SPARE, allow_files
from trainer.ranks import World, _by_host

WORK = Path(__file__).parent / "ranks_work.py"


@pytest.mark.parametrize("ranks", [12, pytest.param(128, marks=pytest.mark.full)])
def test_many_ranks(ranks, tmp_path):
    """With fewer open files than they need, until they have asked for more."""
    crossrank(100, tmp_path, ranks=ranks, script=WORK)
    assert len((tmp_path / "draws").read_text().split()) == 2  # of the two epochs, one rank each: this host is one node
    assert {path.name for path in tmp_path.glob("crossrank-*/orders/*")} == {"lock"}


def test_a_rank_that_no_longer_votes(tmp_path):
    """Whoever else does says so; no other collective is under way."""
    script = tmp_path / "votes.py"
    script.write_text(
        "import sys, time\nfrom trainer import ranks\nfrom trainer.run.preempt import Preemption\n"
        "world = ranks.start(2)\npreemption = Preemption(world, [])\n"
        "try:\n    while True:\n        preemption.check()\n        time.sleep(1000 if world.rank == 2 else 0.05)\n"
        "except RuntimeError as error:\n    sys.exit(ranks.explain(error, world, 2))\n"
    )
    assert "rank 2 did not arrive within 2 s" in crossrank(ranks=3, script=script, check=False).said


@pytest.mark.parametrize(("launcher", "limit", "said"), [
    ({}, 100, r"among 500 ranks rank 0 needs 1,\d+"),
    ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, 100, f"among 500 ranks torchrun needs {500 + SPARE}"),
])  # fmt: skip
def test_too_few_descriptors(launcher, limit, said, monkeypatch):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    with pytest.raises(UserError, match=f"{said}.* open files, and 100 are allowed; say ulimit -n"):
        allow_files(0, 500)


def test_who_evaluates_makes_no_more_connections():
    """Of ranks that have not even met."""
    feed = Feed(None, World(0, 500, 0, torch.device("cpu")), 60)
    assert "group" not in vars(feed)
    with pytest.raises(ValueError, match="process group"):
        feed.group  # noqa: B018


def test_hosts_of_one_name():
    """Containers may share name and kernel: a local rank that is taken is of the next one."""
    assert _by_host([("a", "1", rank) for rank in (0, 1, 0, 1)]) == [[0, 1], [2, 3]]
    assert _by_host([("a", "1", 0), ("a", "2", 0), ("a", "1", 1), ("a", "2", 1)]) == [[0, 2], [1, 3]]
    assert _by_host([("b", "1", 0), ("a", "1", 0), ("b", "1", 1)]) == [[0, 2], [1]]

"""Many ranks: they meet, agree, and hear each other, whatever their number."""

from pathlib import Path

from conftest import crossrank

WORK = Path(__file__).parent / "ranks_work.py"


def test_sixteen(tmp_path):
    crossrank(tmp_path, ranks=16, script=WORK)

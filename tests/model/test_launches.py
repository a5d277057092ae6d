"""What a step and an evaluation's batch send to a GPU, on fake CUDA tensors: see benchmarks/fakecuda.

A GPU step of this size waits for the host, which launches each operation: one more is a slower step, and a value that
the host reads, or a second copy, is a stall. Where a change takes operations away, lower its numbers here; where it has
to add some, raise them, and say in the commit what they bring.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from benchmarks.fakecuda import library

# Device operations of a training step, and of a batch of an evaluation, bf16, dropout on, at most. Of the versions in
# constraints.txt.
CEILINGS = {
    "distilroberta": (930, 227),
    "bert": (375, 101),
    "distilbert": (354, 99),
    "deberta-v2": (494, 128),
    "modernbert": (331, 154),
    "roformer": (551, 129),
}


@pytest.fixture(scope="module")
def counted():
    """Of each case. In a process of its own, since torch has a CUDA device from then on."""
    if reason := library.why_not():
        pytest.skip(f"no fake CUDA device: {reason}")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.fakecuda", *CEILINGS]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CEILINGS)
def test_a_step_has_no_more_operations_no_host_read_and_one_copy(counted, case):
    train = counted[case]["train"]
    assert train["host_reads"] == []
    assert len(train["copies_to_device"]) == 1, train["copies_to_device"]
    assert train["operations"] <= CEILINGS[case][0], train["by_cause"]


@pytest.mark.parametrize("case", CEILINGS)
def test_an_evaluation_reads_logits_once_a_batch(counted, case):
    evaluation = counted[case]["evaluation"]
    assert len(evaluation["host_reads"]) == 1, evaluation["host_reads"]
    assert len(evaluation["copies_to_device"]) == 1, evaluation["copies_to_device"]
    assert evaluation["operations"] <= CEILINGS[case][1], evaluation["by_cause"]


def test_the_count_sees_the_parts_of_a_step(counted):
    """A part that is not counted, or not told from the rest, would let the others pass."""
    causes = counted["distilroberta"]["train"]["by_cause"]
    for part in ("linear", "dropout", "attention", "norm", "activation", "embeddings"):
        assert causes[part].keys() == {"forward", "backward"}
    assert {"batch", "loss", "clipping", "optimizer", "window"} <= causes.keys()

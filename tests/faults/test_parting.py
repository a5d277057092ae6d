"""Ranks part, whatever gloo's threads still have to let go of."""

from conftest import crossrank

# Of one core, on which a thread waits long for Python's lock: what is rare elsewhere comes within a few rounds.
PROGRAM = """
import os, sys
import numpy as np, torch
from trainer import ranks
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
world = ranks.start(60)
for number in range(20):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    sys.setswitchinterval(1e3)
    for _ in range(20):
        world.gather(np.ones(30000))
    ranks.stop()
    del model
    sys.setswitchinterval(0.005)
    store = f"file://{sys.argv[1]}/store-{number}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=world.rank, world_size=world.size)
print("parted")
"""


def test_a_model_outlives_its_group(tmp_path):
    """DistributedDataParallel's last reference goes while the threads of the group let go of gathered tensors."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    assert crossrank(tmp_path, ranks=2, script=script).stdout.split() == ["parted", "parted"]


STOPPED = """
import os, signal, sys
from trainer import __main__, train
read = train.read_pairs
def asked(config, team, preemption):
    found = read(config, team, preemption)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
        preemption.check_this_rank()
    return found
train.read_pairs = asked
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_one_that_is_stopped_alone_before_the_others_begin(tmp_path):
    """It leaves while it reads; the others, in their first message by then, say that it is gone, and keep its code."""
    script, code = tmp_path / "stopped.py", tmp_path / "code"
    script.write_text(STOPPED)
    result = crossrank("train", "--recipe", "demo", "--output_dir", tmp_path / "run", ranks=2, script=script,
                       check=False, CROSSRANK_EXIT_FILE=str(code))  # fmt: skip
    assert "Traceback" not in result.said
    assert code.read_text() == "85", result.said

"""What a rank does in test_ranks.py: each part by itself, on as many ranks as there are, two to a host.

Arguments: a folder of this run.
"""

import os
import sys

from trainer import ranks

rank = int(os.environ["RANK"])
os.environ["LOCAL_RANK"] = str(rank % 2)  # hosts of one name, as containers have
world = ranks.start(600)
expected = [[rank, rank + 1] if rank + 1 < world.size else [rank] for rank in range(0, world.size, 2)]
assert world.nodes() == expected, world.nodes()
assert world.num_nodes() == len(expected)
told = world.gather_values({"rank": rank, "text": "ä\n" * rank})
assert told is None if rank else told == [{"rank": r, "text": "ä\n" * r} for r in range(world.size)]
world.say(f"of {rank}", [rank])
assert world.wait_for(f"of {(rank + 1) % world.size}") == [(rank + 1) % world.size]
world.barrier()
ranks.stop()
sys.exit(0)

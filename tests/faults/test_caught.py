"""Errors that a program of several ranks catches: every rank has them, also where one alone meets what is wrong."""

import json
import shutil

from conftest import crossrank
from families import save_encoder

from trainer.data.builtin import pairs

PROGRAM = """
import os, sys
import crossrank
folder, rank = sys.argv[1], os.environ["RANK"]
os.chdir(f"{folder}/node{rank}")
own = {"output_dir": f"{folder}/run", "max_steps": 1, "track_emissions": False, "write_report": False,
       "train_file": f"{folder}/good.jsonl"}
for change in ({"train_file": f"{folder}/gone.jsonl"}, {"train_file": f"{folder}/bad.jsonl"},
               {"model_name_or_path": f"{folder}/model"}, {"model_name_or_path": f"{folder}/model", "backend": "fsdp"},
               {"model_name_or_path": "./model"}):
    try:
        crossrank.train(**(own | {"model_name_or_path": "builtin"} | change))
    except crossrank.UserError as error:
        with open(f"{folder}/said.{rank}", "a") as file:
            file.write(f"{error}\\n")
print(crossrank.train(**own, model_name_or_path="builtin")["world_size"])
"""


def test_every_rank_has_the_error(tmp_path):
    """And goes on: a sweep's next run is good."""
    rows = pairs("train")[:40]
    for name, own in (("good", rows), ("bad", [*rows[:7], {**rows[7], "premise": ""}, *rows[8:]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    whole = save_encoder(tmp_path / "node0" / "model", "bert")
    shutil.copytree(whole, tmp_path / "model")
    shutil.copytree(whole, tmp_path / "node1" / "model")
    for copy in ("model", "node1/model"):
        weights = tmp_path / copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    assert crossrank(tmp_path, ranks=2, script=script).stdout.split() == ["2", "2"]
    one, other = ((tmp_path / f"said.{rank}").read_text().splitlines() for rank in (0, 1))
    assert one == other
    assert len(one) == 5
    assert "gone.jsonl" in one[0]
    assert "bad.jsonl, row 7: premise is empty" in one[1]
    assert "has no weights that can be loaded" in one[2]
    assert one[3] == one[2]
    assert "./model has no weights that can be loaded" in one[4]

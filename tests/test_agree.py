"""Ranks that would train different runs are refused before the first step, with what differs and where."""

import json

import pytest
from conftest import Ranks

from trainer.data.builtin import pairs

RUN = ["train", "--model_name_or_path", "builtin", "--max_steps", "3", "--train_batch_size", "16",
       "--logging_steps", "1", "--track_emissions", "false", "--write_report", "false"]  # fmt: skip


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def others() -> dict:
    rows = pairs("train")[:80]
    swapped = [*rows[:5], {**rows[5], "label": (rows[5]["label"] + 1) % 3}, *rows[6:]]
    return {
        "another rate": (["--learning_rate", "1e-3"], rows, "learning_rate is 5e-05 on rank 0"),
        "another seed": (["--seed", "7"], rows, "seed is 42 on rank 0"),
        "another step of saving": (["--save_steps", "2"], rows, "save_steps is 500 on rank 0"),
        "another backend": (["--unpad", "false"], rows, "unpad is True on rank 0"),
        "another label": ([], swapped, "train is "),
        "fewer rows": ([], rows[:40], "train is "),
        "another model": (["--model_name_or_path", "MODEL"], rows, "model_name_or_path is builtin on rank 0"),
    }


@pytest.mark.parametrize("what", others())
def test_ranks_of_different_runs(what, tmp_path, builtin_model):
    options, rows, expected = others()[what]
    for rank, own in enumerate((pairs("train")[:80], rows)):
        (tmp_path / str(rank)).mkdir()
        write(tmp_path / str(rank) / "train.jsonl", own)
    options = [str(builtin_model) if option == "MODEL" else option for option in options]
    common = [*RUN, "--output_dir", tmp_path / "run", "--train_file"]
    command = [[*common, tmp_path / str(rank) / "train.jsonl", *(options if rank else [])] for rank in range(2)]
    result = Ranks(command[0], 2, None, None, {}, others={1: command[1]}).wait()
    assert result.returncode == 2, result.said
    assert result.said.count("the ranks would train different runs") == 1
    assert expected in result.said
    assert "on rank 1" in result.said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

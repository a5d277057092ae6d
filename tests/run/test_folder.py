"""Which folder a run may write into: an empty one, or its own. A user's files are never overwritten."""

import json
from dataclasses import asdict

import pytest
from conftest import crossrank

from trainer.base.errors import UserError
from trainer.base.yaml_files import dump
from trainer.config import Config
from trainer.run.folder import WRITTEN, find_run, write_config

ABOUT = {"padding": {}, "hardware": {}, "global_batch_size": 64, "backend": "ddp"}


def config(folder, **fields) -> Config:
    return Config(dataset_name="builtin", output_dir=str(folder), **fields)


def put(folder, name, text="") -> None:
    if name in ("adapter", "checkpoints", "model", "predictions", "tensorboard", "wandb"):
        (folder / name / "inside").mkdir(parents=True)
    else:
        (folder / name).write_text(text or "mine\n")


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_run_would_write_is_not_there(tmp_path, name):
    put(tmp_path, name, "seed: 1\n" if name == "config.yaml" else "")
    with pytest.raises(UserError, match=rf"{tmp_path} holds {name}, .* never overwritten; move it, or choose another"):
        find_run(config(tmp_path))


@pytest.mark.parametrize("kind", ["its first lines", "with a comment", "another's about.json", "a damaged about.json"])
def test_a_config_file_of_the_users_is_no_run(tmp_path, kind):
    """Beside it lie the checkpoints of another run, which would be resumed, and deleted one by one."""
    text = dump(asdict(config(tmp_path)))
    text = {"its first lines": "seed: 1\n", "with a comment": f"# mine\n{text}"}.get(kind, f"{text}\n\n")
    (tmp_path / "config.yaml").write_text(text)
    put(tmp_path, "checkpoints")
    if "about" in kind:
        (tmp_path / "about.json").write_text('{"padding": 3, "author": "me"}' if "another" in kind else "[")
    with pytest.raises(UserError, match="never overwritten"):
        find_run(config(tmp_path))


@pytest.mark.parametrize("kind", ["killed early", "older", "edited"])
def test_a_run_is_known_by_what_it_has_written(tmp_path, kind):
    """Also one whose config.yaml lacks the fields of this version, or was changed, or that had no time for more."""
    write_config(tmp_path, config(tmp_path))
    if kind != "killed early":
        (tmp_path / "about.json").write_text(json.dumps(ABOUT))
        put(tmp_path, "checkpoints")
    if kind == "older":
        kept = {name: value for name, value in asdict(config(tmp_path)).items() if "hub" not in name}
        (tmp_path / "config.yaml").write_text(dump(dict(sorted(kept.items()))))
    if kind == "edited":
        (tmp_path / "config.yaml").write_text("# mine\n" + (tmp_path / "config.yaml").read_text())
    assert find_run(config(tmp_path)).resuming
    with pytest.raises(UserError, match="of another config"):
        find_run(config(tmp_path, seed=7))


def test_strangers_that_are_in_nobodys_way(tmp_path):
    for name in ("notes.txt", "train.jsonl", "README.md", ".lock"):
        (tmp_path / name).write_text("mine")
    assert not find_run(config(tmp_path)).resuming
    assert not find_run(config(tmp_path / "new")).resuming


def test_a_config_without_fields_is_no_config_of_a_run(tmp_path):
    (tmp_path / "about.json").write_text(json.dumps(ABOUT))
    (tmp_path / "config.yaml").write_text("{}\n")
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        find_run(config(tmp_path))


def test_the_config_file_in_the_run_folder_stays(tmp_path):
    mine = "# my settings\nmodel_name_or_path: builtin\ndataset_name: builtin\nmax_steps: 2\n"
    (tmp_path / "config.yaml").write_text(mine)
    result = crossrank("train", "--config", tmp_path / "config.yaml", "--output_dir", tmp_path, check=False)
    assert result.returncode == 2
    assert f"{tmp_path} holds config.yaml" in result.stderr
    assert (tmp_path / "config.yaml").read_text() == mine
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]

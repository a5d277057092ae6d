"""import crossrank and python -m crossrank are crossrank's own, whatever lies in the working folder."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

THEIRS = "raise SystemExit('the user\\'s own file was run')\n"


@pytest.fixture
def folder(tmp_path):
    """Where a user has files by the names of our packages, and of those that we import."""
    for name in ("trainer", "launcher", "base", "evaluate", "datasets", "torch", "numpy", "tqdm", "pathlib"):
        (tmp_path / f"{name}.py").write_text(THEIRS)
    return tmp_path


def run(folder, *command, **more):
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, **more)


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "crossrank", "--version"],
        ["-m", "crossrank", "launch", "local", "--nproc", "2", "--dry_run", "--", "train", "--recipe", "demo"],
        [f"{sys.prefix}/bin/torchrun", "--standalone", "--nproc-per-node", "1", "-m", "crossrank", "--version"],
        ["-m", "crossrank", "agent", "--standalone", "--nproc-per-node", "1", "-m", "crossrank", "--version"],
    ],
    ids=["module", "launch", "torchrun", "agent"],
)
def test_a_file_in_the_working_folder_hides_nothing(folder, command):
    result = run(folder, *command)
    assert result.returncode == 0, result.stderr
    assert "own file" not in result.stdout + result.stderr


def test_our_packages_are_our_own_in_a_program(tmp_path):
    for name in ("trainer", "launcher", "base"):
        (tmp_path / f"{name}.py").write_text(THEIRS)
    result = run(tmp_path, "-c", "import crossrank; print(crossrank.__version__, crossrank.train)")
    assert result.returncode == 0, result.stderr


def test_what_is_launched_is_our_own_file(folder):
    """`python -m crossrank` would start the user's."""
    (folder / "crossrank.py").write_text(THEIRS)
    command = [str(ROOT / "crossrank.py"), "launch", "local", "--nproc", "2", "--", "train", "--recipe", "demo",
               "--max_train_samples", "64", "--max_eval_samples", "9", "--max_test_samples", "9", "--max_steps", "1",
               "--track_emissions=0", "--write_report=0", "--output_dir=run"]  # fmt: skip
    result = run(folder, *command)
    assert result.returncode == 0, result.stderr
    assert (folder / "run" / "results.json").exists()


def test_a_package_that_was_there_first_is_one_clear_error(tmp_path):
    (tmp_path / "trainer.py").write_text("")
    result = run(tmp_path, "-c", "import trainer\nimport crossrank")
    assert "ImportError: crossrank's package trainer is hidden by" in result.stderr
    assert "import crossrank first" in result.stderr


def test_importing_is_quick_and_names_are_complete():
    code = "import sys, crossrank; assert 'torch' not in sys.modules; print(*(getattr(crossrank, n) for n in {}))"
    assert run(ROOT, "-c", code.format("crossrank.__all__")).stdout.count("<function") == 4
    assert "UserError" in run(ROOT, "-c", "import crossrank; print(crossrank.UserError, dir(crossrank))").stdout
    result = run(ROOT, "-c", "import crossrank; crossrank.trian")
    assert "has no attribute 'trian'" in result.stderr


def test_a_source_distribution_has_its_tests(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv", ".git", "*.egg-info", "runs", "__pycache__"))
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    built = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (made,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(made, tmp_path / "unpacked", filter="data")
    (root,) = (tmp_path / "unpacked").iterdir()
    for name in (
        "Makefile",
        "README.md",
        "LICENSE",
        ".ci/run",
        "constraints.txt",
        "ds_configs/zero1.json",
        "slurm/train.sbatch",
        "launcher/py.typed",
        "tests/launcher/golden/torchrun.sbatch",
        "trainer/py.typed",
        "docs/exactness.md",
    ):
        assert (root / name).exists(), name
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/test_layers.py",
        "tests/test_config.py",
        "-p",
        "no:cacheprovider",
    ]
    ran = subprocess.run(tests, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout

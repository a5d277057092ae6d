import json

from conftest import crossrank


def test_doctor(tmp_path):
    found = json.loads(crossrank("doctor", "--json", "--ranks", "2", "--output_dir", tmp_path).stdout)
    checks = {check["name"]: check for check in found}
    assert {"Python", "torch", "GPU", "bf16", "transformers", "deepspeed", "Slurm", f"disk at {tmp_path}"} <= set(
        checks
    )
    assert checks["2 ranks"]["ok"] is True
    assert "sum is right" in checks["2 ranks"]["value"]
    assert "ok  torch:" in crossrank("doctor", "--output_dir", tmp_path).stdout


def test_what_is_wrong_comes_with_its_fix(tmp_path):
    (tmp_path / "file").write_text("")
    result = crossrank("doctor", "--output_dir", tmp_path / "file" / "runs", check=False)
    assert result.returncode == 1
    assert "WRONG  disk" in result.stdout
    assert "choose an --output_dir" in result.stdout

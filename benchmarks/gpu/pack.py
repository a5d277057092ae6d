"""What a GPU machine without network needs beside the checkout, in one folder of less than 60 MiB.

    python -m benchmarks.gpu.pack FOLDER

It holds the real pairs, RoBERTa's tokenizer, all-MiniLM-L6-v2 in 16 bit, and wheels of what a machine with CUDA torch
and transformers lacks. distilroberta's shape needs no file: its weights are drawn from a seed over there.
"""

from __future__ import annotations

import argparse
import lzma
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks import common

LIMIT = 60 * 2**20
LACKING = """
    annotated-types arrow codecarbon datasets deepspeed dill docstring-parser evaluate hjson multiprocess
    pycountry pydantic pydantic-core rapidfuzz typing-inspection
""".split()  # noqa: SIM905
# In 16-bit numbers every second byte is of the same kind: exponents, which repeat, and fractions, which do not.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3, "lp": 1, "pb": 1}]


def minilm_in_16_bit(folder: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    source = common.model_folder("minilm", folder)
    AutoModel.from_pretrained(source).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.with_suffix(".safetensors.xz").write_bytes(lzma.compress(weights.read_bytes(), filters=FILTERS))
    weights.unlink()


def unpack_minilm(pack: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModel

    shutil.copytree(pack / "minilm", folder)
    packed = folder / "model.safetensors.xz"
    packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
    packed.unlink()
    # Trainers take a folder's number format for that of their weights, and these are to train in fp32.
    AutoModel.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)


def wheels(folder: Path, names: list[str], python: str) -> None:
    """What the index has for Linux and the Python over there; a package without a wheel (DeepSpeed) is built here."""
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    there = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    there += [f"--platform={name}_x86_64" for name in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17",
                                                       "manylinux2014", "manylinux1")]  # fmt: skip
    for name in names:
        wanted = ["--no-deps", f"{name}=={version(name)}"]
        if subprocess.run([*pip, "download", "-d", folder, *there, *wanted], capture_output=True).returncode != 0:
            subprocess.run([*pip, "wheel", "-w", folder, *wanted], check=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--data", type=Path, default=common.SHARED / "data" / "allnli")
    options.add_argument("--tokenizer", type=Path, default=common.SHARED / "tokenizers" / "roberta-base")
    options.add_argument("--wheels", nargs="*", default=LACKING, help="packages that the GPU machine lacks")
    options.add_argument("--python", default="3.12", help="of the GPU machine")
    chosen = options.parse_args()
    if chosen.folder.exists():
        sys.exit(f"{chosen.folder} is there already")
    (chosen.folder / "data" / "allnli").mkdir(parents=True)
    for split in ("train", "dev", "test"):
        shutil.copy(chosen.data / f"{split}.parquet", chosen.folder / "data" / "allnli")
    shutil.copytree(chosen.tokenizer, chosen.folder / "tokenizers" / "roberta-base")
    minilm_in_16_bit(chosen.folder / "minilm")
    wheels(chosen.folder / "wheels", chosen.wheels, chosen.python)
    size = sum(path.stat().st_size for path in chosen.folder.rglob("*") if path.is_file())
    print(f"{chosen.folder}: {size / 2**20:.1f} MiB")
    if size > LIMIT:
        sys.exit(f"more than {LIMIT // 2**20} MiB")


if __name__ == "__main__":
    main()

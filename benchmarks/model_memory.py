"""Peak memory a parameter, on rank 0 and on the others: at the start, in steps, while checkpoints are saved, at resume.

    python -m benchmarks.model_memory [--backends single ddp fsdp zero1 zero2 zero3] [--ranks 2] [--hidden 768]

An encoder of BERT's kind with random weights on the CPU, ranks on gloo. The kernel keeps the largest resident set of a
process since the last reset (/proc/PID/clear_refs, proc(5)). Each run is done with a small model too: the difference of
the peaks over that of the parameters, so imports and all else that does not grow with the model is not in it. On a
CPU the device's memory and the host's are the same. The third and the fourth step save, so that one save is
under way when the next begins.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

PHASES = ("start", "step", "save", "end", "resume")
WIRING = {
    "single": ["--backend", "single"], "ddp": ["--backend", "ddp"], "fsdp": ["--backend", "fsdp"],
    "zero1": ["--deepspeed", "zero1"], "zero2": ["--deepspeed", "zero2"], "zero3": ["--deepspeed", "zero3"],
}  # fmt: skip


def status(field: str) -> int:
    """Bytes, of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def give_back() -> None:
    """What the C library keeps for the next request."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """A folder with the config and the weights of an encoder, without a head."""
    import torch
    from transformers import BertConfig, BertModel

    from trainer.data.builtin import make_tokenizer

    tokenizer = make_tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers,
                        num_attention_heads=hidden // 64, intermediate_size=4 * hidden,
                        max_position_embeddings=162, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(command: list[str], env: dict[str, str], out: str) -> None:
    """One rank: the peaks of its phases, less what it had before, into the file `out`."""
    os.environ |= env
    from trainer.base.environment import set_libraries

    set_libraries()
    from trainer import ranks, train
    from trainer.cli import parse_train

    # Without this glibc would keep what is freed, and the next phase would show the peak of the one before.
    vars(ranks)["keep_freed_memory"] = give_back
    world = ranks.start(600)
    give_back()
    before = status("VmRSS")
    peaks: dict[str, int] = {}

    def phase(name: str) -> None:
        peaks[name] = max(peaks.get(name, 0), status("VmHWM") - before)
        give_back()
        reset_peak()

    reset_peak()
    trainer = train.prepare(parse_train(command), world)
    resumed = trainer.state.step > 0
    phase("resume" if resumed else "start")
    save = trainer.__class__.save

    def saved(self: Any) -> None:
        if self.state.step <= 2:
            phase("step")
            return
        save(self)
        phase("save")

    if not resumed:
        trainer.__class__.save = saved  # type: ignore[method-assign]
        trainer.loop()
        trainer.output.checkpoints.wait()
        phase("save")
        trainer.save_model()
        phase("end")
    size = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
    Path(out).write_text(json.dumps({"parameters": size, "peaks": peaks}))
    os._exit(0)


def run(command: list[str], num_ranks: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank says. Raises RuntimeError where one fails."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    processes, files = [], [folder / f"rank{rank}.json" for rank in range(num_ranks)]
    for rank, file in enumerate(files):
        file.unlink(missing_ok=True)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port}  # fmt: skip
        env = {name: str(value) for name, value in place.items()} if num_ranks > 1 else {}
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "CROSSRANK_CACHE": str(folder / "cache")}
        context = multiprocessing.get_context("spawn")
        processes.append(context.Process(target=measure, args=(command, env, str(file))))
        processes[-1].start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a rank of {' '.join(command)} failed")
    return [json.loads(file.read_text()) for file in files]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backends", nargs="+", choices=WIRING, default=[*WIRING])
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--hidden", type=int, default=768)
    options.add_argument("--layers", type=int, default=12)
    chosen = options.parse_args()
    print(f"| bytes a parameter | rank | {' | '.join(PHASES)} |\n|---|---|{'---|' * len(PHASES)}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "encoder", chosen.hidden, chosen.layers)
        make_model(folder / "small", 64, 1)
        for name in chosen.backends:
            command = [
                "--recipe", "demo", "--model_name_or_path", str(folder / "encoder"), *WIRING[name], "--output_dir",
                str(folder / name), "--max_train_samples", "32", "--max_eval_samples", "8", "--max_test_samples", "8",
                "--train_batch_size", "8", "--num_train_epochs", "1", "--max_length", "64", "--save_steps", "1",
                "--eval_strategy", "no", "--load_best_model_at_end", "false", "--track_emissions", "false",
                "--write_report", "false", "--save_total_limit", "2", "--logging_steps", "1",
                "--per_device_train_batch_size", "4",
            ]  # fmt: skip
            num_ranks = 1 if name == "single" else chosen.ranks
            found = []
            for size in ("encoder", "small"):
                own = [part.replace("/encoder", f"/{size}") for part in command]
                first, again = (run(own, num_ranks, folder) for _ in range(2))
                shutil.rmtree(folder / name)
                found.append([(a["parameters"], a["peaks"] | b["peaks"]) for a, b in zip(first, again, strict=True)])
            for rank, ((size, peaks), (less, others)) in enumerate(zip(*found, strict=True)):
                figures = " | ".join(f"{(peaks[phase] - others[phase]) / (size - less):.1f}" for phase in PHASES)
                print(f"| {name} | {rank} | {figures} |", flush=True)


if __name__ == "__main__":
    main()

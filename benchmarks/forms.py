"""The forms that a step can have, side by side: plain, static, captured as CUDA graphs, and plain with compiled layers.

    python -m benchmarks.forms [--model distilroberta] [--forms plain captured]

Each run is a user's command in a process of its own; the first window, in which graphs are recorded and checked, is not
timed. Without a GPU there is nothing to capture.
"""

from __future__ import annotations

import torch

from benchmarks import common

FORMS: dict[str, list[str]] = {
    "plain": ["step_form=plain"],
    "static": ["step_form=static"],
    "captured": ["step_form=captured"],
    "compiled": ["step_form=plain", "torch_compile=true"],
}


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--forms", nargs="+", choices=FORMS, help="plain is the first of them; None = all there are")
    options.add_argument("--steps", type=int, default=150, help="of a run; the first window is not timed")
    options.add_argument("--window", type=int, default=50, help="steps between log events")
    chosen = options.parse_args()
    possible = [name for name in FORMS if name != "captured" or torch.cuda.is_available()]
    forms = ["plain", *(name for name in chosen.forms or possible if name != "plain")]
    model = common.model_folder(chosen.model, chosen.tokenizer)
    settings: list[object] = ["--model", model, "--data", chosen.data, "--batch", chosen.batch, "--bf16", chosen.bf16]
    settings += ["--steps", chosen.steps, "--window", chosen.window]
    contenders = {form: ["crossrank", *settings, "--more", *FORMS[form]] for form in forms}
    runs = common.alternate(contenders, chosen.rounds, "benchmarks.contenders")
    memory = "peak_gpu_mb" if "peak_gpu_mb" in runs["plain"][0] else "peak_rss_mb"
    results = {}
    for form in forms:
        speed = common.median(runs[form], "samples_per_second")
        results[form] = {
            "taken": runs[form][0]["step_form"],
            "milliseconds_a_step": 1000 * chosen.batch / speed,
            "against_plain": common.ratio(runs[form], runs["plain"], "samples_per_second"),
            memory: common.median(runs[form], memory),
        }
        shown = results[form]
        print(f"{form} ({shown['taken']}): {shown['milliseconds_a_step']:.2f} ms a step, "
              f"{shown['against_plain']['ratio']:.2f} times plain, {shown[memory]:,.0f} MB")  # fmt: skip
    number_format = "bf16" if chosen.bf16 else "fp32"
    common.save(f"forms-{chosen.model.split('/')[-1]}-{number_format}", chosen, {"forms": results, "runs": runs})


if __name__ == "__main__":
    main()

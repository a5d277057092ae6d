"""Against transformers' Trainer on pairs tokenised beforehand and grouped by length, alternating.

python -m benchmarks.vs_transformers [--bf16 false] [--model minilm]
"""

from benchmarks.versus import main

if __name__ == "__main__":
    main("transformers", ("training",))

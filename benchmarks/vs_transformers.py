"""Against transformers' Trainer on pairs tokenised beforehand and grouped by length, alternating.

python -m benchmarks.vs_transformers [--bf16 false] [--model minilm]
"""

from benchmarks.versus import main

if __name__ == "__main__":
    # Its sampler sorts every 50 batches by length, longest first: only whole fifties have the mean length.
    main("transformers", ("training",), steps=100, window=50)

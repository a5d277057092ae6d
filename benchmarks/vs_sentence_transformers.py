"""Against sentence-transformers' CrossEncoderTrainer and CrossEncoder.predict, alternating.

python -m benchmarks.vs_sentence_transformers [--bf16 false] [--model minilm] [--what evaluation]
"""

from benchmarks.versus import main

if __name__ == "__main__":
    main("sentence_transformers", ("training", "evaluation"))

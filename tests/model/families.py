"""Tiny base models of many families, saved as their makers save them: an encoder without a head, and a tokenizer."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

from trainer.data.builtin import make_tokenizer

USUAL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BERT = USUAL | {"max_position_embeddings": 130}
ROBERTA = USUAL | {"max_position_embeddings": 132, "pad_token_id": 1, "type_vocab_size": 1}
LLAMA = BERT | {"num_key_value_heads": 4, "pad_token_id": None, "bos_token_id": 2, "eos_token_id": 3}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 130, "pad_token_id": None, "eos_token_id": 3}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2,
    "pad_token_id": 0, "max_position_embeddings": 130, "dropout": 0.0,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0, "eos_token_id": 3}
V3 = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True,
    "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
SHAPES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "deberta": BERT,
    "deberta-v2": BERT | V3 | {"conv_kernel_size": 3},
    "bart": BART,
    "mbart": BART,
    "t5": T5,
    "eurobert": BERT | {"num_key_value_heads": 4, "pad_token_id": 0},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 130, "pad_index": 0},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "pad_token_id": 0},
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 8},
    "gemma": LLAMA | {"head_dim": 8},
    "funnel": {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1]},
    "esm": ROBERTA | {"mask_token_id": 4, "token_dropout": True},
    "convbert": BERT | {"embedding_size": 16},
    "big_bird": BERT | {"pad_token_id": 0},
    "luke": BERT | {"entity_vocab_size": 10, "entity_emb_size": 16},
    "roformer": BERT,
    "modernbert": BERT | {"pad_token_id": 0, "classifier_pooling": "mean"},
    "albert": BERT | {"embedding_size": 16},
    "mpnet": ROBERTA,
    "ernie": BERT,
    "rembert": BERT | {"input_embedding_size": 16},
    "megatron-bert": BERT,
    "roberta-prelayernorm": ROBERTA,
    "xlm-roberta-xl": ROBERTA,
    "nomic_bert": BERT | {"pad_token_id": 0},
    "gte": BERT | {"pad_token_id": 0},
}


def save_encoder(folder: Path, family: str, **changes) -> Path:
    """`changes` of its config; its dropout is 0, and its tokenizer is the builtin one, with token types."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "[SEP]"  # the number 3, which is the last token of every pair
    tokens = "n_words" if family == "xlm" else "vocab_size"
    config = AutoConfig.for_model(family, **{tokens: len(tokenizer)} | SHAPES[family] | changes)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float) and name not in changes:
            setattr(config, name, 0.0)
    if family == "funnel":  # it has two base models
        config.architectures = ["FunnelModel"]
    if family == "t5":  # the base model's config has no default
        config.decoder_start_token_id = 0
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    with torch.no_grad():  # weights of a trained model's size, so that a difference would show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

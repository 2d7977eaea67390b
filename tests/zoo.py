"""Small random models of transformers' causal architectures."""

import dataclasses

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB_SIZE = 2048  # of the demo's tokenizer
SIZES = {
    # width, depth and heads, by their many names
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "emb_dim", "dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "dff", "d_ff"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp", "dense_intermediate_size"), 64),
    **{"num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 8, "vocab_size": VOCAB_SIZE},
    # windows shorter than the prompts, positions enough for them
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "keep_window_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    # mixtures of experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **{"num_experts_per_tok": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "num_expert_group": 1},
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **{"shared_intermediate_size": 32, "first_k_dense_replace": 1, "zero_expert_num": 2},
    # latent attention
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    # state spaces
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "n_mamba_heads": 4, "mamba_num_heads": 8, "mamba_head_dim": 8},
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 8),  # shorter than the prompts
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0},
}  # fmt: skip
MLA = {"head_dim": None, "num_key_value_heads": 4}
WINDOWS = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
          "image_size": 32, "patch_size": 16}  # fmt: skip
VISION_OUT = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
VISION_HEADS = {"num_key_value_heads": 2, "head_dim": 16}
DEEP_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
           "indexer_compress_ratio": 2}  # fmt: skip
PER_LAYER = {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8}
SHARED = PER_LAYER | {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
                      "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 7.0],
            "factor": 2.7, "original_max_position_embeddings": 40}  # fmt: skip
DECODERS_TOO = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
# What an architecture needs beside that, or in its place; None leaves its default
CHANGES = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa"), MLA),
    **dict.fromkeys(("glm4_moe_lite", "minicpm3", "youtu", "bailing_hybrid", "kimi_linear"), MLA),
    **dict.fromkeys(("qwen2", "qwen3", "qwen2_moe", "smollm3"), WINDOWS),
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4, "layer_types": ["indexed_attention", "sliding_attention"]},
    "falcon_h1": {"mamba_n_heads": None, "mamba_d_head": None},
    "gemma3n_text": SHARED | {"laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": PER_LAYER,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "git": {"vision_config": VISION},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3": {"vision_config": VISION, "text_config": {"of": "gemma3_text"}},
    "gemma4": {"text_config": {"of": "gemma4_text"}, "vision_config": VISION | VISION_HEADS},
    "llama4": {"text_config": {"of": "llama4_text"}, "vision_config": VISION | VISION_OUT},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_key_value_heads": 4},
    "mamba2": {"num_heads": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "qwen3_5": {"text_config": {"of": "qwen3_5_text"}, "vision_config": DEEP_VISION},
    "qwen3_5_moe": {"text_config": {"of": "qwen3_5_moe_text"}, "vision_config": DEEP_VISION},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"], **INDEXER},
    "reformer": {"is_decoder": True, "axial_pos_shape": (16, 16), "axial_pos_embds_dim": (16, 16)},
    "xlm": {"n_words": VOCAB_SIZE, "causal": True},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"hidden_size": 128},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

LONG = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40}
NTK = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
# What has another name in the guide than its model type, beside all model types
VARIANTS = {
    "phi3 with LongRoPE": ("phi3", LONG),
    "phimoe with LongRoPE": ("phimoe", {"rope_parameters": LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3}}),
    "llama with LongRoPE": ("llama", {"rope_parameters": LONGROPE}),
    "llama with dynamic NTK": ("llama", {"rope_parameters": NTK}),
    "minimax with a linear layer first": ("minimax", {"layer_types": ["linear_attention", "full_attention"]}),
    "gemma4_text with shared keys": ("gemma4_text", SHARED),
    "gpt_bigcode with many heads": ("gpt_bigcode", {"multi_query": False}),
    "falcon with ALiBi": ("falcon", {"alibi": True}),
    **{f"{name} with is_decoder": (name, {"is_decoder": True}) for name in DECODERS_TOO},
}


def config(model_type: str, **changes):
    """A small configuration: of each kind of layer that the default one has, one layer."""
    of_type = CONFIG_MAPPING[model_type]
    names = {f.name for f in dataclasses.fields(of_type)}
    sizes = SIZES | CHANGES.get(model_type, {}) | changes
    if "of" in sizes.get("text_config", {}):
        sizes["text_config"] = config(sizes["text_config"]["of"]).to_dict()
    sizes = {name: value for name, value in sizes.items() if name in names and value is not None}
    try:
        found = of_type().to_dict()
    except Exception:  # some have no default that is valid
        found = {}
    depth = found.get("num_hidden_layers")
    lists = {n: found[n] for n in names - sizes.keys() if isinstance(found.get(n), list) and len(found[n]) == depth}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))[:4]
    if lists and len(kinds) > 1:
        sizes |= dict(zip(lists, map(list, zip(*kinds, strict=True)), strict=True)) | {"num_hidden_layers": len(kinds)}
    return of_type(**sizes)


def model(model_type: str, seed: int, dtype: torch.dtype, **changes):
    """A random model whose logits vary enough for greedy text not to be constant."""
    small = config(model_type, **changes)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(small).parameters())
    if count > 5e7:
        raise ValueError(f"{model_type} has {count} parameters")
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(small).eval()
    made.generation_config.eos_token_id = made.generation_config.pad_token_id = 0
    for p in made.parameters():
        if p.ndim >= 2:
            p.data.normal_(std=0.3)
    return made.to(dtype)

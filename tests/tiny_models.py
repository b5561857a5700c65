"""Tiny random models of every causal language model class in transformers, for tests.

The configurations come from one generic rule: a table of small values by field name, applied to whichever of these
fields a configuration class has. `OVERRIDES` holds what a single model type needs beyond it, and `NOT_BUILT` says why
the remaining types have no tiny model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 400
# Added to the initial weights, whose usual deviation of 0.02 would leave each layer with next to no effect.
NOISE = 0.15

# The small values, each with the names of the fields that take it.
_INTEGERS: dict[int, str] = {
    VOCAB_SIZE: "vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    512: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
    "original_max_position_embeddings",
    64: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_inner dff dim_ff ffn_hidden_size "
    "feed_forward_size moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size dense_intermediate_size "
    "intermediate_size_mlp prefix_dense_intermediate_size mlp_dim",
    32: "hidden_size n_embd d_model emb_dim embed_dim embedding_size out_hidden_size input_embedding_size "
    "output_embedding_size shared_intermediate_size router_hidden_size hidden_size_global vision_output_dim "
    "adapter_in_dim adapter_out_dim adapter_input_size",
    8: "head_dim attention_head_size dim_head kv_channels swa_head_dim v_head_dim qk_nope_head_dim linear_head_dim "
    "linear_key_head_dim linear_value_head_dim index_head_dim sliding_window sliding_window_size "
    "attention_window_size window_size q_lora_rank kv_lora_rank mamba_d_state state_size ssm_state_size "
    "mamba_chunk_size chunk_size index_topk hidden_size_per_layer_input attention_chunk_size "
    "query_pre_attn_scalar rel_extent log_scaling_n_floor floor_scale keep_window_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_heads linear_num_key_heads "
    "linear_num_value_heads mamba_n_heads mamba_num_heads qk_rope_head_dim rotary_dim",
    2: "encoder_layers decoder_layers num_encoder_layers num_decoder_layers num_blocks depth num_key_value_heads "
    "num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts "
    "no_rope_layer_interval attn_layer_period interleave_moe_layer_step eos_token_id sep_token_id "
    "decoder_start_token_id forced_eos_token_id",
    # Many heads, because a sparse attention's score is a sum of rectified values, and zeros would be ties.
    16: "index_n_heads",
    1: "n_group topk_group n_groups num_dense_layers first_k_dense_replace n_shared_experts attn_layer_offset "
    "bos_token_id",
    0: "pad_token_id",
}
_SMALL: dict[str, Any] = {
    **{name: value for value, names in _INTEGERS.items() for name in names.split()},
    "is_decoder": True,
    "logit_scale": 1.0,
    "mlp_only_layers": [0],
    "use_sliding_window": True,
}

# The fields that list a kind for each layer.
_LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"heavily_compressed_attention": 4, "compressed_sparse_attention": 2},
        "o_groups": 2,
        "o_lora_rank": 8,
        "partial_rotary_factor": 0.5,
    },
    "dots3_note_text": {
        "head_dim": 12,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "laurel_rank": 8,
    },
    "gemma4_text": {"global_head_dim": 16, "enable_moe_block": True},
    "gemma4_unified_text": {"global_head_dim": 16},
    "got_ocr2_vision": {"image_size": 64, "output_channels": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"dim_model_base": 32},
    "minimax": {"block_size": 8},
    "minimax_m3_vl_text": {
        "index_n_heads": 4,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "modernbert-decoder": {"local_attention": 16},
    "phi4_multimodal_audio": {
        "nemo_conv_channels": 32,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 100,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [8, 24],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 20,
        "pronunciation_embed_dim": 8,
        "shape_vocab_size": 20,
        "shape_embed_dim": 8,
    },
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "num_experts_per_tok": 1},
}

_NO_PRODUCER = "transformers demands that all layers share keys and values, then raises as no layer computes them"
_NO_DECODER = "AutoModelForCausalLM passes the composite configuration to a class that needs its decoder part"

NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs the packages timm and pillow, which are not installed",
    "gemma4_assistant": _NO_PRODUCER,
    "gemma4_unified_assistant": _NO_PRODUCER,
    "musicgen": _NO_DECODER,
    "musicgen_melody": _NO_DECODER,
}


def _shrink(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Build a small configuration of a class, with at least one layer of each kind it has."""
    # Not getattr: it refuses the fields that a heterogeneous configuration sets per layer.
    defaults = vars(config_class())
    fields = {field.name for field in dataclasses.fields(config_class)}
    kwargs = {name: value for name, value in _SMALL.items() if name in fields}
    for name in sorted(fields):
        value = defaults.get(name)
        if isinstance(value, PreTrainedConfig):
            kwargs[name] = _shrink(type(value))
        elif "drop" in name and type(value) in (int, float):
            kwargs[name] = type(value)(0)
    if "kv_lora_rank" in fields:
        # Latent attention expands to one key head per query head, whatever the configuration says.
        kwargs["num_key_value_heads"] = kwargs["num_attention_heads"]

    # The defaults list a kind per layer of the full size model. Keep each kind once, in order of appearance.
    kinds = {name: list(dict.fromkeys(defaults.get(name) or [])) for name in _LAYER_LISTS if name in fields}
    if "sliding_window" in fields and kinds.get("layer_types") in (["full_attention"], ["sliding_attention"]):
        kinds["layer_types"] = ["sliding_attention", "full_attention"]
    if kinds.get("mlp_layer_types") == ["sparse"]:
        kinds["mlp_layer_types"] = ["dense", "sparse"]
    layers = max([2, *map(len, kinds.values())])
    for name in fields & {"num_hidden_layers", "num_layers", "n_layer", "n_layers"}:
        kwargs[name] = layers
    for name, kind in kinds.items():
        if kind:
            kwargs[name] = [*kind, *kind[-1:] * (layers - len(kind))]
    return config_class(**(kwargs | OVERRIDES.get(config_class.model_type, {})))


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a small configuration of a model type."""
    return _shrink(CONFIG_MAPPING[model_type])


def random_model(config: PreTrainedConfig) -> Any:
    """Return a random model in fp32. It seeds the global random generator, so the weights are the same at each call."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # as far from 0 as trained weights; otherwise greedy answers repeat one token
                parameter.add_(torch.randn_like(parameter) * NOISE)
    return model


def tiny_model(model_type: str) -> Any:
    """Return a small random model of a model type, in evaluation mode."""
    return random_model(tiny_config(model_type)).eval()

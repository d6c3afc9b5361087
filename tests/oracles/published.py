"""The config.json of published models, as far as sizes go, and the parameters that their makers print.

Nemotron's are written as on the hub: older than `rope_parameters`, one of them with a key that `transformers` does not know.
"""

_SMOLLM2 = {
    "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA31_8B = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
_NEMOTRON4_15B = {
    "model_type": "nemotron", "num_hidden_layers": 32, "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 48,
    "num_key_value_heads": 8, "vocab_size": 256000, "max_position_embeddings": 4096, "tie_word_embeddings": False, "hidden_act": "relu2",
    "norm_eps": 1e-5, "rope_theta": 10000, "partial_rotary_factor": 0.5, "initializer_range": 0.0134, "torch_dtype": "bfloat16",
}  # fmt: skip
CONFIGS = {
    "SmolLM2-135M": _SMOLLM2,
    "Llama-3.1-8B": _LLAMA31_8B,
    "Llama-3.1-Minitron-4B-Width": {**_LLAMA31_8B, "hidden_size": 3072, "intermediate_size": 9216, "head_dim": 128},
    "Llama-3.1-Minitron-4B-Depth": {**_LLAMA31_8B, "num_hidden_layers": 16},
    "Mistral-NeMo-Minitron-8B": {
        "model_type": "mistral", "num_hidden_layers": 40, "hidden_size": 4096, "intermediate_size": 11520, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "max_position_embeddings": 8192, "tie_word_embeddings": False,
        "sliding_window": None,
    },
    "Mistral-NeMo-12B": {
        "model_type": "mistral", "num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "max_position_embeddings": 131072, "tie_word_embeddings": False,
        "sliding_window": None, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5,
    },
    "Nemotron-4 15B": _NEMOTRON4_15B,
    "Minitron-8B": {**_NEMOTRON4_15B, "hidden_size": 4096, "intermediate_size": 16384, "head_dim": 128, "attention_bias": False, "mlp_bias": False},
    "Minitron-4B": {**_NEMOTRON4_15B, "hidden_size": 3072, "intermediate_size": 9216, "num_attention_heads": 24, "kv_channels": 128},
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "num_hidden_layers": 24, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True, "rope_theta": 1000000.0,
        "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 24, "use_mrope": False,
    },
    "Qwen3-8B": {
        "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False,
        "rope_theta": 1000000, "attention_bias": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 36,
    },
    "Gemma-7B": {
        "model_type": "gemma", "num_hidden_layers": 28, "hidden_size": 3072, "intermediate_size": 24576, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu", "vocab_size": 256000, "max_position_embeddings": 8192,
    },
    "Gemma-2-2B": {
        "model_type": "gemma2", "num_hidden_layers": 26, "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": 256000, "max_position_embeddings": 8192, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "Gemma-3-1B": {
        "model_type": "gemma3_text", "num_hidden_layers": 26, "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "vocab_size": 262144,
        "max_position_embeddings": 32768, "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6,
        "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None, "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "Phi-3-mini": {
        "model_type": "phi3", "num_hidden_layers": 32, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
        "tie_word_embeddings": False, "rope_scaling": None, "sliding_window": 2047,
    },
    "GPT-2": {
        "model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257, "activation_function": "gelu_new",
    },
    "OPT-125M": {
        "model_type": "opt", "num_hidden_layers": 12, "hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12, "vocab_size": 50272,
        "max_position_embeddings": 2048, "word_embed_proj_dim": 768, "activation_function": "relu", "do_layer_norm_before": True,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "tie_word_embeddings": False, "rope_theta": 1000000.0,
        "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
    },
    "Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe", "num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 151936, "max_position_embeddings": 8192, "tie_word_embeddings": False, "rope_theta": 1000000.0,
        "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21, "decoder_sparse_step": 1, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": False,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False,
        "rope_theta": 1000000.0, "attention_bias": False, "use_sliding_window": False, "sliding_window": None, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    },
}  # fmt: skip
# of which one token makes use; the last was not rounded, but cut off after this digit
ACTIVE = {"Mixtral-8x7B": 12.9e9, "Qwen1.5-MoE-A2.7B": 2.7e9, "Qwen3-30B-A3B": 3.3e9}
PARAMETERS = {
    "SmolLM2-135M": "134.5 M",
    "Llama-3.1-8B": "8.03 B",
    "Llama-3.1-Minitron-4B-Width": "4.5 B",
    "Llama-3.1-Minitron-4B-Depth": "4.5 B",
    "Mistral-NeMo-Minitron-8B": "8.4 B",
    "Mistral-NeMo-12B": "12.2 B",
    "Nemotron-4 15B": "15.6 B",
    "Minitron-8B": "8.27 B",
    "Minitron-4B": "4.19 B",
    "Qwen2.5-0.5B": "0.49 B",
    "Qwen3-8B": "8.2 B",
    "Gemma-7B": "8.5 B",
    "Gemma-2-2B": "2.6 B",
    "Gemma-3-1B": "1.0 B",
    "Phi-3-mini": "3.8 B",
    "GPT-2": "0.124 B",
    "OPT-125M": "0.125 B",
    "Mixtral-8x7B": "46.7 B",
    "Qwen1.5-MoE-A2.7B": "14.3 B",
    "Qwen3-30B-A3B": "30.5 B",
}

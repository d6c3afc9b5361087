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
    "Nemotron-4 15B": _NEMOTRON4_15B,
    "Minitron-8B": {**_NEMOTRON4_15B, "hidden_size": 4096, "intermediate_size": 16384, "head_dim": 128, "attention_bias": False, "mlp_bias": False},
    "Minitron-4B": {**_NEMOTRON4_15B, "hidden_size": 3072, "intermediate_size": 9216, "num_attention_heads": 24, "kv_channels": 128},
}  # fmt: skip
PARAMETERS = {
    "SmolLM2-135M": "134.5 M",
    "Llama-3.1-8B": "8.03 B",
    "Llama-3.1-Minitron-4B-Width": "4.5 B",
    "Llama-3.1-Minitron-4B-Depth": "4.5 B",
    "Mistral-NeMo-Minitron-8B": "8.4 B",
    "Nemotron-4 15B": "15.6 B",
    "Minitron-8B": "8.27 B",
    "Minitron-4B": "4.19 B",
}

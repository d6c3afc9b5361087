"""Structured pruning and knowledge distillation of large language models on Megatron-Core (the Minitron method)."""

__version__ = "0.1.0"

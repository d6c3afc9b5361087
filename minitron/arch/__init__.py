"""What a GPT is, in plain Python: sizes, the table of parameters and axes, counts, and Hugging Face families."""

from minitron.arch.arch import Arch

__all__ = ["Arch"]

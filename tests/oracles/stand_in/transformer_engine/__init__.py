"""Stands in for Transformer Engine where there is no GPU: its modules with the parameters that its documentation names, computed by plain torch.

What Megatron asks for beside them is there by name alone. A process that has this folder on its path takes it for the package.
"""

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.6.0"

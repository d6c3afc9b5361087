"""A name that Megatron imports."""


class QuantizedTensor:
    """Of fp8: no tensor here is one."""

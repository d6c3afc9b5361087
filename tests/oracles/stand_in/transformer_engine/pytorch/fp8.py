"""Names that Megatron imports; nothing here computes in fp8."""

import contextlib


class FP8GlobalStateManager:
    """fp8 is off."""

    @staticmethod
    def is_fp8_enabled():
        return False


fp8_autocast = contextlib.nullcontext

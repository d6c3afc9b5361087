"""Names that Megatron's classes are derived from."""

from types import SimpleNamespace

recipe = SimpleNamespace(DelayedScaling=type("DelayedScaling", (), {}))

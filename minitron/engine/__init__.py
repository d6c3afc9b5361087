"""The only folder that knows Megatron: processes and groups, the model, schedules, the training loop, checkpoints.

Importing Megatron without apex and Transformer Engine prints advice to install them; both are optional here, so the
advice is kept from the user. Nothing else happens.
"""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core.models.gpt  # noqa: F401
    import megatron.core.optimizer  # noqa: F401
    import megatron.core.pipeline_parallel.schedules  # noqa: F401

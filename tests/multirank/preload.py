"""What the server of ranks imports, once for all of them."""

import transformers.models.llama.modeling_llama
import transformers.models.mistral.modeling_mistral  # noqa: F401

import minitron.cli
import minitron.stages.compress  # noqa: F401
from minitron import engine

engine.Trainer  # noqa: B018 (the engine's modules are imported when one of their names is asked for)

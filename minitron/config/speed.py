"""The settings of a measurement of how fast an exported model generates."""

import dataclasses

from minitron.config.setting import setting


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast teacher and student generate from their Hugging Face folders, side by side, each in a process of its own."""

    enabled: bool = setting(False, "in minitron compress: also measure this, once the student is exported; minitron speed does by itself")
    batch_sizes: list[int] = setting([1, 8], "sequences that are written at the same time: one measurement for each of these numbers", least=1)
    prompt_lengths: list[int] = setting([128], "tokens that stand before what is written: each of these with each number of sequences", least=1)
    new_tokens: int = setting(32, "tokens that each sequence is continued by, greedily, with a key/value cache", least=2)
    repeats: int = setting(5, "turns of each model, which alternate; their medians count, beside one turn before that does not", least=1)
    threads: int | None = setting(None, "threads of each process with device=cpu (null: as torch has them, or OMP_NUM_THREADS)", least=1)
    vllm: bool | None = setting(None, "measure with vLLM too (null: where there is a GPU and the package is installed)")

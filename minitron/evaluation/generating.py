"""One model that writes, in a process of its own: `python -m minitron.evaluation.generating` reads requests and answers, a line of JSON each.

The first request says what to load (`Order`), the others what to write (`Load`). Nothing of this project is loaded beside the model, so that what
is resident is what a user of `transformers` has.

Legend: B sequences, P tokens of a prompt.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SHARE = 0.8  # of a GPU's memory that vLLM takes for a model: what measures has a little too
TRIES = 3  # of one turn with vLLM


class Order(NamedTuple):
    """A Hugging Face folder, and how to load it. `longest`: tokens of the longest sequence that will be asked for."""

    engine: str
    folder: str
    device: str
    dtype: str
    threads: int | None
    longest: int


class Load(NamedTuple):
    """What to write: `batch_size` sequences of `prompt_length` tokens, each continued by `new_tokens`."""

    batch_size: int
    prompt_length: int
    new_tokens: int


class Turn(NamedTuple):
    """What one generation took. Seconds until all sequences have their first token, and from there to the last one; the most bytes meanwhile,
    None where they can't be told."""

    first: float
    others: float
    peak: int | None


class Ready(NamedTuple):
    """A loaded model: bytes of its weights, and of the process before it was there; None where they can't be told. `software`: versions."""

    weights: int | None
    before: int | None
    threads: int | None
    software: dict[str, str]


Writer = Callable[[Load], Turn]


def plain(order: Order) -> tuple[Ready, Writer]:
    """With `transformers`, as it is."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gpu = order.device != "cpu"
    if not gpu and order.threads is not None:
        torch.set_num_threads(order.threads)
    before = None if gpu else resident("VmRSS")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[order.dtype]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(order.folder, dtype=dtype, trust_remote_code=False)
    model.to(order.device).eval()
    model.generation_config = transformers.GenerationConfig()  # none of the folder's own wishes, such as to sample
    weights = sum(parameter.nbytes for parameter in model.parameters())  # of which a tied head is told once
    prompts_BP: dict[tuple[int, int], Any] = {}

    def wait() -> None:
        if gpu:
            torch.cuda.synchronize()

    def write(load: Load) -> Turn:
        size = (load.batch_size, load.prompt_length)
        if size not in prompts_BP:
            draw = torch.Generator().manual_seed(0)
            prompts_BP[size] = torch.randint(model.config.vocab_size, size, generator=draw).to(order.device)
        settings = transformers.GenerationConfig(
            max_new_tokens=load.new_tokens, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0, bos_token_id=0
        )
        at: list[float] = []

        def note(tokens: Any, scores: Any, **unused: Any) -> Any:  # called after every token; nothing ends before its time
            if not at:
                wait()
                at.append(time.perf_counter())
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

        criteria = transformers.StoppingCriteriaList([note])
        mask_BP = torch.ones_like(prompts_BP[size])
        forget_peak(gpu)
        wait()
        start = time.perf_counter()
        made = model.generate(prompts_BP[size], attention_mask=mask_BP, generation_config=settings, stopping_criteria=criteria)
        wait()
        end = time.perf_counter()
        assert tuple(made.shape) == (load.batch_size, load.prompt_length + load.new_tokens), "the model stopped early"
        return Turn(at[0] - start, end - at[0], torch.cuda.max_memory_allocated() if gpu else resident("VmHWM"))

    def inferred(load: Load) -> Turn:
        with torch.inference_mode():
            return write(load)

    software = {"torch": torch.__version__, "transformers": transformers.__version__}
    return Ready(weights, before, None if gpu else torch.get_num_threads(), software), inferred


def vllm(order: Order) -> tuple[Ready, Writer]:
    """With vLLM, which takes its memory beforehand, so that there is nothing to tell of it."""
    import torch

    package = importlib.import_module("vllm")

    dtype = {"bf16": "bfloat16", "fp32": "float32"}[order.dtype]
    model = package.LLM(
        model=order.folder, dtype=dtype, max_model_len=order.longest, gpu_memory_utilization=SHARE, enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )  # fmt: skip
    vocabulary = json.loads(Path(order.folder, "config.json").read_text(encoding="utf-8"))["vocab_size"]

    def seconds(load: Load, new_tokens: int) -> float:
        draw = torch.Generator().manual_seed(0)
        prompts_BP = torch.randint(vocabulary, (load.batch_size, load.prompt_length), generator=draw).tolist()
        settings = package.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        made = model.generate([{"prompt_token_ids": prompt_P} for prompt_P in prompts_BP], settings, use_tqdm=False)
        taken = time.perf_counter() - start
        assert all(len(one.outputs[0].token_ids) == new_tokens for one in made), "the model stopped early"
        return taken

    def write(load: Load) -> Turn:
        for _ in range(TRIES):  # two measurements, of which anything else in the machine may lengthen the shorter one
            first = seconds(load, 1)
            if (others := seconds(load, load.new_tokens) - first) > 0:
                return Turn(first, others, None)
        raise RuntimeError(f"{load.new_tokens} tokens took no longer than one, {TRIES} times: more of speed.new_tokens are needed")

    return Ready(None, None, None, {"torch": torch.__version__, "vllm": package.__version__}), write


ENGINES: dict[str, Callable[[Order], tuple[Ready, Writer]]] = {"transformers": plain, "vllm": vllm}


def resident(what: str) -> int | None:
    """Bytes of this process in memory: VmRSS, now; VmHWM, the most since `forget_peak`. Where the kernel does not tell, None or the most ever."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) if what == "VmHWM" else None
    found = next((line.split()[1] for line in lines if line.startswith(what)), None)
    return None if found is None else 1024 * int(found)


def forget_peak(gpu: bool) -> None:
    """Count the most memory from now on."""
    if gpu:
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # then the most that there ever was is told, loading included
        return


def main() -> None:
    """Answer until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")  # where stdout leads; libraries that print now do so elsewhere
    os.dup2(2, 1)

    def answer(what: Ready | Turn) -> None:
        print(json.dumps(what._asdict()), file=answers, flush=True)

    order = Order(**json.loads(sys.stdin.readline()))
    ready, write = ENGINES[order.engine](order)
    answer(ready)
    for line in sys.stdin:
        answer(write(Load(**json.loads(line))))


if __name__ == "__main__":
    main()

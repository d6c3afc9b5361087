"""What every test may ask for: a process group of one rank, real data where it is, a small corpus."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

# before torch is imported: the models here are tiny, and threads that wait for each other cost more than they give
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("minitron", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("minitron")


@pytest.fixture
def alone() -> Iterator[object]:
    """The `World` of a single process on the CPU."""
    from minitron.config.schema import Parallel
    from minitron.engine.parallel import world

    with world(Parallel(), "cpu", 1) as here:
        yield here


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of test data."""
    root = Path(os.environ.get("MINITRON_TEST_DATA", Path(__file__).parents[1].parent / "shared" / "data")).resolve()
    if not root.is_dir():
        pytest.skip(f"no test data in {root} (MINITRON_TEST_DATA)")
    return root


@pytest.fixture(scope="session")
def stories(data_root: Path) -> Path:
    """A trained Llama of 260 thousand parameters with its tokenizer: 5 layers, hidden 64, 8 heads in 4 groups, ffn 172, vocabulary 512."""
    if not (data_root / "stories260k").is_dir():
        pytest.skip(f"no stories260k in {data_root} (MINITRON_TEST_DATA)")
    return data_root / "stories260k"


@pytest.fixture(scope="session")
def tales(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of text that the model of `stories` knows: 128 tales that it made up, about 25 thousand of its tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        told = model.generate(torch.full((128, 1), tokenizer.bos_token_id), do_sample=True, top_k=0, max_new_tokens=200)
    path = tmp_path_factory.mktemp("text") / "tales.jsonl"
    with open(path, "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"text": tokenizer.decode(tokens, skip_special_tokens=True)}) + "\n" for tokens in told)
    return path

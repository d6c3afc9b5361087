"""A tiny tokenizer made here, and texts to put through it."""

import gzip
import json
import os
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["stone", "river", "under", "seven", "light", "garden", "paper", "wolf", "café", "naïve", "Москва", "東京", "<s>", "</s>", "...", "42"]


def _tokenizer(eos: str | None) -> PreTrainedTokenizerFast:
    """Byte b is token b + 2 and nothing is merged: ids can be told by hand."""
    # byte-level tokenizers spell a byte as its Latin-1 letter if that is printable, and the others as the letters from 256 on, in order
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocabulary = {"<s>": 0, "</s>": 1, **{chr(byte if byte in printable else next(others)): byte + 2 for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte tokenizer with 258 ids: <s> 0, </s> 1, byte b as b + 2."""
    folder = tmp_path_factory.mktemp("tokenizer")
    _tokenizer("</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def endless_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without an end-of-document token."""
    folder = tmp_path_factory.mktemp("endless")
    _tokenizer(None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents of odd lengths, with line ends, other scripts and special tokens spelled out, all different."""
    draw = random.Random(7)
    return [f"{number} " + " ".join(draw.choices(WORDS, k=draw.randrange(1, 30))) + draw.choice(["", "\n", "\r\n\n", " "]) for number in range(97)]


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    """The documents as a .jsonl.gz file."""
    path = tmp_path / "corpus.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts))
    return path


@pytest.fixture(scope="session")
def stories_path() -> Path:
    """A real Llama folder with its tokenizer (vocabulary 512)."""
    root = Path(os.environ.get("MINITRON_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    if not (root / "stories260k").is_dir():
        pytest.skip(f"no stories260k in {root} (MINITRON_TEST_DATA)")
    return root / "stories260k"

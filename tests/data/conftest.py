"""A tiny tokenizer made here, and texts to put through it."""

import gzip
import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = "stone river under seven light garden paper wolf café naïve Москва 東京 <s> </s> ... 42".split()


def _tokenizer(eos: str | None) -> PreTrainedTokenizerFast:
    """One token per byte, and merges of none: ids can be checked by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: number + 2 for number, letter in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte tokenizer with 258 ids: <s> 0, </s> 1, the bytes from 2 on."""
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

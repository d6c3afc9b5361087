"""Perplexities of texts: overlapping windows against plain `transformers`, words against words counted by hand."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron.data.corpus import Windows, eval_batches
from minitron.data.indexed import write_index
from minitron.engine.scoring import language_model_score
from minitron.evaluation.words import count_words, per_word
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks

SEQ, STRIDE = 24, 10


@pytest.fixture
def prefix(tmp_path):
    """131 tokens of one text."""
    tokens = torch.randint(3, 512, (131,), generator=torch.Generator().manual_seed(0)).numpy().astype(np.uint16)
    tokens.tofile(tmp_path / "text.bin")
    write_index(tmp_path / "text.idx", np.uint16, np.array([100, 31], dtype=np.int32))
    return tmp_path / "text"


def windows_of(prefix, **limits):
    return Windows([(prefix, 1.0)], SEQ, stride=STRIDE, **limits)


def test_every_token_counts_once(prefix):
    windows, tokens = windows_of(prefix), np.fromfile(f"{prefix}.bin", np.uint16)
    assert len(windows) == 11 == (130 - SEQ) // STRIDE + 1
    counted = torch.cat([windows[at][1:][windows.first_counted(at) :] for at in range(len(windows))])
    assert counted.tolist() == tokens[1 : 1 + SEQ + 10 * STRIDE].tolist() == next(windows.predicted()).tolist()
    assert windows[3].tolist() == tokens[3 * STRIDE : 3 * STRIDE + SEQ + 1].tolist()


@pytest.mark.parametrize(("limit", "windows"), [(SEQ, 1), (SEQ + STRIDE - 1, 1), (SEQ + STRIDE, 2), (70, 5), (10_000, 11)])
def test_a_limit_is_of_tokens_that_count(prefix, limit, windows):
    found = windows_of(prefix, limit_tokens=limit)
    assert len(found) == windows and sum(map(len, found.predicted())) <= limit


def scored_at(world, folder, prefix):
    model = load(open_folder(folder, "model.path"), world, torch.float32)
    windows = windows_of(prefix)
    batches = eval_batches(windows, micro_batch_size=2, dp_rank=world.dp_rank, dp_size=world.dp, first_counted=windows.first_counted)
    done = []
    found = language_model_score(model, batches, world, done.append)
    return found.loss, found.tokens, sum(done)


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(cp=2, dp=2), pytest.param(Layout(), marks=pytest.mark.slow)], ids=str)
def test_overlapping_windows_are_scored_as_plain_models_do(layout, stories, prefix):
    model, windows = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval(), windows_of(prefix)
    losses = []
    for at in range(len(windows)):
        with torch.no_grad():
            logits = model(windows[at][None, :-1]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, windows[at][1:], reduction="none")[windows.first_counted(at) :])
    expected = torch.cat(losses)
    ranks = on_ranks(scored_at, layout, stories, prefix)
    for loss, tokens, _ in ranks:
        assert loss == pytest.approx(float(expected.double().mean()), rel=1e-5) and tokens == len(expected) == SEQ + 10 * STRIDE
    assert sum(done for _, _, done in ranks[:: layout.cp]) in (11, 11 * layout.cp)


def test_words_are_what_white_space_separates(stories):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    documents = ["Once upon a time", "The end. It was\nlate.", "Tim ran"]
    stream = [token for text in documents for token in (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)]
    assert count_words([np.array(stream)], tokenizer) == 4 + 5 + 2
    assert count_words([np.array(stream), np.array(stream[:-1])], tokenizer) == 22
    assert count_words([], tokenizer) == 0


def test_perplexity_per_word():
    assert per_word(2.0, 30, 20) == pytest.approx(math.exp(3))
    assert per_word(2.0, 30, 0) is None

"""Windows of whole documents, and what of a window counts and sees what: by brute force."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitron.data.corpus import TrainingSamples, batches
from minitron.data.indexed import IndexedDatasetBuilder
from minitron.data.packing import Span, masks, pack
from minitron.engine.parallel import on_main
from minitron.errors import RequestError
from tests.multirank.ranks import Layout, on_ranks

LENGTHS = [7, 1, 33, 12, 2, 50, 8, 20, 5, 41]
LAYOUTS = [{"packing": packing, "separate": separate} for packing in ("stream", "documents") for separate in (False, True)]


def write(prefix: Path, lengths: list[int], first: int = 0, prompts: list[int] | None = None) -> Path:
    """Token t of the corpus has the id t."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.int32)
    for length in lengths:
        builder.add_document(np.arange(first, first + length), [length])
        first += length
    builder.finalize(f"{prefix}.idx")
    if prompts is not None:
        np.array(prompts, np.int32).tofile(f"{prefix}.prompts")
    return prefix


documents = st.lists(st.integers(0, 40), min_size=1, max_size=40).filter(any)


@given(lengths=documents, seq_length=st.integers(1, 20), seed=st.integers(0, 99))
def test_every_token_of_every_document_is_predicted_once(lengths: list[int], seq_length: int, seed: int) -> None:
    packing = pack(np.array(lengths), seq_length, seed)
    windows = [packing.spans(number) for number in range(packing.windows)]
    told = Counter((span.document, span.start + place) for window in windows for span in window for place in range(1, span.length))
    assert told == {(document, token): 1 for document, length in enumerate(lengths) for token in range(1, length)}
    assert all(0 < sum(span.length for span in window) <= seq_length + 1 for window in windows)
    pieces = Counter(span.document for window in windows for span in window)
    assert all(pieces[document] == 1 for document, length in enumerate(lengths) if 0 < length <= seq_length + 1)
    assert pieces[-1] == 0 and set(pieces) == {document for document, length in enumerate(lengths) if length}


@given(lengths=documents, seq_length=st.integers(1, 20), seed=st.integers(0, 99))
def test_no_two_windows_would_fit_into_one(lengths: list[int], seq_length: int, seed: int) -> None:
    packing = pack(np.array(lengths), seq_length, seed)
    filled = sorted(sum(span.length for span in packing.spans(number)) for number in range(packing.windows))
    assert len(filled) == 1 or filled[0] + filled[1] > seq_length + 1


def test_best_fit_by_hand() -> None:
    packing = pack(np.array([6, 5, 4, 3, 2]), 9, 0)
    assert sorted(sorted(span.length for span in packing.spans(number)) for number in range(packing.windows)) == [[2, 3, 5], [4, 6]]


def test_the_order_in_a_window_is_drawn() -> None:
    orders = {tuple(span.document for span in pack(np.array([1, 2, 3, 4]), 9, seed).spans(0)) for seed in range(20)}
    assert len(orders) > 5


@given(
    pieces=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 8)), min_size=1, max_size=5),
    padding=st.integers(0, 4),
    separate=st.booleans(),
    prompted=st.booleans(),
)
def test_masks_by_brute_force(pieces: list[tuple[int, int, int]], padding: int, separate: bool, prompted: bool) -> None:
    """pieces: (first token in the document, how many, tokens of the prompt)."""
    spans = [Span(number, start, length) for number, (start, length, _) in enumerate(pieces)]
    prompts = np.array([prompt for *_, prompt in pieces])
    tokens = [(number, start + place) for number, (start, length, _) in enumerate(pieces) for place in range(length)]
    tokens += [None] * padding
    if len(tokens) < 2:
        return
    counted, numbers = masks(spans, len(tokens) - 1, separate, prompts if prompted else None)
    for position, (here, token) in enumerate(itertools.pairwise(tokens)):
        expected = token is not None
        if expected and here[0] != token[0] and (separate or token[1] > 0):
            expected = False  # a document's beginning is told by no other one; a later piece's first token is told by the piece before
        if expected and prompted and token[1] < prompts[token[0]]:
            expected = False
        assert counted[position] == expected, (position, here, token)
        for before in range(position):
            together = (here and here[0]) == (tokens[before] and tokens[before][0])
            assert (numbers[position] == numbers[before]) == together


# ---- samples ----


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_masks_of_samples_are_of_their_tokens(layout: dict, prompted: bool, tmp_path: Path) -> None:
    """The corpus tells: token t has the id t, so where a sample's documents begin and end can be read off it."""
    prompts = [min(3, length) for length in LENGTHS]
    prefix = write(tmp_path / "t", LENGTHS, first=1, prompts=prompts)  # 0 is padding
    ends = np.cumsum(LENGTHS)
    samples = TrainingSamples([(prefix, 1.0)], 12, 60, 5, tmp_path / "cache", prompts=prompted, **layout)
    for number in range(60):
        tokens_BT, counted_BS, documents_BS = samples.batch([number])
        tokens = tokens_BT[0].tolist()
        assert torch.equal(tokens_BT[0], samples[number])
        if layout == LAYOUTS[0] and not prompted:
            assert counted_BS is None and documents_BS is None
            continue
        assert (documents_BS is not None) == layout["separate"]
        document = [-1 if token == 0 else int(np.searchsorted(ends, token)) for token in tokens]
        place = [0 if token == 0 else token - 1 - (ends[of] - LENGTHS[of]) for of, token in zip(document, tokens, strict=True)]
        run = np.cumsum([True, *(b != a + 1 and (a, b) != (0, 0) for a, b in itertools.pairwise(tokens))])
        for position in range(12):
            goes_on = tokens[position + 1] == tokens[position] + 1 and document[position] == document[position + 1]
            begins = place[position + 1] == 0 and not layout["separate"]
            expected = tokens[position + 1] > 0 and (goes_on or begins) and not (prompted and place[position + 1] < prompts[document[position + 1]])
            assert counted_BS[0, position] == expected
            if documents_BS is not None:
                for other in range(12):
                    joined = document[position] == document[other] and run[position] == run[other]
                    assert (documents_BS[0, position] == documents_BS[0, other]) == joined


def test_separate_documents_come_in_the_order_of_joined_ones(tmp_path: Path) -> None:
    prefix = write(tmp_path / "t", LENGTHS)
    plain, separate = (TrainingSamples([(prefix, 1.0)], 8, 40, 5, tmp_path / "cache", separate=separate) for separate in (False, True))
    assert all(torch.equal(plain[number], separate[number]) for number in range(40))


def test_a_document_that_follows_itself_is_another(tmp_path: Path) -> None:
    samples = TrainingSamples([(write(tmp_path / "t", [3]), 1.0)], 8, 4, 1, tmp_path / "cache", separate=True)
    assert samples[0].tolist() == [0, 1, 2] * 3
    counted_S, documents_S = samples.masks(0)
    assert documents_S.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert counted_S.tolist() == [True, True, False, True, True, False, True, True]


def test_each_round_has_every_window_once_and_another_order(tmp_path: Path) -> None:
    prefix = write(tmp_path / "t", LENGTHS, first=1)
    count = pack(np.array(LENGTHS), 12, 5).windows
    samples = TrainingSamples([(prefix, 1.0)], 12, 3 * count, 5, tmp_path / "cache", packing="documents")
    rounds = [[tuple(samples[number].tolist()) for number in range(turn * count, (turn + 1) * count)] for turn in range(3)]
    assert len(set(rounds[0])) == count and all(set(one) == set(rounds[0]) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_a_blend_goes_on_by_number_whatever_the_split_and_draws_by_seed(layout: dict, tmp_path: Path) -> None:
    blend = [(write(tmp_path / "a", LENGTHS, first=1), 2.0), (write(tmp_path / "b", LENGTHS[::-1], first=1000), 1.0)]

    def steps(seed: int, start: int, cache: str, micro_batch_size: int = 4, dp_size: int = 1) -> list[list[str]]:
        """The rows of each step of 8 samples, with their masks, in no order."""
        samples = TrainingSamples(blend, 12, 48, seed, tmp_path / cache, **layout)
        count = 8 // (micro_batch_size * dp_size)
        split = {"start": start, "micro_batch_size": micro_batch_size, "num_microbatches": count, "dp_size": dp_size}
        ranks = [list(batches(samples, **split, dp_rank=rank)) for rank in range(dp_size)]
        rows = [[str([field[row].tolist() for field in batch if field is not None]) for row in range(len(batch.tokens_BT))]
                for together in zip(*ranks, strict=True) for batch in together]  # fmt: skip
        per_step = count * dp_size
        return [sorted(itertools.chain(*rows[first : first + per_step])) for first in range(0, len(rows), per_step)]

    whole = steps(1, 0, "a")
    assert len(whole) == 6
    assert steps(1, 0, "b") == whole == steps(1, 0, "a") != steps(2, 0, "a")
    assert steps(1, 16, "a") == whole[2:]
    assert all(steps(1, 0, "a", *split) == whole for split in ((1, 1), (2, 2), (1, 4), (8, 1)))


def read_packed(world, folder: Path, cache: str) -> list[list[int]]:
    samples = TrainingSamples([(folder / "t", 1.0)], 8, 25, 3, folder / cache, once=lambda make: on_main(world, make), packing="documents")
    return [samples[number].tolist() for number in range(25)]


@pytest.mark.multirank
def test_ranks_read_the_packing_that_one_process_makes(tmp_path: Path) -> None:
    write(tmp_path / "t", LENGTHS)
    (alone,) = on_ranks(read_packed, Layout(), tmp_path, "alone")
    assert on_ranks(read_packed, Layout(dp=2), tmp_path, "shared") == [alone, alone]


@pytest.mark.parametrize(
    ("asked", "said"), [({"separate": True}, "data.separate_documents=true"), ({"packing": "documents"}, "data.packing=documents")], ids=str
)
def test_documents_that_are_stored_in_parts_are_refused(asked: dict, said: str, tmp_path: Path) -> None:
    """Where one ends can't be told from where a sentence of it does; joined up in a stream they are as good as any."""
    builder = IndexedDatasetBuilder(f"{tmp_path / 'parts'}.bin", np.int32)
    builder.add_document(np.arange(30), [12, 18])
    builder.finalize(f"{tmp_path / 'parts'}.idx")
    blend = [(tmp_path / "parts", 1.0)]
    assert len(TrainingSamples(blend, 7, 4, 1, tmp_path / "order")[0]) == 8
    with pytest.raises(RequestError, match=rf"^{said}: parts.idx stores documents in parts, such as sentences; one sequence for each is needed$"):
        TrainingSamples(blend, 7, 4, 1, tmp_path / "order", **asked)

"""Samples, windows and batches against tokens that tell where they stand: token t of the corpus has the id t."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.data.corpus import TrainingSamples, Windows, batches, eval_batches, num_eval_batches
from minitron.data.indexed import IndexedDatasetBuilder
from minitron.data.lengths import apportion
from minitron.engine.batch import Batch
from minitron.errors import RequestError

LENGTHS = [7, 1, 33, 12, 2, 50, 8, 20, 5, 41]  # 179 tokens


def write(prefix: Path, lengths: list[int], first: int = 0) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.int32)
    for length in lengths:
        builder.add_document(np.arange(first, first + length), [length])
        first += length
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write(tmp_path / "tokens", LENGTHS)


class Numbers:
    """Sample i is [i, i]."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def batch(self, numbers: range) -> Batch:
        return Batch(torch.stack([self[index] for index in numbers]))

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return torch.tensor([index, index])


# ---- training samples ----


def breaks(sample: torch.Tensor) -> list[tuple[int, int]]:
    """Where a sample does not go on with the next token: (last token of a document, first token of another)."""
    return [(a, b) for a, b in zip(sample[:-1].tolist(), sample[1:].tolist(), strict=True) if b != a + 1]


def test_samples_of_one_epoch_predict_from_every_token_once(prefix: Path, tmp_path: Path) -> None:
    samples = TrainingSamples([(prefix, 1.0)], 8, (sum(LENGTHS) - 1) // 8, 5, tmp_path / "cache")
    assert len(samples) == 22
    ends = np.cumsum(LENGTHS) - 1
    starts = ends + 1 - LENGTHS
    seen: Counter[int] = Counter()
    for index in range(len(samples)):
        sample = samples[index]
        assert sample.dtype == torch.int64 and sample.shape == (9,)
        seen.update(sample[:-1].tolist())
        assert all(a in ends and b in starts for a, b in breaks(sample))
    assert set(seen.values()) == {1} and len(seen) == 22 * 8


def test_samples_are_joined_at_their_ends(prefix: Path, tmp_path: Path) -> None:
    samples = TrainingSamples([(prefix, 1.0)], 8, 22, 5, tmp_path / "cache")
    firsts = Counter(int(samples[index][0]) for index in range(22))
    lasts = Counter(int(samples[index][-1]) for index in range(22))
    assert sum((firsts & lasts).values()) >= 21  # all but the first sample begin with the last token of another


def test_several_epochs_use_every_document_equally(prefix: Path, tmp_path: Path) -> None:
    samples = TrainingSamples([(prefix, 1.0)], 8, 10 * sum(LENGTHS) // 8, 5, tmp_path / "cache")
    seen = Counter(token for index in range(len(samples)) for token in samples[index][:-1].tolist())
    assert set(seen) == set(range(sum(LENGTHS))) and set(seen.values()) <= {9, 10}


def test_text_shorter_than_a_sequence_is_repeated(tmp_path: Path) -> None:
    samples = TrainingSamples([(write(tmp_path / "short", [3, 2]), 1.0)], 16, 4, 0, tmp_path / "cache")
    tokens = [samples[index].tolist() for index in range(4)]
    assert all(len(row) == 17 and set(row) == set(range(5)) for row in tokens)


def test_order_is_a_function_of_the_seed(prefix: Path, tmp_path: Path) -> None:
    def order(seed: int, cache: str) -> list[list[int]]:
        samples = TrainingSamples([(prefix, 1.0)], 8, 30, seed, tmp_path / cache)
        return [samples[index].tolist() for index in range(30)]

    assert order(1, "a") == order(1, "a") == order(1, "b")  # from the cache, and made again elsewhere
    assert order(1, "a") != order(2, "a")
    assert order(2**40, "a") == order(2**40, "b")


def test_cache_of_other_tokens_is_not_taken(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = TrainingSamples([(write(tmp_path / "t", [40, 40]), 1.0)], 8, 9, 1, cache)[0].tolist()
    again = TrainingSamples([(write(tmp_path / "t", [3] * 40), 1.0)], 8, 9, 1, cache)
    assert all(0 <= token < 120 for index in range(9) for token in again[index].tolist())
    assert all(len(breaks(again[index])) >= 2 for index in range(9))  # documents of three tokens, in a shuffled order
    assert len(first) == 9


def test_half_written_cache_is_made_again(prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    whole = TrainingSamples([(prefix, 1.0)], 8, 20, 1, cache)[3].tolist()
    (folder,) = cache.iterdir()
    folder.rename(cache / f".{folder.name}.partial")  # as a killed process leaves it
    next((cache / f".{folder.name}.partial").glob("*shuffle*")).write_bytes(b"half")
    assert TrainingSamples([(prefix, 1.0)], 8, 20, 1, cache)[3].tolist() == whole
    assert [path.name for path in cache.iterdir()] == [folder.name]


@settings(deadline=None, max_examples=15)
@given(weights=st.lists(st.floats(0.05, 20), min_size=1, max_size=4), count=st.integers(1, 60))
def test_blend_follows_its_weights_all_along(weights: list[float], count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("blend")
    blend = [(write(folder / str(number), LENGTHS, 1000 * number), weight) for number, weight in enumerate(weights)]
    samples = TrainingSamples(blend, 8, count, 1, folder / "cache")
    assert len(samples) == count
    of = [int(samples[index][0]) // 1000 for index in range(count)]
    for length in range(1, count + 1):
        for number, weight in enumerate(weights):
            assert abs(of[:length].count(number) - length * weight / sum(weights)) <= len(weights)
    for number in set(of):  # within a source, tokens are used evenly
        seen = Counter(token for index in range(count) if of[index] == number for token in samples[index][:-1].tolist())
        assert max(seen.values()) <= -(-of.count(number) * 8 // sum(LENGTHS)) + 1


def test_training_samples_need_good_files(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^data.train=.*nothing: cannot be read"):
        TrainingSamples([(tmp_path / "nothing", 1.0)], 8, 4, 0, tmp_path / "cache")


# ---- windows ----


def test_windows_predict_every_token_but_the_first_once(prefix: Path) -> None:
    windows = Windows([(prefix, 1.0)], 8)
    assert len(windows) == 22
    predicted = torch.cat([windows[index][1:] for index in range(22)])
    assert predicted.tolist() == list(range(1, 1 + 22 * 8))
    assert torch.cat([windows[index][:-1] for index in range(22)]).tolist() == list(range(22 * 8))
    assert windows[0].dtype == torch.int64


@pytest.mark.parametrize(("length", "count"), [(178, 1), (89, 2), (90, 1), (177, 1)])
def test_partial_window_is_left_out(prefix: Path, length: int, count: int) -> None:
    assert len(Windows([(prefix, 1.0)], length)) == count


def test_limit_is_in_predicted_tokens(prefix: Path) -> None:
    assert [len(Windows([(prefix, 1.0)], 8, limit_tokens=limit)) for limit in (8, 15, 16, 170, 10**9)] == [1, 1, 2, 21, 22]
    assert Windows([(prefix, 1.0)], 8, limit_tokens=16)[1].tolist() == list(range(8, 17))


def test_drawn_windows_are_seeded_and_without_repeats(prefix: Path) -> None:
    def starts(seed: int, count: int | None) -> list[int]:
        windows = Windows([(prefix, 1.0)], 8, count=count, shuffle_seed=seed)
        assert all(windows[index].tolist() == list(range(windows[index][0], windows[index][0] + 9)) for index in range(len(windows)))
        return [int(windows[index][0]) for index in range(len(windows))]

    drawn = starts(3, 15)
    assert len(set(drawn)) == 15 and all(start % 8 == 0 for start in drawn) and drawn != sorted(drawn)
    assert starts(3, 15) == drawn != starts(4, 15)
    assert sorted(starts(3, None)) == list(range(0, 176, 8))


def test_windows_of_a_blend_are_by_weight(prefix: Path, tmp_path: Path) -> None:
    blend = [(prefix, 3.0), (write(tmp_path / "other", [100], 1000), 1.0)]
    windows = Windows(blend, 8, count=12, shuffle_seed=0)
    assert Counter(int(windows[index][0]) // 1000 for index in range(12)) == {0: 9, 1: 3}
    assert len(Windows(blend, 8)) == 22 + 12
    assert [int(Windows(blend, 8, limit_tokens=32)[index][0]) for index in range(4)] == [0, 8, 16, 1000]


def test_too_few_windows_are_refused(prefix: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^calibrate.samples=23: the text holds 22 sequences of 8 tokens$"):
        Windows([(prefix, 1.0)], 8, count=23, shuffle_seed=1, setting="calibrate.samples")
    with pytest.raises(RequestError, match=r"^calibrate.samples=30: the text holds 22 \+ 12 sequences of 8 tokens, needed 15 \+ 15$"):
        Windows([(prefix, 1.0), (write(tmp_path / "b", [100]), 1.0)], 8, count=30, shuffle_seed=1, setting="calibrate.samples")
    with pytest.raises(RequestError, match=r"^train.eval_tokens=100: the text is shorter than one sequence of 180 tokens$"):
        Windows([(prefix, 1.0)], 179, limit_tokens=100, setting="train.eval_tokens")
    with pytest.raises(RequestError, match=r"^eval.tokens=7: at least one sequence of 8 tokens is needed$"):
        Windows([(prefix, 1.0)], 8, limit_tokens=7)
    with pytest.raises(RequestError, match=r"^eval.tokens=8: too few for a sequence of 8 tokens of each text of the blend that is long enough$"):
        Windows([(prefix, 0.1), (write(tmp_path / "short", [8]), 0.9)], 8, limit_tokens=8)


@given(count=st.integers(0, 1000), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_apportioned_shares_sum_and_are_within_one(count: int, weights: list[float]) -> None:
    shares = apportion(count, weights)
    assert sum(shares) == count
    assert all(abs(share - count * weight / sum(weights)) < 1 + 1e-9 for share, weight in zip(shares, weights, strict=True))


# ---- batches ----


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 4), (12, 1)])
def test_a_step_holds_the_same_samples_whatever_the_layout(micro_batch_size: int, dp_size: int) -> None:
    micro_batches = 12 // (micro_batch_size * dp_size)
    ranks = [
        list(batches(Numbers(50), start=5, micro_batch_size=micro_batch_size, num_microbatches=micro_batches, dp_rank=rank, dp_size=dp_size))
        for rank in range(dp_size)
    ]
    assert {len(rank) for rank in ranks} == {3 * micro_batches}  # 45 samples fill three steps of 12
    for step in range(3):
        samples = [rank[step * micro_batches + m].tokens_BT for m in range(micro_batches) for rank in ranks]
        assert all(batch.shape == (micro_batch_size, 2) for batch in samples)
        assert torch.cat(samples)[:, 0].tolist() == list(range(5 + 12 * step, 5 + 12 * (step + 1)))


def test_starting_later_goes_on_where_the_steps_were() -> None:
    layout = {"micro_batch_size": 2, "num_microbatches": 3, "dp_rank": 1, "dp_size": 2}
    whole = list(batches(Numbers(100), start=0, **layout))
    resumed = list(batches(Numbers(100), start=4 * 12, **layout))
    assert torch.equal(*(torch.stack([batch.tokens_BT for batch in part]) for part in (whole[4 * 3 :], resumed)))


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_a_run_goes_on_at_another_number_of_ranks_with_the_same_samples(packing: str, tmp_path: Path) -> None:
    """A blend of a source that is read several times and one that is not: three steps of 8 on one rank, the others on two, then on four."""
    blend = [(write(tmp_path / "a", LENGTHS), 3.0), (write(tmp_path / "b", [90, 300, 7, 250], 1000), 1.0)]

    def steps(first: int, last: int, dp_size: int, micro_batch_size: int, cache: str) -> list[list[int]]:
        """What the steps read, in the order of their samples, by a process of its own for each rank that begins at sample 8 * `first`."""
        counted = 8 // (dp_size * micro_batch_size)
        ranks = []
        for rank in range(dp_size):
            samples = TrainingSamples(blend, 8, 8 * 12, 5, tmp_path / cache, packing=packing)
            stream = batches(samples, start=8 * first, micro_batch_size=micro_batch_size, num_microbatches=counted, dp_rank=rank, dp_size=dp_size)
            ranks.append([next(stream).tokens_BT for _ in range((last - first) * counted)])
        return torch.cat([batch for micro_batch in zip(*ranks, strict=True) for batch in micro_batch]).tolist()

    unbroken = steps(0, 12, 1, 8, "one")
    oracle = TrainingSamples(blend, 8, 8 * 12, 5, tmp_path / "oracle", packing=packing)
    assert unbroken == [oracle[index].tolist() for index in range(8 * 12)]  # each once, in order
    assert Counter(max(row) >= 1000 for row in unbroken) == {False: 72, True: 24}  # 3 to 1
    assert 72 * 8 // sum(LENGTHS) == 3  # so many epochs of the first, and more
    assert steps(0, 3, 1, 4, "other") + steps(3, 7, 2, 2, "other") + steps(7, 12, 4, 1, "other") == unbroken


@given(count=st.integers(0, 40), micro_batch_size=st.integers(1, 5), dp_size=st.integers(1, 5))
def test_evaluation_covers_every_window_once_in_equal_steps(count: int, micro_batch_size: int, dp_size: int) -> None:
    samples = Numbers(count)
    ranks = [list(eval_batches(samples, micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp_size)) for rank in range(dp_size)]
    assert {len(rank) for rank in ranks} == {num_eval_batches(samples, micro_batch_size, dp_size)}
    seen = []
    for tokens, valid in (batch for rank in ranks for batch in rank):
        assert tokens.shape == (micro_batch_size, 2) and valid.shape == (micro_batch_size,) and valid.dtype == torch.bool
        seen += tokens[valid][:, 0].tolist()
    assert sorted(seen) == list(range(count))
    assert sum(len(rank) for rank in ranks) * micro_batch_size < count + micro_batch_size * dp_size

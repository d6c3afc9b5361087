"""Prepared tokens -> samples -> batches.

Shape letters: B sequences of a micro batch, S positions of a sequence, T = S + 1 its tokens (inputs are [:-1], labels [1:]).
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from minitron import engine
from minitron.data.indexed import (
    GPTDataset,
    GPTDatasetConfig,
    IndexedDataset,
    Split,
    check_documents,
    helpers,
    num_tokens,
    open_indexed,
    open_prompts,
    read_tokens,
)
from minitron.data.lengths import rows_of, taken, windows_in
from minitron.data.packing import Packing, Span, masks, pack
from minitron.files import atomic_path

Blend = Sequence[tuple[Path, float]]  # prefixes of .bin/.idx files, each with its weight (manifest.Manifest.blend gives it)


class Samples(Protocol):
    """What batches are made of: item i is int64 [T]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> torch.Tensor: ...


class Ordered(Protocol):
    """The training sequences of one source, in their order."""

    def spans(self, number: int) -> list[Span]:
        """Where the tokens of sequence `number` come from; what they leave of it is padding."""

    def tokens(self, number: int) -> torch.Tensor:
        """Sequence `number` as int64 [T]."""


class TrainingSamples:
    """`num_samples` sequences of seq_length + 1 tokens. The order depends on the tokens, `seed` and, of a `Stream`, `num_samples` alone.

    Each source of the blend is a `Stream` of documents put one after another or, with `packing="documents"`, `Packed` whole ones. Sources alternate
    so that every stretch of samples holds them by weight. The orders are kept under `cache_dir`, which all ranks share; `once` runs what one of
    them does for all, while the others wait. `separate` documents and `prompts` (stored beside the tokens) decide what is seen and what counts.
    """

    def __init__(self, blend: Blend, seq_length: int, num_samples: int, seed: int, cache_dir: Path,
                 once: Callable[[Callable[[], None]], None] = lambda make: make(), *,
                 packing: str = "stream", separate: bool = False, prompts: bool = False) -> None:  # fmt: skip
        weights = np.array([weight for _, weight in blend], dtype=np.float64)
        self.part_of = np.zeros(num_samples, dtype=np.int16)
        self.sample_of = np.zeros(num_samples, dtype=np.int64)
        # not Megatron's BlendedDataset: of 0.16.1, it needs a process group even in a single process, and guesses how much of each part it needs
        helpers.build_blending_indices(self.part_of, self.sample_of, weights / weights.sum(), len(blend), num_samples, False)
        needed = np.bincount(self.part_of, minlength=len(blend))
        self.seq_length, self.separate, self.masked = seq_length, separate, separate or prompts or packing != "stream"
        self.parts: dict[int, Ordered] = {}
        self.prompts: dict[int, np.ndarray | None] = {}
        for number, (prefix, _) in enumerate(blend):
            if needed[number]:
                indexed = open_indexed(Path(prefix), "data.train")
                if separate or packing != "stream":
                    check_documents(Path(prefix), indexed, "data.separate_documents=true" if separate else f"data.packing={packing}")
                self.prompts[number] = open_prompts(Path(prefix), indexed, "data.train") if prompts else None
                self.parts[number] = PACKINGS[packing](indexed, Path(prefix), seq_length, int(needed[number]), seed, Path(cache_dir), once)

    def __len__(self) -> int:
        return len(self.part_of)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Sample `index` as int64 [T]."""
        return self.parts[int(self.part_of[index])].tokens(int(self.sample_of[index]))

    def masks(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of sample `index`: which predictions count, bool [S], and the number of the document in it that each position is of, int64 [S]."""
        part = int(self.part_of[index])
        spans = self.parts[part].spans(int(self.sample_of[index]))
        counted_S, documents_S = masks(spans, self.seq_length, self.separate, self.prompts[part])
        return torch.from_numpy(counted_S), torch.from_numpy(documents_S)

    def batch(self, numbers: Sequence[int]) -> engine.Batch:
        """Samples as a micro batch; without masks where every prediction counts and every position sees all before it."""
        tokens_BT = torch.stack([self[index] for index in numbers])
        if not self.masked:
            return engine.Batch(tokens_BT)
        counted, documents = zip(*map(self.masks, numbers), strict=True)
        # padding, being at the end, is seen by no other position even without documents
        return engine.Batch(tokens_BT, torch.stack(counted), torch.stack(documents) if self.separate else None)


class Stream:
    """Megatron's `GPTDataset`: a source's documents, shuffled, are put one after another as often as needed and cut; a sequence's last token is
    the next one's first."""

    def __init__(self, indexed: IndexedDataset, prefix: Path, seq_length: int, num_samples: int, seed: int, cache_dir: Path,
                 once: Callable[[Callable[[], None]], None]) -> None:  # fmt: skip
        self.data = _shuffled(indexed, prefix, seq_length, num_samples, seed, cache_dir, once)

    def tokens(self, number: int) -> torch.Tensor:
        """As `Ordered` says."""
        item = self.data[number]
        return torch.cat([item["tokens"], item["labels"][-1:]])

    def spans(self, number: int) -> list[Span]:
        """As `Ordered` says. A document that comes twice in a row is two."""
        data = self.data
        if data.shuffle_index is None:  # it opens its files when it is first read
            data[number]
        (first, start), (last, end) = (data.sample_index[data.shuffle_index[number] + side].tolist() for side in (0, 1))
        spans = []
        for place in range(first, last + 1):
            document = int(data.document_index[place])
            begin = start if place == first else 0
            # a sequence ends with the token that the next one begins with
            stop = end + 1 if place == last else int(data.dataset.sequence_lengths[document])
            spans.append(Span(document, begin, stop - begin))
        return [span for span in spans if span.length]


class Packed:
    """Whole documents in windows, packed once; each time round the windows come in another order."""

    def __init__(self, indexed: IndexedDataset, prefix: Path, seq_length: int, num_samples: int, seed: int, cache_dir: Path,
                 once: Callable[[Callable[[], None]], None]) -> None:  # fmt: skip
        self.indexed, self.seq_length, self.seed = indexed, seq_length, seed
        folder = cache_dir / f"{_fingerprint(indexed)}-packed-length{seq_length}-seed{seed}"

        def make() -> None:
            if not folder.is_dir():
                with atomic_path(folder) as temporary:
                    temporary.mkdir()
                    for name, array in pack(indexed.sequence_lengths, seq_length, seed)._asdict().items():
                        np.save(temporary / f"{name}.npy", array)

        once(make)
        self.packing = Packing(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in Packing._fields))
        self.round, self.order = -1, np.empty(0, dtype=np.int64)

    def spans(self, number: int) -> list[Span]:
        """As `Ordered` says."""
        turn, place = divmod(number, self.packing.windows)
        if turn != self.round:
            self.round, self.order = turn, np.random.default_rng((self.seed, turn)).permutation(self.packing.windows)
        return self.packing.spans(int(self.order[place]))

    def tokens(self, number: int) -> torch.Tensor:
        """As `Ordered` says; padding is token 0, which nothing sees and nothing counts."""
        found = np.concatenate([self.indexed.get(span.document, span.start, span.length) for span in self.spans(number)])
        tokens_T = torch.zeros(self.seq_length + 1, dtype=torch.int64)
        tokens_T[: len(found)] = torch.from_numpy(found.astype(np.int64))
        return tokens_T


PACKINGS: dict[str, Callable[..., Ordered]] = {"stream": Stream, "documents": Packed}


def _fingerprint(indexed: IndexedDataset) -> str:
    return hashlib.sha256(indexed.sequence_lengths.tobytes()).hexdigest()[:16]


def _shuffled(indexed: IndexedDataset, prefix: Path, seq_length: int, num_samples: int, seed: int, cache_dir: Path,
              once: Callable[[Callable[[], None]], None]) -> GPTDataset:  # fmt: skip
    # Megatron names its files by the path of the tokens, and writes them in place: the folder is named by what they are made from, and complete
    folder = cache_dir / f"{_fingerprint(indexed)}-length{seq_length}-samples{num_samples}-seed{seed}"

    def dataset(cache: Path) -> GPTDataset:
        config = GPTDatasetConfig(
            random_seed=seed % (1 << 32),
            sequence_length=seq_length,
            blend=([str(prefix)], None),
            split="1",
            path_to_cache=str(cache),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            # asked only for ids of padding and end of document, and neither is treated apart
            tokenizer=types.SimpleNamespace(vocab_size=None, eod=None, unique_identifiers={}),
        )
        return GPTDataset(indexed, "", np.arange(len(indexed), dtype=np.int32), num_samples, Split.train, config)

    def make() -> None:
        if not folder.is_dir():
            with atomic_path(folder) as temporary:
                dataset(temporary)

    once(make)
    return dataset(folder)


class Windows:
    """Sequences that do not overlap: window i of a text is its tokens [i * seq_length, (i + 1) * seq_length], so every token but a text's first is
    predicted once. A last, partial window is left out. With a `stride` below seq_length they begin that far apart instead, and of a window only the
    predictions count that none before it made (`first_counted`): so these see more of what stands before them.

    `limit_tokens` reads that many predicted tokens at most, rounded down to whole windows; `count` asks for exactly so many windows. Of a blend, each
    text gives its share by weight (all of it, where neither is given). With `shuffle_seed` the windows are drawn without replacement, otherwise they
    are the first ones, in order. Raises RequestError where not even one window, or not `count` windows, are there; `setting` is what it names.
    """

    def __init__(self, blend: Blend, seq_length: int, *, limit_tokens: int | None = None, count: int | None = None, shuffle_seed: int | None = None,
                 setting: str = "eval.tokens", stride: int | None = None) -> None:  # fmt: skip
        self.seq_length, self.stride = seq_length, stride or seq_length
        self.texts = [open_indexed(Path(prefix), setting) for prefix, _ in blend]
        there = [windows_in(num_tokens(text), seq_length, stride) for text in self.texts]
        counts = taken(there, [weight for _, weight in blend], seq_length, limit_tokens, count, setting, stride)
        generator = None if shuffle_seed is None else np.random.default_rng(shuffle_seed)
        chosen = [np.arange(n) if generator is None else generator.choice(of, n, replace=False) for of, n in zip(there, counts, strict=True)]
        self.text_of = np.repeat(np.arange(len(blend)), counts)
        self.window_of = np.concatenate(chosen)
        if generator is not None:
            order = generator.permutation(len(self.window_of))
            self.text_of, self.window_of = self.text_of[order], self.window_of[order]

    def __len__(self) -> int:
        return len(self.window_of)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Window `index` as int64 [T]."""
        text, window = self.texts[self.text_of[index]], int(self.window_of[index])
        return torch.from_numpy(read_tokens(text, window * self.stride, self.seq_length + 1))

    def first_counted(self, index: int) -> int:
        """The first position of window `index` whose prediction counts."""
        return self.seq_length - self.stride if self.window_of[index] else 0

    def predicted(self) -> Iterator[np.ndarray]:
        """Of each text the tokens that are predicted, where the windows are its first ones."""
        for number, windows in enumerate(np.bincount(self.text_of, minlength=len(self.texts)).tolist()):
            if windows:
                yield read_tokens(self.texts[number], 1, self.seq_length + (windows - 1) * self.stride)


def batches(
    samples: TrainingSamples, *, start: int, micro_batch_size: int, num_microbatches: int, dp_rank: int, dp_size: int
) -> Iterator[engine.Batch]:
    """This data-parallel rank's micro batches from sample `start` on; `num_microbatches` of them are a step.

    Micro batch m of a step is, over the ranks, the m-th run of micro_batch_size * dp_size samples: a step holds the same samples whatever the micro
    batch size and the number of ranks. Ends before the first step that can't be filled, on all ranks alike.
    """
    width = micro_batch_size * dp_size
    steps = (len(samples) - start) // (width * num_microbatches)
    for micro_batch in range(steps * num_microbatches):
        yield samples.batch(rows_of(start, micro_batch, micro_batch_size, dp_rank, dp_size))


def num_eval_batches(samples: Samples, micro_batch_size: int, dp_size: int) -> int:
    """Micro batches that `eval_batches` gives, the same on every rank."""
    return -(-len(samples) // (micro_batch_size * dp_size))


def eval_batches(
    samples: Samples, *, micro_batch_size: int, dp_rank: int, dp_size: int, first_counted: Callable[[int], int] | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every sample once over all ranks: (tokens int64 [B, T], valid bool [B]), or (tokens, counted bool [B, S]) where `first_counted` tells the
    first position of a sample whose prediction counts.

    All ranks get equally many batches of the same shape, as pipeline schedules need; where samples run out, sample 0 stands in and is not valid.
    """
    for micro_batch in range(num_eval_batches(samples, micro_batch_size, dp_size)):
        first = (micro_batch * dp_size + dp_rank) * micro_batch_size
        indices = range(first, first + micro_batch_size)
        valid_B = torch.tensor([index < len(samples) for index in indices])
        tokens_BT = torch.stack([samples[index if index < len(samples) else 0] for index in indices])
        if first_counted is None:
            yield tokens_BT, valid_B
        else:
            begin_B = torch.tensor([first_counted(index) if index < len(samples) else 0 for index in indices])
            yield tokens_BT, valid_B[:, None] & (torch.arange(tokens_BT.size(1) - 1) >= begin_B[:, None])

"""Prepared tokens -> samples -> batches.

Shape letters: B sequences of a micro batch, T tokens of a sequence and one more (inputs are [:-1], labels [1:]).
"""

import hashlib
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from minitron.data.indexed import GPTDataset, GPTDatasetConfig, Split, helpers, num_tokens, open_indexed, read_tokens
from minitron.data.lengths import rows_of, taken, windows_in
from minitron.files import atomic_path

Blend = Sequence[tuple[Path, float]]  # prefixes of .bin/.idx files, each with its weight (manifest.Manifest.blend gives it)


class Samples(Protocol):
    """What batches are made of: item i is int64 [T]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> torch.Tensor: ...


class TrainingSamples:
    """`num_samples` sequences of seq_length + 1 tokens, in Megatron's shuffled order, which depends on the tokens, `seed` and `num_samples` alone.

    Each source of the blend is a `GPTDataset`: its documents, shuffled, are put one after another as often as needed and cut; a sequence's last token
    is the next one's first. Sources alternate so that every stretch of samples holds them by weight. The orders are kept under `cache_dir`, which
    all ranks share; `once` runs what one of them does for all, while the others wait.
    """

    def __init__(self, blend: Blend, seq_length: int, num_samples: int, seed: int, cache_dir: Path,
                 once: Callable[[Callable[[], None]], None] = lambda make: make()) -> None:  # fmt: skip
        weights = np.array([weight for _, weight in blend], dtype=np.float64)
        self.part_of = np.zeros(num_samples, dtype=np.int16)
        self.sample_of = np.zeros(num_samples, dtype=np.int64)
        # not Megatron's BlendedDataset: of 0.16.1, it needs a process group even in a single process, and guesses how much of each part it needs
        helpers.build_blending_indices(self.part_of, self.sample_of, weights / weights.sum(), len(blend), num_samples, False)
        needed = np.bincount(self.part_of, minlength=len(blend))
        self.parts = {
            number: _shuffled(Path(prefix), seq_length, int(needed[number]), seed, Path(cache_dir), once)
            for number, (prefix, _) in enumerate(blend)
            if needed[number]
        }

    def __len__(self) -> int:
        return len(self.part_of)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Sample `index` as int64 [T]."""
        item = self.parts[int(self.part_of[index])][int(self.sample_of[index])]
        return torch.cat([item["tokens"], item["labels"][-1:]])


def _shuffled(prefix: Path, seq_length: int, num_samples: int, seed: int, cache_dir: Path, once: Callable[[Callable[[], None]], None]) -> GPTDataset:
    indexed = open_indexed(prefix, "data.train")
    # Megatron names its files by the path of the tokens, and writes them in place: the folder is named by what they are made from, and complete
    lengths = hashlib.sha256(indexed.sequence_lengths.tobytes()).hexdigest()[:16]
    folder = cache_dir / f"{lengths}-length{seq_length}-samples{num_samples}-seed{seed}"

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
    predicted once. A last, partial window is left out.

    `limit_tokens` reads that many predicted tokens at most, rounded down to whole windows; `count` asks for exactly so many windows. Of a blend, each
    text gives its share by weight (all of it, where neither is given). With `shuffle_seed` the windows are drawn without replacement, otherwise they
    are the first ones, in order. Raises RequestError where not even one window, or not `count` windows, are there; `setting` is what it names.
    """

    def __init__(self, blend: Blend, seq_length: int, *, limit_tokens: int | None = None, count: int | None = None, shuffle_seed: int | None = None,
                 setting: str = "eval.tokens") -> None:  # fmt: skip
        self.seq_length = seq_length
        self.texts = [open_indexed(Path(prefix), setting) for prefix, _ in blend]
        there = [windows_in(num_tokens(text), seq_length) for text in self.texts]
        counts = taken(there, [weight for _, weight in blend], seq_length, limit_tokens, count, setting)
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
        return torch.from_numpy(read_tokens(text, window * self.seq_length, self.seq_length + 1))


def batches(samples: Samples, *, start: int, micro_batch_size: int, num_microbatches: int, dp_rank: int, dp_size: int) -> Iterator[torch.Tensor]:
    """This data-parallel rank's micro batches, int64 [B, T], from sample `start` on; `num_microbatches` of them are a step.

    Micro batch m of a step is, over the ranks, the m-th run of micro_batch_size * dp_size samples: a step holds the same samples whatever the micro
    batch size and the number of ranks. Ends before the first step that can't be filled, on all ranks alike.
    """
    width = micro_batch_size * dp_size
    steps = (len(samples) - start) // (width * num_microbatches)
    for micro_batch in range(steps * num_microbatches):
        yield torch.stack([samples[index] for index in rows_of(start, micro_batch, micro_batch_size, dp_rank, dp_size)])


def num_eval_batches(samples: Samples, micro_batch_size: int, dp_size: int) -> int:
    """Micro batches that `eval_batches` gives, the same on every rank."""
    return -(-len(samples) // (micro_batch_size * dp_size))


def eval_batches(samples: Samples, *, micro_batch_size: int, dp_rank: int, dp_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every sample once over all ranks: (tokens int64 [B, T], valid bool [B]).

    All ranks get equally many batches of the same shape, as pipeline schedules need; where samples run out, sample 0 stands in and is not valid.
    """
    for micro_batch in range(num_eval_batches(samples, micro_batch_size, dp_size)):
        first = (micro_batch * dp_size + dp_rank) * micro_batch_size
        indices = range(first, first + micro_batch_size)
        valid = torch.tensor([index < len(samples) for index in indices])
        yield torch.stack([samples[index if index < len(samples) else 0] for index in indices]), valid

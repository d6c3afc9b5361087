"""Cached predictions of a sharded teacher against plain `transformers` logits in float64: written, read back, gone on with, refused."""

import dataclasses
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minitron.config.build import build
from minitron.config.schema import Config, Parallel
from minitron.data.corpus import batches
from minitron.distillation.cache import MANIFEST, Cache, CachedTeacher, Description, decode, encode, finish, halves, joined, missing
from minitron.distillation.signal import Head
from minitron.distillation.topk import top_signal
from minitron.engine.batch import Batch
from minitron.engine.parallel import beside, on_main
from minitron.errors import RequestError
from minitron.stages.cache import make
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import UNTIED, save_model, tokens_of

SAMPLES, LENGTH, PER_FILE, TOP, TEMPERATURE, BATCH = 10, 12, 4, 7, 1.5, 4
WIDE = {"vocab_size": 80021, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SECOND = "samples_0000000004.npz"
ROUNDING = 2.0**-11  # the error that the stored type may make, after what is read is brought to a sum of one


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {61: save_model(root / "small", 1, **UNTIED), 80021: save_model(root / "wide", 2, **WIDE)}


@pytest.fixture(scope="module")
def oracle(folders):
    """{vocabulary: log-probabilities of every sample's predictions [N, S, V]}, in float64."""

    def log_probs(vocab_size, folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        with torch.no_grad():
            return (model(samples_of(vocab_size)[:, :-1]).logits / TEMPERATURE).log_softmax(-1)

    return {vocab_size: log_probs(vocab_size, folder) for vocab_size, folder in folders.items()}


def samples_of(vocab_size=61):
    return tokens_of(vocab_size, SAMPLES, LENGTH + 1)


@dataclasses.dataclass
class Ordered:
    """Samples as a training reads them; with `second`, each is two documents, of which the second begins there."""

    tokens: torch.Tensor
    second: int | None = None

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return self.tokens[index]

    def batch(self, numbers):
        tokens_BT = self.tokens[list(numbers)]
        if self.second is None:
            return Batch(tokens_BT)
        return Batch(tokens_BT, None, (torch.arange(LENGTH) >= self.second).long().expand(len(tokens_BT), -1))


def description(**changes):
    usual = Description("model", "text", 1, 61, LENGTH, SAMPLES, PER_FILE, TEMPERATURE, TOP, "fp32", "stream", False)
    return dataclasses.replace(usual, **changes)


def write(world, folder, model, micro_batch_size=2, layout=None, second=None, **changes):
    """Make what is missing of a cache, as the verb does; the first samples of the files that were made."""
    wanted = description(**changes)
    cfg = build(Config, {"teacher": {"cache": {"top_k": wanted.top_k}}, "distill": {"temperature": TEMPERATURE, "chunk_tokens": 5},
                         "train": {"micro_batch_size": micro_batch_size, "global_batch_size": 12}, "logging": {"progress": False}})  # fmt: skip
    its_world = world if layout is None else beside(world, layout)
    teacher = load(open_folder(model, "teacher.path"), its_world, torch.float32)
    todo = on_main(world, lambda: missing(folder, wanted))
    samples = Ordered(samples_of(wanted.vocab_size), second)
    make(todo, wanted, folder, types.SimpleNamespace(cfg=cfg, world=world, teacher_world=its_world, teacher=teacher, training_samples=samples))
    on_main(world, lambda: finish(folder, wanted))
    return todo


def write_wide(world, folder, model):
    return write(world, folder, model, 4, vocab_size=80021)


def read(world, folder, micro_batch_size, step=0, top_k=TOP):
    """A step's signals, those of each microbatch; (tokens, log-probabilities, tails)."""
    cache = Cache.load(folder)
    samples = Ordered(samples_of(cache.description.vocab_size))
    cache.verify(samples, world)
    count = BATCH // (micro_batch_size * world.dp)
    stream = batches(samples, start=step * BATCH, micro_batch_size=micro_batch_size, num_microbatches=count, dp_rank=world.dp_rank, dp_size=world.dp)
    signals = CachedTeacher(cache, top_k, world).signals(step, [next(stream) for _ in range(count)])
    return [dataclasses.astuple(signal) for signal in signals]


def expect(found, log_probs_TV, top_k=TOP, rounding=ROUNDING):
    """A signal holds the oracle's most probable tokens, in order, their log-probabilities and the rest's mass."""
    tokens_TK, log_probs_TK, tail_T = found
    top = log_probs_TV.topk(top_k)
    rest_T = log_probs_TV.scatter(1, top.indices, -torch.inf).logsumexp(1)
    assert (tokens_TK.dtype, log_probs_TK.dtype, tail_T.dtype) == (torch.int64, torch.float32, torch.float32)
    assert torch.equal(tokens_TK, top.indices)
    assert (log_probs_TK - top.values).abs().max() < rounding + 1e-4
    assert (tail_T - rest_T).abs().max() < rounding + 1e-4
    total = torch.cat([log_probs_TK, tail_T[:, None]], 1).logsumexp(1)
    assert total.abs().max() < 1e-6


def of_microbatch(log_probs_NSV, step, number, size, dp, dp_rank, cp=1, cp_rank=0):
    """The oracle's part of a rank's microbatch, [S x B, V], by the definition of the order."""
    first = step * BATCH + number * size * dp + dp_rank * size
    pieces = log_probs_NSV[first : first + size].chunk(2 * cp, dim=1)
    mine = log_probs_NSV[first : first + size] if cp == 1 else torch.cat([pieces[cp_rank], pieces[2 * cp - 1 - cp_rank]], 1)
    return mine.transpose(0, 1).flatten(0, 1)


def contents(folder):
    """{file: its arrays}"""
    return {path.name: dict(np.load(path)) for path in sorted(folder.glob("*.npz"))}


WRITERS = [
    (Layout(), 1), (Layout(), 4), (Layout(tp=2, sp=True), 2), (Layout(tp=3), 3), (Layout(dp=2), 2), (Layout(pp=2), 2), (Layout(cp=2), 4),
    (Layout(tp=2, cp=2), 2), (Layout(pp=2, vpp=2), 1), (Layout(tp=2, pp=2), 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def alone_cache(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    on_ranks(write, Layout(), folder, folders[61], 2)
    return folder


@pytest.mark.multirank
@pytest.mark.parametrize(("layout", "micro_batch_size"), WRITERS, ids=str)
def test_every_layout_writes_the_teacher_s_top(layout, micro_batch_size, folders, oracle, alone_cache, tmp_path, alone):
    for todo in on_ranks(write, layout, tmp_path, folders[61], micro_batch_size):
        assert todo == [0, 4, 8]
    for step in range(2):
        for number, found in enumerate(read(alone, tmp_path, 2, step)):
            expect(found, of_microbatch(oracle[61], step, number, 2, 1, 0))
    mine, theirs = contents(tmp_path), contents(alone_cache)
    assert [[*mine], [*Cache.load(tmp_path).files]] == [[*theirs]] * 2
    for file, arrays in mine.items():
        assert len(arrays) == 2 + 3 * (2 if file.endswith("8.npz") else 4)
        for name, array in arrays.items():
            assert array.dtype == theirs[file][name].dtype
            if name.startswith(("steps", "tail")):  # a logit that differs in its last bit may round the other way
                one, other = ((joined(of) if name.startswith("steps") else of).astype(int) for of in (array, theirs[file][name]))
                assert np.abs(one - other).max() <= 2
            else:
                assert np.array_equal(array, theirs[file][name])


@pytest.mark.multirank
def test_a_teacher_in_its_own_layout(folders, oracle, tmp_path, alone):
    on_ranks(write, Layout(dp=2), tmp_path, folders[61], 2, Parallel(tp=2))
    for number, found in enumerate(read(alone, tmp_path, 2)):
        expect(found, of_microbatch(oracle[61], 0, number, 2, 1, 0))


SECOND_DOCUMENT = 5


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, cp=2)], ids=str)
def test_documents_that_do_not_see_each_other(layout, folders, tmp_path, alone):
    on_ranks(write, layout, tmp_path, folders[61], 2, None, SECOND_DOCUMENT)
    model, inputs = AutoModelForCausalLM.from_pretrained(folders[61], dtype=torch.float64).eval(), samples_of()[:, :-1]
    with torch.no_grad():
        documents = [model(part).logits for part in (inputs[:, :SECOND_DOCUMENT], inputs[:, SECOND_DOCUMENT:])]
    log_probs = (torch.cat(documents, 1) / TEMPERATURE).log_softmax(-1)
    (found,) = read(alone, tmp_path, 4)
    expect(found, of_microbatch(log_probs, 0, 0, 4, 1, 0))


READERS = [(Layout(), 4), (Layout(dp=2), 1), (Layout(dp=2), 2), (Layout(tp=2), 4), (Layout(pp=2), 1), (Layout(dp=2, cp=2), 2)]


@pytest.fixture(scope="module")
def sharded_cache(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    on_ranks(write, Layout(tp=2), folder, folders[61], 4)
    return folder


@pytest.mark.multirank
@pytest.mark.parametrize(("layout", "micro_batch_size"), READERS, ids=str)
def test_every_split_of_a_batch_reads_its_samples(layout, micro_batch_size, sharded_cache, oracle):
    """Of the second step, as after a resume; its samples lie in a file that is not the first."""
    ranks = on_ranks(read, layout, sharded_cache, micro_batch_size, 1)
    holding = [found for found in ranks if found]
    assert len(holding) == layout.size // layout.pp
    # ranks of the last stage: tensor ranks first, then context, then replicas
    for place, found in enumerate(holding):
        cp_rank, dp_rank = place // layout.tp % layout.cp, place // (layout.tp * layout.cp)
        assert len(found) == BATCH // (micro_batch_size * layout.dp)
        for number, signal in enumerate(found):
            expect(signal, of_microbatch(oracle[61], 1, number, micro_batch_size, layout.dp, dp_rank, layout.cp, cp_rank))


@pytest.mark.multirank
def test_token_numbers_of_a_large_vocabulary(folders, oracle, tmp_path, alone):
    on_ranks(write_wide, Layout(tp=2), tmp_path, folders[80021])
    assert contents(tmp_path)["samples_0000000000.npz"]["tokens.0"].dtype == np.uint32
    (found,) = read(alone, tmp_path, 4)
    assert found[0].max() > 65535
    expect(found, of_microbatch(oracle[80021], 0, 0, 4, 1, 0))


def test_fewer_tokens_than_were_kept(alone_cache, oracle, alone):
    (found,) = read(alone, alone_cache, 4, top_k=3)
    expect(found, of_microbatch(oracle[61], 0, 0, 4, 1, 0), top_k=3)


def top_of(world, hidden_TG, weight_VG, top_k, chunk_tokens):
    """The top over this rank's rows, shards of unequal size."""
    rows = torch.arange(len(weight_VG)).tensor_split(world.tp)[world.tp_rank]
    return dataclasses.astuple(top_signal(hidden_TG, Head(weight_VG[rows], int(rows[0])), top_k, TEMPERATURE, world, chunk_tokens))


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=3)], ids=str)
def test_top_over_shards_that_hold_fewer_and_a_rest_too_small_to_subtract(layout):
    generator = torch.Generator().manual_seed(3)
    hidden_TG, weight_VG = torch.randn(11, 6, generator=generator), torch.randn(61, 6, generator=generator)
    hidden_TG[4:] *= 40  # almost all mass on a few tokens
    log_probs_TV = (hidden_TG.double() @ weight_VG.double().t() / TEMPERATURE).log_softmax(-1)
    for found in on_ranks(top_of, layout, hidden_TG, weight_VG, 40, 4):
        expect(found, log_probs_TV, top_k=40, rounding=0.0)
        assert found[2].min() < -40


def test_the_error_of_what_is_stored():
    log_probs = -np.random.default_rng(0).uniform(0, 31.9, 100_000)
    assert np.abs(decode(encode(log_probs)) - log_probs).max() <= 2**-12 + 1e-6
    steps = np.arange(2**16, dtype=np.uint16).reshape(2, -1)
    assert np.array_equal(joined(halves(steps)), steps)
    assert encode(np.array([0.0, -40.0, -np.inf])).tolist() == [0, 65535, 65535]
    assert np.exp(decode(np.array([65535]))) < 2e-14


@pytest.fixture
def copy(alone_cache, tmp_path):
    """A finished cache, to be spoiled."""
    return Path(shutil.copytree(alone_cache, tmp_path / "cache"))


def written(folder):
    """{file: when, and what of it}"""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def damage(path):
    """Change one byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "again"),
    [
        (lambda folder: None, []),
        (lambda folder: [(folder / name).unlink() for name in (SECOND, MANIFEST)], [4]),  # as if killed
        (lambda folder: (folder / SECOND).unlink(), [4]),
        (lambda folder: damage(folder / SECOND), [4]),
        (lambda folder: (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-50]), [4]),
        (lambda folder: (folder / MANIFEST).unlink(), []),
    ],
    ids=["finished", "killed", "missing", "damaged", "truncated", "without_manifest"],
)
def test_what_is_there_is_not_made_again(spoil, again, copy, folders, alone_cache, alone):
    before = written(copy)
    spoil(copy)
    assert write(alone, copy, folders[61]) == again
    after = written(copy)
    assert {name: content for name, (_, content) in after.items()} == {name: path.read_bytes() for name in before for path in [alone_cache / name]}
    assert {name for name in after if after[name][0] != before[name][0]} - {MANIFEST} == ({SECOND} if again else set())


def test_files_of_another_cache_that_was_not_finished_are_made_again(copy, folders, alone):
    (copy / MANIFEST).unlink()
    assert write(alone, copy, folders[61], top_k=5) == [0, 4, 8]
    (copy / MANIFEST).unlink()
    (copy / SECOND).write_bytes(b"")
    assert missing(copy, description(top_k=5)) == [4]


def test_a_finished_cache_of_something_else_is_kept(copy):
    with pytest.raises(RequestError) as refusal:
        missing(copy, description(temperature=2.0))
    assert str(refusal.value) == f"teacher.cache.folder={copy}: holds a cache whose distill.temperature is 1.5, not 2.0: another folder is needed"


def test_teacher_and_text_are_called_by_their_names(alone_cache):
    """Names are for messages alone: another name of the same is no other cache."""
    cache = dataclasses.replace(Cache.load(alone_cache), names={"teacher": "org/big", "data": "a.jsonl"})
    cache.check(dataclasses.asdict(description()), {"teacher": "big", "data": "b.jsonl"})
    where = f"teacher.cache.folder={alone_cache}: made with another "
    for change, said in {
        ("teacher", "big"): "teacher (teacher.path, or else model.path): org/big, and this run's is big",
        ("data", "a.jsonl"): "text (data.train): a.jsonl had another content then",
    }.items():
        with pytest.raises(RequestError) as refusal:
            cache.check(dataclasses.asdict(description(**{change[0]: "c"})), dict([change]))
        assert str(refusal.value) == where + said


@pytest.mark.parametrize("content", ["", "[]", '{"cache": {}}', '{"cache": 1, "files": []}'])
def test_a_damaged_manifest_says_what_helps(content, copy):
    (copy / MANIFEST).write_text(content)
    said = f"teacher.cache.folder={copy}: its manifest.json is damaged, or not that of a cache of this version: "
    with pytest.raises(RequestError) as refusal:
        Cache.load(copy)
    assert str(refusal.value) == said + "remove the folder, and minitron cache makes it again"
    (copy / "other.bin").touch()
    with pytest.raises(RequestError) as refusal:
        Cache.load(copy)
    assert str(refusal.value) == said + "another folder is needed"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 97}, "teacher.cache.folder={}: made with another vocabulary: 61, and this run's is 97"),
        ({"teacher": "b"}, "teacher.cache.folder={}: made with another teacher (teacher.path, or else model.path): model, and this run's is b"),
        ({"data": "novel"}, "teacher.cache.folder={}: made with another text (data.train): text, and this run's is novel"),
        ({"seed": 2}, "teacher.cache.folder={}: made with another seed: 1, and this run's is 2"),
        ({"seq_length": 24}, "teacher.cache.folder={}: made with another train.seq_length: 12, and this run's is 24"),
        ({"temperature": 1.0}, "teacher.cache.folder={}: made with another distill.temperature: 1.5, and this run's is 1.0"),
        ({"separate_documents": True}, "teacher.cache.folder={}: made with another data.separate_documents: false, and this run's is true"),
        ({"top_k": 8}, "teacher.cache.top_k=8: the cache in {} holds 7: no more can be read"),
        ({"samples": 12}, "teacher.cache.folder={}: it holds 10 samples, and train.steps x train.global_batch_size = 12 are needed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_cache_that_does_not_fit_the_run(change, said, alone_cache):
    cache = Cache.load(alone_cache)
    cache.check(dataclasses.asdict(description(top_k=3, samples=8, samples_per_file=1, dtype="bf16")))  # these need not be the same
    with pytest.raises(RequestError) as refusal:
        cache.check(dataclasses.asdict(description(**change)))
    assert str(refusal.value) == said.format(alone_cache)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / SECOND).unlink(), f"teacher.cache.folder={{0}}: {{0}}/{SECOND} is missing; minitron cache makes it again"),
        (lambda folder: damage(folder / SECOND), f"teacher.cache.folder={{0}}: {{0}}/{SECOND} is damaged; minitron cache makes it again"),
    ],
    ids=["missing", "damaged"],
)
def test_missing_and_damaged_files(spoil, said, copy, alone):
    spoil(copy)
    with pytest.raises(RequestError) as refusal:
        Cache.load(copy).verify(samples_of(), alone)
    assert str(refusal.value) == said.format(copy)
    Cache.load(copy).verify(samples_of()[:4], alone)  # a run that does not need that file


def test_a_folder_without_a_finished_cache(copy):
    (copy / MANIFEST).unlink()
    with pytest.raises(RequestError, match=rf"^teacher.cache.folder={copy}: no finished cache is there; minitron cache makes one"):
        Cache.load(copy)


def test_other_samples_are_seen_before_training_and_in_it(alone_cache, alone):
    cache, others = Cache.load(alone_cache), samples_of().clone()
    others[5, -1] = (others[5, -1] + 1) % 61
    with pytest.raises(RequestError, match=f"^teacher.cache.folder={alone_cache}: made of other samples: its sample 5 is not this run's"):
        cache.verify(others, alone)
    teacher = CachedTeacher(cache, TOP, alone)
    teacher.signals(0, [Batch(others[:4])])
    with pytest.raises(RequestError, match=f"^teacher.cache.folder={alone_cache}: its sample 5 is of other tokens than this run's$"):
        teacher.signals(1, [Batch(others[4:8])])


def verified(world, folder):
    """What each rank says of a cache of which one rank's file is damaged, before training and in it."""
    said = []
    cache = Cache.load(folder)
    for action in (lambda: cache.verify(samples_of(), world), lambda: read_unchecked(world, cache)):
        try:
            action()
        except RequestError as error:
            said.append(str(error))
    return said


def read_unchecked(world, cache):
    rows = samples_of()[4 * world.dp_rank : 4 * world.dp_rank + 4]
    return CachedTeacher(cache, TOP, world).signals(0, [Batch(rows)])


@pytest.mark.multirank
def test_every_rank_hears_of_what_one_cannot_read(copy):
    (copy / SECOND).write_bytes(b"nothing")
    one, two = on_ranks(verified, Layout(dp=2), copy)
    assert one == two
    assert len(one) == 2
    assert all(SECOND in said for said in one)

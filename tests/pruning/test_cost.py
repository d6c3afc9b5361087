"""What a cut costs: bytes between ranks, memory on a rank, and nothing that stays behind."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist

from minitron.arch.axes import PARAMETERS, part_sizes
from minitron.arch.shards import shard_shape, stage_of
from minitron.config.schema import Parallel, Target
from minitron.engine.model import rows
from minitron.importance.scores import random_scores
from minitron.pruning.keep import select
from minitron.pruning.reslice import reslice
from minitron.pruning.target import target_arch
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.memory import LiveBytes
from tests.oracles.models import UNTIED, save_model

# large enough that the lists of rows to keep are small beside the weights
SIZES = {"num_hidden_layers": 6, "hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
         "vocab_size": 512, **UNTIED}  # fmt: skip
TARGETS = {
    "width": Target(hidden_size=64, ffn_hidden_size=192, num_query_groups=2),
    "heads": Target(num_attention_heads=4),
    "everything": Target(num_layers=4, hidden_size=64, ffn_hidden_size=192),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "wide", 3, **SIZES)


class Traffic:
    """Bytes that this rank sends to others by the collectives that a cut may use."""

    def __init__(self, monkeypatch):
        self.bytes = 0
        all_to_all, send = dist.all_to_all_single, dist.send

        def counted_all_to_all(received, sent, output_split_sizes, input_split_sizes, group):
            row = sent[0].numel() * sent.element_size() if len(sent) else 0
            me = dist.get_rank(group)
            self.bytes += sum(count * row for rank, count in enumerate(input_split_sizes) if rank != me)
            return all_to_all(received, sent, output_split_sizes, input_split_sizes, group=group)

        def counted_send(tensor, dst, group):
            self.bytes += tensor.numel() * tensor.element_size()
            return send(tensor, dst=dst, group=group)

        monkeypatch.setattr(dist, "all_to_all_single", counted_all_to_all)
        monkeypatch.setattr(dist, "send", counted_send)


def cut_and_count(world, folder, name, even):
    """Bytes that this rank sent, and what was kept."""
    source = open_folder(folder, "model.path")
    target = target_arch(source.arch, TARGETS[name], Parallel(tp=world.tp, pp=world.pp, vpp=world.vpp))
    keep = select(spread_evenly(source.arch) if even else random_scores(source.arch, 4), source.arch, target)
    model = load(source, world, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        traffic = Traffic(patch)
        reslice(model, keep, target, world)
    return traffic.bytes, keep, source.arch, target


def spread_evenly(arch):
    """Scores by which every tensor rank, and every stage, keeps the same number of units."""
    scores = random_scores(arch, 4)
    for name, score in scores.items():
        every_other = torch.arange(len(score)) % 2 == 0 if name != "layers.bi" else torch.arange(len(score)) % 3 != 1
        score += 10.0 * every_other
    return scores


def least_bytes(keep, arch, target, layout):
    """The lower bound: of every sharded matrix each rank must give away the kept units that it has above its share, and every layer
    whose stage changes must travel, whole, once it is cut."""
    total = 0
    for position, layer in enumerate(map(int, keep.layers)):
        moves = stage_of(layer, arch.num_layers, layout.pp, layout.vpp) != stage_of(position, target.num_layers, layout.pp, layout.vpp)
        for row in PARAMETERS:
            if not row.per_layer or not row.exists(arch):
                continue
            if moves:
                total += 4 * layout.tp * int(np.prod(shard_shape(row, target, layout.tp)))
            if row.tp_dim is None:
                continue
            dim = row.dims[row.tp_dim]
            units, held = getattr(keep, dim.axis)[layer], {"ffn": arch.ffn_hidden_size, "groups": arch.num_query_groups}[dim.axis] // layout.tp
            share = len(units) // layout.tp
            surplus = sum(max(0, int(((units >= rank * held) & (units < (rank + 1) * held)).sum()) - share) for rank in range(layout.tp))
            # a matrix' other dim is hidden, cut before it travels if it comes first in the table, after if it comes last
            other = 1 if len(row.dims) == 1 else (target if row.tp_dim == 1 else arch).hidden_size
            total += 4 * surplus * sum(part_sizes(dim, target if dim.axis == "groups" else arch)) * other
    return total


@pytest.mark.multirank
@pytest.mark.parametrize("even", [False, True], ids=["uneven", "even"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=4), Layout(pp=2), Layout(tp=2, pp=2), Layout(pp=2, vpp=2)], ids=str)
def test_no_byte_travels_that_need_not(layout, even, folder):
    for name in TARGETS:
        if name == "width" and layout.tp == 4:
            continue  # two KV groups on four ranks: dead ones fill the last two
        ranks = on_ranks(cut_and_count, layout, folder, name, even)
        _, keep, arch, target = ranks[0]
        least = least_bytes(keep, arch, target, layout)
        assert sum(found[0] for found in ranks) == least, name
        if even and (name != "everything" or (layout.vpp == 1 and layout.tp < 4)):
            assert least == 0, name


def cut_and_weigh(world, folder, name):
    """The peak of memory above what the model took before, the largest parameter's shard, and what of the old model is left."""
    source = open_folder(folder, "model.path")
    target = target_arch(source.arch, TARGETS[name], Parallel(tp=world.tp, pp=world.pp))
    keep = select(random_scores(source.arch, 4), source.arch, target)
    model = load(source, world, torch.float32)
    parameters = list(model.parameters())
    largest = max(parameter.numel() * 4 for parameter in parameters)
    left = [weakref.ref(parameter.untyped_storage()) for parameter in parameters] + [weakref.ref(module) for module in model.modules()]
    with LiveBytes(parameters) as live:
        del parameters
        pruned = reslice(model, keep, target, world)
    del model
    gc.collect()
    assert sum(parameter.numel() for parameter in pruned.parameters()) > 0
    return live.peak, largest, sum(reference() is not None for reference in left)


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2)], ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_the_peak_is_one_parameter_and_nothing_of_the_old_model_stays(name, layout, folder):
    for peak, largest, left in on_ranks(cut_and_weigh, layout, folder, name):
        assert left == 0
        assert peak <= 1.1 * largest


def cut_in_turn_and_weigh(world, folder):
    """For each target, cut from one model that stays: the peak above what the model took, what the pruned one takes, the largest shard."""
    source = open_folder(folder, "model.path")
    model = load(source, world, torch.float32)
    parameters, found = list(model.parameters()), []
    largest = max(parameter.numel() * 4 for parameter in parameters)
    for target in (target_arch(source.arch, one, Parallel(tp=world.tp, pp=world.pp)) for one in TARGETS.values()):
        with LiveBytes(parameters) as live:
            pruned = reslice(model, select(random_scores(source.arch, 4), source.arch, target), target, world, empty=False)
        found.append((live.peak, sum(parameter.numel() * 4 for parameter in pruned.parameters()), largest))
    return found


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2)], ids=str)
def test_where_the_old_model_stays_the_peak_is_the_new_one(layout, folder):
    for found in on_ranks(cut_in_turn_and_weigh, layout, folder):
        for peak, pruned, largest in found:
            assert pruned <= peak <= pruned + 1.1 * largest


def loaded_and_weighed(world, folder):
    """The peak of memory while a rank reads its shards, what the shards take, and the largest parameter of the whole model."""
    source = open_folder(folder, "model.path")
    with LiveBytes([]) as live:
        model = load(source, world, torch.float32)
    shards = sum(parameter.numel() * 4 for parameter in model.parameters())
    whole = max(int(np.prod(shard_shape(row, source.arch, 1))) * 4 for _, row, _ in rows(model))
    return live.peak, shards, whole


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2)], ids=str)
def test_a_rank_reads_its_own_shards_and_no_more(layout, folder):
    for peak, shards, largest in on_ranks(loaded_and_weighed, layout, folder):
        assert peak <= shards + largest

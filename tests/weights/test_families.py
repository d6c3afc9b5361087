"""Every family of the table, each with its samples (tests/oracles/samples.py): against `transformers` at every kind of layout.

Those with experts are in test_experts.py. A layout is started once for all of them. What a run at one layout exported, `transformers` loads; the
other layouts are held against that.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from minitron.arch.axes import PARAMETERS
from minitron.arch.families import FAMILIES, hf_names, written_as
from minitron.config.schema import Distill, Parallel, Target, Train
from minitron.distillation.signal import LiveTeacher
from minitron.distillation.step import distillation_loss
from minitron.engine.batch import Batch
from minitron.engine.checkpoint import load_model, save_model
from minitron.engine.schedule import forward_only
from minitron.engine.scoring import language_model_score
from minitron.engine.trainer import Trainer
from minitron.importance.depth import losses_without
from minitron.importance.hooks import Probes
from minitron.importance.scores import collect, magnitude_scores, random_scores
from minitron.pruning.keep import select
from minitron.pruning.reslice import reslice
from minitron.pruning.target import target_arch
from minitron.weights.load import load
from minitron.weights.save import export
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import hf_model, same_tensors, saved_tensors, tokens_of
from tests.oracles.samples import SAMPLES, config_of, save_samples, targets_of
from tests.oracles.sharded import of_last_stage, whole_logits
from tests.oracles.training import distil

LENGTH, VOCAB = 24, 61
FIRST, OTHERS = Layout(tp=2, pp=2), (Layout(), Layout(tp=2), Layout(pp=2))
FURTHER = (Layout(tp=3, sp=True), Layout(cp=2), Layout(pp=2, vpp=2))
DENSE = {family: samples for family, samples in SAMPLES.items() if "num_moe_experts" not in FAMILIES[family].sizes}
# a model of each family: the one of its samples that has most of what others lack
QUICK = {family: list(samples)[0 if family in ("gemma2", "gpt2", "opt") else -1] for family, samples in DENSE.items()}
TRAIN, TEMPERATURE = {"steps": 2, "warmup_steps": 1, "lr": 1e-3, "min_lr": 1e-4, "global_batch_size": 4, "seq_length": LENGTH}, 1.5


class Runs(NamedTuple):
    """What the first layout made of models, by their names and those of what they were cut to ("whole": not cut)."""

    folders: dict[str, Path]
    cuts: dict[str, list[str]]
    out: Path  # what it exported
    scores: dict[str, Any]  # of units
    expected: dict[tuple[str, str], torch.Tensor]  # the logits that `transformers` makes of what was exported
    ranks: list[Any]


def tokens():
    return tokens_of(VOCAB, 2, LENGTH)


def logits_of(folder):
    with torch.no_grad():
        return hf_model(folder)(tokens()).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_samples(tmp_path_factory.mktemp("samples"), wanted=[f"{family}.{sample}" for family, samples in DENSE.items() for sample in samples])


@pytest.fixture(scope="module", params=["one", pytest.param("every", marks=pytest.mark.slow)])
def runs(request, folders, tmp_path_factory):
    quick, out = request.param == "one", tmp_path_factory.mktemp("exported")
    chosen = {name: folders[name] for name in folders if not quick or name in map(".".join, QUICK.items())}
    cuts = {name: list(targets_of(name))[-1:] if quick else list(targets_of(name)) for name in chosen}  # the last one cuts several axes
    ranks = on_ranks(at_layout, FIRST, chosen, cuts, out)
    expected = {key: logits_of(out / key[0] / key[1]) for key in ranks[0][0]}
    return Runs(chosen, cuts, out, ranks[0][1], expected, ranks)


def at_layout(world, folders, cuts, out):
    """Logits of every model, whole and cut, and its scores by kind. Under `out`, where it is given, what is exported of them."""
    logits, scores = {}, {}
    for name, folder in folders.items():
        source = open_folder(folder, "model.path")
        model = load(source, world, torch.float32)
        probes = Probes(model, world, "mean", "l2", LENGTH)
        with probes.attached():
            forward_only(model, [tokens()], world, watch=probes)
        scores[name] = {"activation": collect(probes, world), "magnitude": magnitude_scores(model, world)}
        made, targets = {"whole": model}, targets_of(name)
        for number, axis in enumerate(cuts[name]):
            arch = target_arch(source.arch, targets[axis], Parallel(tp=world.tp, pp=world.pp, cp=world.cp, vpp=world.vpp), exported=True)
            made[axis] = reslice(model, select(random_scores(source.arch, number), source.arch, arch), arch, world, empty=False)
        for axis, cut in made.items():
            logits[name, axis] = whole_logits(cut, tokens(), world)
            if out is not None:
                export(cut, world, source.config, folder, out / name / axis, torch.float32)
    return logits, scores


def differences(ranks, expected):
    """The samples and cuts whose logits are not those expected."""
    found = {key: (of_last_stage([logits[key] for logits, _ in ranks]) - wanted).abs().max().item() for key, wanted in expected.items()}
    return {key: difference for key, difference in found.items() if not difference < 1e-4}


def test_every_row_has_samples_that_try_what_it_can_say():
    """A row without a sample is refused here, and one whose head is never tied, or never a weight of its own, or whose flags are never set."""
    assert sorted(SAMPLES) == sorted(FAMILIES)
    for model_type, family in FAMILIES.items():
        configs = [config_of(f"{model_type}.{sample}") for sample in SAMPLES[model_type]]
        assert {config.tie_word_embeddings for config in configs} == {True, False}, model_type
        for key in family.flags.values():
            assert {bool(getattr(config, key)) for config in configs} == {True, False}, (model_type, key)
        renamed = {piece for row in PARAMETERS for name in row.hf for piece in family.names if piece in name}
        assert renamed == set(family.names), model_type
        assert all(len(hf_names(row, model_type)[0]) == len(row.hf) for row in PARAMETERS)


@pytest.mark.multirank
def test_what_goes_in_comes_out_bit_by_bit(runs):
    assert [name for name, folder in runs.folders.items() if not same_tensors(saved_tensors(folder), saved_tensors(runs.out / name / "whole"))] == []


@pytest.mark.multirank
def test_logits_are_those_of_transformers_before_and_after_every_cut(runs):
    """What the cut models are held against, `transformers` loaded from what was exported, as the family that the shape is written as."""
    assert differences(runs.ranks, runs.expected) == {}
    assert [name for name, folder in runs.folders.items() if not torch.equal(logits_of(folder), runs.expected[name, "whole"])] == []
    for name, axis in runs.expected:
        source, model = open_folder(runs.out / name / axis, "x"), hf_model(runs.out / name / axis)
        assert source.arch.num_parameters() == model.num_parameters(), (name, axis)
        assert model.config.model_type == written_as(source.arch).model_type == source.arch.family
        sizes = targets_of(name)[axis].sizes if axis != "whole" else ()
        assert [size for size in sizes if getattr(source.arch, size) != getattr(targets_of(name)[axis], size)] == [], (name, axis)


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [*OTHERS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in FURTHER)], ids=str)
def test_other_layouts_make_the_same_of_it(layout, runs):
    """The same logits of whole and cut models as at the first layout, the same scores of units by activations and by weights."""
    if layout in FURTHER and len(runs.folders) > len(QUICK):
        pytest.skip("the first models are enough there")
    ranks = on_ranks(at_layout, layout, runs.folders, runs.cuts, None)
    assert differences(ranks, runs.expected) == {}
    for name, kinds in runs.scores.items():
        for kind, wanted in kinds.items():
            for _, scores in ranks:
                assert scores[name][kind].keys() == wanted.keys()
                for unit, score in wanted.items():
                    found = scores[name][kind][unit]
                    assert torch.allclose(found, score, rtol=1e-4, atol=1e-5), (name, kind, unit, (found - score).abs().max())


def documents_of(folder):
    """Two documents in each window, and the logits that `transformers` makes of each alone."""
    ends, model = (10, LENGTH), hf_model(folder)
    with torch.no_grad():
        parts = [model(tokens()[:, start:end]).logits for start, end in zip((0, *ends), ends, strict=False)]
    return torch.tensor([[0] * ends[0] + [1] * (LENGTH - ends[0])] * 2), torch.cat(parts, dim=1)


def with_documents(world, folders):
    """Logits of windows with documents that don't see each other."""
    models = {name: load(open_folder(folder, "model.path"), world, torch.float32) for name, folder in folders.items()}
    return {name: whole_logits(model, tokens(), world, documents_of(folders[name])[0]) for name, model in models.items()}


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(), pytest.param(Layout(cp=2), marks=pytest.mark.slow)], ids=str)
def test_windows_and_softcaps_with_documents_that_do_not_see_each_other(layout, folders):
    chosen = {name: folders[name] for name in ("mistral.sliding", "gemma2.softcaps", "gemma3_text.biases")}
    ranks = on_ranks(with_documents, layout, chosen)
    for name, folder in chosen.items():
        assert (of_last_stage([rank[name] for rank in ranks]) - documents_of(folder)[1]).abs().max() < 1e-4, name


@pytest.mark.parametrize("name", ["gemma2.softcaps", "gemma3_text.biases", "gpt2.tied"])
def test_the_loss_without_a_layer_is_that_of_the_model_cut_and_saved(name, folders, alone, tmp_path):
    """Over softcaps, windows of some layers and learned positions; with all layers it is that of `transformers`."""
    source, windows = open_folder(folders[name], "model.path"), tokens_of(VOCAB, 3, LENGTH + 1)
    batches = [(windows, torch.ones(3, dtype=torch.bool))]
    model = load(source, alone, torch.float32)
    with torch.no_grad():
        assert language_model_score(model, batches, alone).loss == pytest.approx(
            hf_model(folders[name])(windows, labels=windows).loss.item(), rel=1e-5
        )
    losses = losses_without(model, batches, alone, [1])[1]
    scores = random_scores(source.arch, 0) | {"layers.bi": torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])}
    target = target_arch(source.arch, Target(num_layers=4), Parallel())
    cut = reslice(model, select(scores, source.arch, target), target, alone)
    assert [cut.arch.slides(number) for number in range(4)] == [source.arch.slides(number) for number in (0, 2, 3, 4)]
    save_model(cut, tmp_path / "saved", alone)
    again = load_model(tmp_path / "saved", alone, torch.float32)
    assert again.arch == cut.arch
    assert language_model_score(again, batches, alone).loss == pytest.approx(losses[1].item(), rel=1e-5)


def moving(part, *tensors):
    """What a step moves of each of `tensors`: all but a bias of keys that are not turned, which adds the same to all scores of a query."""
    if part.endswith("attn.c_attn.bias"):
        return [pieces for number, pieces in enumerate(zip(*(tensor.chunk(3) for tensor in tensors), strict=True)) if number != 1]
    return [] if "decoder" in part and part.endswith("k_proj.bias") else [tensors]


@pytest.mark.slow
def test_no_part_of_the_samples_is_idle(folders):
    """Every tensor of a layer, and of what is outside the layers, moves the logits by far more than the tolerance."""
    idle = []
    for name, folder in folders.items():
        model, before = hf_model(folder), logits_of(folder)
        for part, tensor in model.named_parameters():
            if any(f".{layer}." in part for layer in (0, 1, 2, 4)):
                continue
            original = tensor.detach().clone()
            with torch.no_grad():
                tensor.mul_(1 + 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))  # a factor may be normed away
                moved = (model(tokens()).logits - before).abs().max().item()
                tensor.copy_(original)
            if moved < 1e-3 and moving(part, tensor):
                idle.append((name, part, moved))
    assert idle == []


def taught(world, folders, out):
    """Every family's student after two steps at its teacher's side, the same model with other weights: a line per step."""
    lines = {}
    for name, (student_folder, teacher_folder) in folders.items():
        source = open_folder(student_folder, "model.path")
        student, teacher = (load(open_folder(folder, "x"), world, torch.float32) for folder in (student_folder, teacher_folder))
        trainer = Trainer(student, Train(**TRAIN, micro_batch_size=2), world)
        loss = distillation_loss(student, LiveTeacher(teacher.requires_grad_(False), world), Distill(temperature=TEMPERATURE, chunk_tokens=5), world)
        lines[name] = []
        for step, windows in enumerate(global_batches()):
            microbatches = [Batch(part) for part in windows.split(2)]
            lines[name].append(trainer.update(microbatches, loss(step, microbatches)))
        export(student, world, source.config, student_folder, out / name, torch.float32)
    return lines


def global_batches():
    return [tokens_of(VOCAB, 4, LENGTH + 1, seed) for seed in range(2)]


@pytest.mark.multirank
@pytest.mark.parametrize(
    "layout", [Layout(tp=2), *(pytest.param(layout, marks=pytest.mark.slow) for layout in (Layout(tp=2, sp=True), Layout(tp=2, pp=2)))], ids=str
)
def test_steps_of_every_family_are_those_of_plain_models_and_adamw(layout, folders, tmp_path_factory, tmp_path):
    pairs = {}
    for family, sample in QUICK.items():
        student = folders[f"{family}.{sample}"]
        pairs[family] = (student, save_samples(tmp_path_factory.mktemp("teachers"), 100, [f"{family}.{sample}"])[f"{family}.{sample}"])
    ranks = on_ranks(taught, layout, pairs, tmp_path)
    for family, (student, teacher) in pairs.items():
        lines, tensors = distil(student, teacher, global_batches(), Train(**TRAIN), TEMPERATURE)
        for rank in ranks:
            for found, line in zip(rank[family], lines, strict=True):
                assert found["loss"] == pytest.approx(line["loss"], rel=1e-5), family
                assert found["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4), family
        start = saved_tensors(student)
        for part, tensor in saved_tensors(tmp_path / family).items():
            pieces = moving(part, tensor, tensors[part], start[part])
            shares = [(found - wanted).norm() / (wanted - before).norm() for found, wanted, before in pieces]
            assert max(shares, default=0.0) < 1e-2, (family, part)

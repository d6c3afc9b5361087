"""What is refused, or remarked upon, from settings and numbers of tokens alone."""

import contextlib
import dataclasses

import pytest
import torch
import torch._inductor.config

from minitron.arch.families import from_hf
from minitron.checks import (
    asks,
    check,
    check_effect,
    check_lengths,
    check_model,
    check_teacher,
    check_teacher_ranks,
    check_texts,
    remarks,
    training_remarks,
)
from minitron.config.build import build
from minitron.config.schema import Config
from minitron.data.manifest import Manifest, Part
from minitron.errors import RequestError
from minitron.search.candidates import Candidate, Results, wanted
from tests.oracles.models import config_of

ARCH = from_hf(config_of(max_position_embeddings=256).to_dict(), "x")
USUAL = {
    "data": {"train": "t.txt"}, "target": {"hidden_size": 24}, "calibrate": {"samples": 8, "seq_length": 16},
    "train": {"seq_length": 16, "eval_tokens": 64, "steps": 10, "warmup_steps": 2}, "eval": {"tokens": 64},
}  # fmt: skip


def config(changes):
    return build(Config, {**USUAL, **{group: {**USUAL.get(group, {}), **values} for group, values in changes.items()}})


@pytest.mark.parametrize(
    ("verb", "changes", "said"),
    [
        ("compress", {"train": {"seq_length": 128}}, "train.eval_tokens=64: less than one window of train.seq_length=128 tokens"),
        ("compress", {"eval": {"seq_length": 65}}, "eval.tokens=64: less than one window of eval.seq_length=65 tokens"),
        ("evaluate", {"eval": {"tokens": 15}}, "eval.tokens=15: less than one window of train.seq_length=16 tokens"),
        ("calibrate", {"calibrate": {"samples": 3}}, "calibrate.samples=3: at least one per data-parallel replica, 4, is needed"),
        ("distill", {"train": {"global_batch_size": 6}}, "train.global_batch_size=6: must be divisible by micro_batch_size x replicas = 4"),
    ],
)
def test_amounts_that_hold_no_window(verb, changes, said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_lengths(config({}), verb)
    with pytest.raises(RequestError) as refusal:
        check_lengths(config(changes), verb)
    assert str(refusal.value) == said


@pytest.mark.parametrize(
    ("verb", "changes"),
    [
        ("evaluate", {"train": {"seq_length": 128, "eval_tokens": 1, "global_batch_size": 6}, "eval": {"seq_length": 64}}),  # it trains nothing
        ("prune", {"calibrate": {"samples": 1}}),  # it reads no text
        ("calibrate", {"calibrate": {"samples": 1, "criterion": "magnitude"}}),
        ("distill", {"eval": {"tokens": 1}}),
    ],
)
def test_verbs_are_asked_for_what_they_read_alone(verb, changes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_lengths(config(changes), verb)


def manifest(**tokens):
    """Prepared data with so many tokens in the parts of each split: `valid=[20]`."""
    parts = {f"{split}{number}": Part("", "", 1, count, 0, {}, {}, {}) for split, counts in tokens.items() for number, count in enumerate(counts)}
    return Manifest("", parts, {split: [(f"{split}{number}", 1.0) for number in range(len(counts))] for split, counts in tokens.items()})


ENOUGH = {"calibration": [129], "valid": [17], "text_novel": [17]}


@pytest.mark.parametrize(
    ("verb", "changes", "tokens", "said"),
    [
        ("calibrate", {}, {"calibration": [128]}, "calibrate.samples=8: the text holds 7 sequences of 16 tokens"),
        ("calibrate", {}, {"calibration": [16, 3]},
         "data.train=t.txt: too short: it has 19 tokens, and one window of calibrate.seq_length=16 needs 17"),
        ("calibrate", {"data": {"calibration": "c.txt"}}, {"calibration": [0]},
         "data.calibration=c.txt: too short: it has 0 tokens, and one window of calibrate.seq_length=16 needs 17"),
        ("distill", {}, {"valid": [16]}, "data.train=t.txt: too short: its held-out documents (data.valid_fraction=0.05) have 16 tokens, "
         "and one window of train.seq_length=16 needs 17"),
        ("evaluate", {"eval": {"seq_length": 20, "texts": {"novel": "n.txt"}}, "data": {"valid": "v.txt"}}, {},
         "data.valid=v.txt: too short: it has 17 tokens, and one window of eval.seq_length=20 needs 21"),
        ("evaluate", {"eval": {"texts": {"novel": "n.txt"}}}, {"text_novel": [6]},
         "eval.texts.novel=n.txt: too short: it has 6 tokens, and one window of train.seq_length=16 needs 17"),
    ],
)  # fmt: skip
def test_texts_with_too_few_tokens_are_refused_by_name(verb, changes, tokens, said):
    check_texts(config({"eval": {"texts": {"novel": "n.txt"}}}), "compress", manifest(**ENOUGH))
    with pytest.raises(RequestError) as refusal:
        check_texts(config(changes), verb, manifest(**{**ENOUGH, **tokens}))
    assert str(refusal.value) == said


@pytest.mark.parametrize(
    ("verb", "changes", "said"),
    [
        ("compress", {}, []),
        ("compress", {"calibrate": {"seq_length": 256}}, []),
        ("compress", {"calibrate": {"seq_length": 512}, "eval": {"seq_length": 300, "tokens": 300}},
         ["calibrate.seq_length=512, eval.seq_length=300: longer than the 256 positions that the model knows (its max_position_embeddings)"]),
        ("evaluate", {"train": {"seq_length": 512}, "eval": {"seq_length": 16}}, []),
    ],
)  # fmt: skip
def test_what_may_be_a_slip_is_said(verb, changes, said):
    assert list(remarks(config(changes), verb, ARCH)) == said


def test_a_warm_up_that_is_shortened_is_said_of_trainings_alone():
    said = ["train.warmup_steps=10: shortened to 9, as train.steps=10 end before it does"]
    for verb, steps, expected in (("distill", 10, said), ("distill", 9, []), ("evaluate", 10, []), ("cache", 10, [])):
        assert list(training_remarks(config({"train": {"warmup_steps": steps}}), verb)) == expected


def test_a_cache_that_is_not_read_is_said(tmp_path):
    there = tmp_path / "cache"
    there.mkdir()
    run = {"run": {"dir": str(tmp_path)}}
    assert list(remarks(config(run), "distill", ARCH)) == []
    (there / "manifest.json").write_text("{}")
    said = [f"{there} holds a cache, which is not read: teacher.cache.folder={there} would read it in the teacher's place"]
    assert list(remarks(config(run), "distill", ARCH)) == said
    for verb, change in (
        ("cache", {}),
        ("distill", {"teacher": {"cache": {"folder": "c"}}}),
        ("distill", {"distill": {"hidden": {"enabled": True}}}),
    ):
        assert list(remarks(config({**run, **change}), verb, ARCH)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta": 0.3}, "distill.beta=0.3: distill.loss=jsd alone has it, and this is distill.loss=forward_kl"),
        ({"hidden": {"alpha": 2}}, "distill.hidden.alpha=2.0: distill.hidden.enabled=true is needed with it"),
        ({"hidden": {"layers": [2], "teacher_layers": [2]}}, "distill.hidden.layers=[2]: distill.hidden.enabled=true is needed with it"),
    ],
)
def test_settings_of_the_loss_that_nothing_would_read_are_refused(changes, said):
    with pytest.raises(RequestError) as refusal:
        check_effect(config({"distill": changes}).distill)
    assert str(refusal.value) == said
    check_effect(config({"distill": {**changes, "loss": "jsd", "hidden": {**changes.get("hidden", {}), "enabled": True}}}).distill)
    check_effect(config({}).distill)


def test_positions_that_the_model_is_made_to_go_beyond():
    rope = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
    dynamic = from_hf(config_of(max_position_embeddings=256, **rope).to_dict(), "x")
    assert list(remarks(config({"calibrate": {"seq_length": 512}}), "calibrate", dynamic)) == []


def test_the_model_must_fit_the_layout_where_it_is_loaded():
    wide = {"parallel": {"tp": 5}}
    for verb in ("calibrate", "prune", "compress", "evaluate"):
        with pytest.raises(RequestError, match=r"^parallel.tp=5: must divide the model's ffn_hidden_size=36$"):
            check_model(config(wide), verb, ARCH)
    for verb in ("data", "export"):
        check_model(config(wide), verb, ARCH)
    taught = config({**wide, "teacher": {"path": "other"}})
    check_model(taught, "distill", ARCH)
    with pytest.raises(RequestError, match=r"^parallel.tp=5: must divide the teacher's ffn_hidden_size=36$"):
        check_teacher(taught, "distill", ARCH, ARCH)


def test_learned_positions_of_either_model_must_be_enough():
    learned, taught = ARCH.replace(position_offset=0, max_position_embeddings=24), {"teacher": {"path": "other"}}
    longer = config({**taught, "calibrate": {"seq_length": 32}})
    with pytest.raises(RequestError, match=r"^calibrate.seq_length=32: the model has learned 24 positions and has no others$"):
        check_model(longer, "compress", learned)
    check_teacher(longer, "compress", ARCH, learned)  # it is not calibrated
    longer = config({**taught, "train": {"seq_length": 32}})
    for verb in ("cache", "distill", "evaluate"):
        with pytest.raises(RequestError, match=r"^train.seq_length=32: the teacher has learned 24 positions and has no others$"):
            check_teacher(longer, verb, ARCH, learned)
        check_teacher(longer, verb, learned, ARCH)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"tp": 4, "pp": 2}, "teacher.parallel.tp=4: the teacher's tp x pp x parallel.cp = 8 must divide the number of processes, 4"),
        ({"pp": 3}, "teacher.parallel.pp=3: the teacher's tp x pp x parallel.cp = 6 must divide the number of processes, 4"),
        ({"ep": 2}, "teacher.parallel.ep=2: must divide dp x cp = 1, the processes over tp x pp"),
    ],
)
def test_a_teacher_that_does_not_go_round_the_processes(own, said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    layout = {"parallel": {"tp": 2, "vpp": 2, "pp": 2, "sp": True}}
    check_teacher_ranks(config(layout))
    check_teacher_ranks(config({**layout, "teacher": {"parallel": {"tp": 1, "pp": 4}}}))
    with pytest.raises(RequestError) as refusal:
        check_teacher_ranks(config({**layout, "teacher": {"parallel": own}}))
    assert str(refusal.value) == said


def test_a_teacher_must_fit_its_own_layout_and_not_the_students():
    for own, said in (({"tp": 5}, "tp=5: must divide the model's ffn_hidden_size=36"), ({"pp": 5}, "pp=5: stages need a layer each: at most .*, 4")):
        for verb in ("compress", "distill", "evaluate"):
            with pytest.raises(RequestError, match=rf"^teacher.parallel.{said}$"):
                check_model(config({"teacher": {"parallel": own}}), verb, ARCH)
        check_model(config({"teacher": {"parallel": own}}), "calibrate", ARCH)
    check_model(config({"parallel": {"tp": 5}, "teacher": {"parallel": {"tp": 4}}}), "evaluate", ARCH)
    with pytest.raises(RequestError, match=r"^teacher.parallel.tp=5: must divide the teacher's ffn_hidden_size=36$"):
        check_teacher(config({"teacher": {"path": "other", "parallel": {"tp": 5}}}), "distill", ARCH, ARCH)


def test_the_teachers_layout_is_the_students_unless_it_is_another():
    students = {"parallel": {"tp": 2, "pp": 2, "vpp": 2, "cp": 3, "sp": True}}
    for own in ({}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}):
        cfg = config({**students, "teacher": {"parallel": own}})
        assert cfg.teacher_parallel == cfg.parallel
    found = config({**students, "teacher": {"parallel": {"tp": 1}}}).teacher_parallel
    assert (found.tp, found.pp, found.vpp, found.cp, found.sp) == (1, 2, 1, 3, False)


def test_hidden_states_of_a_teacher_at_another_layout_are_refused():
    apart = {"teacher": {"parallel": {"tp": 2}}, "distill": {"hidden": {"enabled": True}}}
    with pytest.raises(RequestError, match=r"^distill.hidden.enabled=true: hidden states can't be compared over .* must be null$"):
        check(build(Config, apart), "distill")


def test_compiled_hooks_without_a_compiler_are_refused(tmp_path):
    gone = torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "none"),)})  # monkeypatch would not put it back
    with gone, pytest.raises(RequestError, match=r"^calibrate.compile=true: no C\+\+ compiler is found"):
        check(config({"calibrate": {"compile": True}}), "calibrate")


@pytest.mark.parametrize(
    ("verb", "target", "asked"),
    [
        ("calibrate", {}, True),
        ("compress", {}, True),
        ("search", {}, False),
        ("prune", {"layers_by": "choices"}, False),  # calibrate has the answers
        ("prune", {"layers_by": "loss", "rounds": 2}, False),
        ("prune", {"layers_by": "block_choices", "rounds": 2}, True),
        ("distill", {}, False),
    ],
)
def test_questions_are_opened_where_they_are_answered(verb, target, asked, tmp_path, monkeypatch):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n')
    cfg = config({"calibrate": {"choices": "absent.jsonl", "skip_layers": 1}, "target": target, "data": {"train": str(text)}})
    monkeypatch.setattr("minitron.checks.known_arch", lambda path: None)
    assert asks(cfg, verb) == asked
    with pytest.raises(RequestError, match=r"^calibrate.choices=absent.jsonl: no such file$") if asked else contextlib.nullcontext():
        check(cfg, verb)


def test_separate_documents_are_refused_with_transformer_engine():
    asked = dataclasses.replace(config({"data": {"separate_documents": True}}), spec="transformer_engine")
    with pytest.raises(
        RequestError, match=r"^data.separate_documents=true: Transformer Engine's attention is not told of documents; use spec=auto or"
    ):
        check(asked, "distill")


def test_a_cached_teacher_need_not_fit_the_layout():
    for teacher in ({"path": "other"}, {}):
        cached = config({"parallel": {"tp": 5}, "teacher": {**teacher, "cache": {"folder": "cache"}}})
        check_model(cached, "distill", ARCH)
        check_teacher(cached, "distill", ARCH, ARCH)
        for verb in ("cache", "evaluate"):
            with pytest.raises(RequestError, match=r"^parallel.tp=5: must divide the (model|teacher)'s ffn_hidden_size=36$"):
                check_teacher(cached, verb, ARCH, ARCH)


def test_the_cache_and_its_reader_are_held_to_their_own():
    with pytest.raises(RequestError, match=r"^teacher.cache.top_k=64: less than the vocabulary's 61 is needed$"):
        check_model(config({}), "cache", ARCH)
    check_model(config({"teacher": {"cache": {"top_k": 60}}}), "cache", ARCH)
    check_model(config({}), "distill", ARCH)


def test_the_cache_is_made_on_any_number_of_replicas(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    check_lengths(config({"train": {"global_batch_size": 32}}), "cache")
    with pytest.raises(RequestError, match=r"^train.global_batch_size=32: must be divisible"):
        check_lengths(config({"train": {"global_batch_size": 32}}), "distill")


@pytest.mark.parametrize(
    ("verb", "teacher", "said"),
    [
        ("cache", {}, "distill.loss=none: there is no teacher whose predictions could be kept; minitron distill needs no cache then"),
        ("distill", {"cache": {"folder": "x"}}, "teacher.cache.folder=x: must be null with distill.loss=none, which has no use for a teacher"),
        ("compress", {"cache": {"folder": "x"}}, "teacher.cache.folder=x: must be null with distill.loss=none, which has no use for a teacher"),
        ("distill", {"path": "x"}, "teacher.path=x: must be null with distill.loss=none, which has no use for a teacher"),
    ],
)
def test_a_teacher_that_would_have_nothing_to_do(verb, teacher, said):
    with pytest.raises(RequestError) as refusal:
        check(config({"distill": {"loss": "none", "cross_entropy": 1.0}, "teacher": teacher}), verb)
    assert str(refusal.value) == said


def test_a_training_without_a_teacher_asks_for_none_to_fit_the_layout():
    alone = {"parallel": {"tp": 4}, "teacher": {"parallel": {"tp": 5}}}
    with pytest.raises(RequestError, match=r"^teacher.parallel.tp=5"):
        check_model(config(alone), "distill", ARCH)
    check_model(config({**alone, "distill": {"loss": "none", "cross_entropy": 1.0}}), "distill", ARCH)


def test_a_model_that_is_trained_whole_must_fit_and_be_fed():
    with pytest.raises(RequestError, match=r"^parallel.tp=5: must divide the model's ffn_hidden_size=36$"):
        check_model(config({"parallel": {"tp": 5}}), "train", ARCH)
    with pytest.raises(RequestError, match=r"^train.eval_tokens=64: less than one window of train.seq_length=128 tokens$"):
        check_lengths(config({"train": {"seq_length": 128}}), "train")
    assert list(training_remarks(config({"train": {"warmup_steps": 10}}), "train")) == [
        "train.warmup_steps=10: shortened to 9, as train.steps=10 end before it does"
    ]


SEARCH = {"search": {"params": 25e3, "hidden_size": [24, 30, 36], "rungs": [2, 4], "tokens": 64}, "target": {"hidden_size": None}}


def searching(changes=None, **others):
    """Settings of a search, some of them other ones."""
    changes = {**(changes or {}), **others}
    return config({group: {**SEARCH.get(group, {}), **changes.get(group, {})} for group in {*SEARCH, *changes}})


@pytest.mark.parametrize(
    ("verb", "changes", "said"),
    [
        ("search", {"target": {"num_layers": 2}}, "target.num_layers=2: must be null with search.params, which looks for the sizes"),
        ("compress", {"target": {"ffn_hidden_size": 0.5}}, "target.ffn_hidden_size=0.5: must be null with search.params, which looks for the sizes"),
        ("search", {"search": {"tokens": 8}}, "search.tokens=8: less than one window of train.seq_length=16 tokens"),
        ("search", {"search": {"seeds": 2}, "teacher": {"cache": {"folder": "c"}}}, "search.seeds=2: 1 is needed with teacher.cache.folder"),
        (
            "compress",
            {"teacher": {"cache": {"folder": "c"}}},
            "teacher.cache.folder=c: it would serve the last of search.rungs=[2, 4] or train.steps=10",
        ),
        (
            "search",
            {"train": {"schedule": "wsd", "decay_steps": 6}},
            "search.rungs=[2, 4]: the last is the end of a candidate's training, and there train.decay_steps=6: 1 to 2 steps",
        ),
    ],
)
def test_a_search_that_can_not_be_is_refused_by_its_settings(verb, changes, said):
    with pytest.raises(RequestError) as refusal:
        check(searching(changes), verb)
    assert str(refusal.value).startswith(said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search": {"params": 1e3}}, "search.params=1000: no architecture of the grid comes within 5 %"),
        ({"parallel": {"tp": 5}}, "parallel.tp=5: must divide the model's ffn_hidden_size=36"),
        ({"target": {"merge_heads": True}}, "target.merge_heads=true: no candidate loses query heads of a KV group; false is needed"),
        ({"target": {"layers_by": "block"}, "search": {"num_layers": [1, 2, 3]}}, "target.layers_by=block: calibrate.skip_layers with "),
    ],
)
def test_no_candidate_is_within_what_is_asked(changes, said):
    for verb in ("search", "compress"):
        with pytest.raises(RequestError) as refusal:
            check_model(searching(changes), verb, ARCH)
        assert str(refusal.value).startswith(said)


def test_a_pruning_without_sizes_takes_those_of_a_search(tmp_path):
    asked = searching(run={"dir": str(tmp_path)})
    with pytest.raises(
        RequestError, match=r"^target.num_layers=null: sizes are needed under target, or those that minitron search chooses: .* was not run$"
    ):
        check_model(asked, "prune", ARCH)
    found = Results(ARCH, {}, 1, {}, [Candidate("a", {"num_layers": 1, "hidden_size": 24}, {})])
    found.save(tmp_path)
    with pytest.raises(RequestError, match=r"is not at its end$"):
        check_model(asked, "prune", ARCH)
    dataclasses.replace(found, chosen="a").save(tmp_path)
    check_model(asked, "prune", ARCH)
    assert (wanted(asked).num_layers, wanted(asked).hidden_size, wanted(config({})).num_layers) == (1, 24, None)


def test_the_warm_up_of_a_search_ends_with_its_rungs():
    assert [*training_remarks(searching(train={"warmup_steps": 7}), "search")] == [
        "train.warmup_steps=7: shortened to 3, as search.rungs=[2, 4] end before it does"
    ]

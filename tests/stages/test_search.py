"""The search of a real model: every loss against a lone distillation, one run of the teacher for all, the same choice however it is made."""

import functools
import importlib
import itertools
import json
import os
import shutil
import signal

import pytest
from transformers import AutoModelForCausalLM

from minitron.arch.arch import Arch
from minitron.search.candidates import Results
from tests.multirank.ranks import Died
from tests.oracles.metrics import without_costs
from tests.stages.commands import minitron, running

RUNGS = [2, 4, 6]
TRAIN = [
    "train.global_batch_size=8", "train.micro_batch_size=4", "train.seq_length=64", "train.eval_tokens=1024", "train.warmup_steps=2", "train.lr=2e-3",
]  # fmt: skip
SEARCH = [
    "search.params=200e3", "search.num_layers=[4,5]", "search.hidden_size=[48,56,64]", "search.ffn_hidden_size=[96,112,128,144,172]",
    "search.tokens=1024", f"search.rungs={RUNGS}", "search.finalists=3", "search.settled=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def common(stories, tales):
    """Settings of every command here."""
    return [f"model.path={stories}", f"data.train={tales}", "logging.progress=false", "device=cpu", "dtype=fp32"]


@pytest.fixture(scope="module")
def calibrated(common, tmp_path_factory):
    """A folder with importance scores, to be copied."""
    run = tmp_path_factory.mktemp("calibrated") / "run"
    done = minitron(run.with_name("log"), "calibrate", f"run.dir={run}", *common, "calibrate.samples=16", "calibrate.seq_length=64")
    assert (done.code, done.err) == (0, "")
    return run


CALIBRATE = ["calibrate.samples=16", "calibrate.seq_length=64"]


def count_passes(file):
    """Have every run of the teacher over a step's microbatches leave a line in a file."""
    from minitron.distillation.signal import LiveTeacher

    signals = LiveTeacher.signals

    def noted(self, step, batches):
        with open(file, "a", encoding="utf-8") as handle:
            handle.write(f"{step}\n")
        return signals(self, step, batches)

    LiveTeacher.signals = noted


def searched(calibrated, run, settings, size=1, prepare=None):
    """What a search found in a copy of the calibrated folder."""
    shutil.copytree(calibrated, run)
    with running(run.with_name(f"{run.name}.log"), "search", f"run.dir={run}", *settings, size=size, prepare=prepare) as ranks:
        assert ranks.results(timeout=300) == [0] * size
    assert not (run / "search").exists()
    return Results.load(run)


@pytest.fixture(scope="module")
def settings(common):
    return [*common, *CALIBRATE, *TRAIN, *SEARCH]


@pytest.fixture(scope="module")
def alone(calibrated, settings, tmp_path_factory):
    """A search on one process, all students at a time, and how often the teacher was run."""
    run = tmp_path_factory.mktemp("alone") / "run"
    results = searched(calibrated, run, settings, prepare=functools.partial(count_passes, run.with_name("passes")))
    return results, [*map(int, run.with_name("passes").read_text().split())]


def same(one, other, tolerance=0.0):
    """Two searches tell the same, but for seconds."""
    assert (one.candidates, one.grid, one.fell, one.chosen, one.settled) == (other.candidates, other.grid, other.fell, other.chosen, other.settled)
    for mine, theirs in zip(one.rungs, other.rungs, strict=True):
        assert (mine.steps, mine.tokens, mine.stayed, mine.tau) == (theirs.steps, theirs.tokens, theirs.stayed, theirs.tau)
        assert {*mine.losses} == {*theirs.losses}
        assert all(losses == pytest.approx(theirs.losses[name], abs=tolerance, rel=0) for name, losses in mine.losses.items())
    return True


def test_the_ladder_halves_and_the_best_is_chosen(alone):
    results, _ = alone
    assert [rung.steps for rung in results.rungs] == [0, *RUNGS]
    assert [len(rung.losses) for rung in results.rungs] == [4, 3, 2, 2]
    for rung, after in zip(results.rungs, results.rungs[1:], strict=False):
        assert rung.stayed == sorted(rung.losses, key=rung.losses.get)[: len(rung.stayed)]
        assert {*rung.stayed} == {*after.losses}
    last = results.rungs[-1]
    assert results.chosen == min(last.losses, key=last.losses.get)
    assert all(rung.seconds > 0 for rung in results.rungs)
    assert [rung.tau is None for rung in results.rungs] == [True, False, False, False]
    assert last.losses[results.chosen][0] < results.rungs[0].losses[results.chosen][0] - 0.3  # it learned


def test_the_teacher_is_run_once_a_step_however_many_students(alone):
    assert alone[1] == [*range(RUNGS[-1])]


def test_a_candidate_s_way_is_bitwise_that_of_a_distillation_of_its_own(alone, calibrated, common, tmp_path):
    results, _ = alone
    winner = results.candidate(results.chosen)
    run = shutil.copytree(calibrated, tmp_path / "run")
    sizes = [f"target.{name}={size}" for name, size in winner.sizes.items()]
    assert minitron(tmp_path / "prune", "prune", f"run.dir={run}", *[*common[:1], *common[3:]], *CALIBRATE, *sizes).code == 0
    steps = [f"train.steps={RUNGS[-1]}", "train.eval_interval=2"]
    done = minitron(tmp_path / "distill", "distill", f"run.dir={run}", *common, *TRAIN, *steps)
    assert (done.code, done.err) == (0, "")
    with open(run / "metrics.jsonl", encoding="utf-8") as handle:
        losses = {line["step"]: line["valid_loss"] for line in without_costs(map(json.loads, handle)) if "valid_loss" in line}
    assert losses == {rung.steps: rung.losses[winner.name][0] for rung in results.rungs[1:]}


def test_a_compression_within_a_budget_ends_with_a_model_that_transformers_loads(settings, tmp_path):
    run = tmp_path / "run"
    short = [*settings, "search.rungs=[1,2]", "search.finalists=2", "train.steps=3", "train.warmup_steps=0", "eval.tokens=512"]
    done = minitron(tmp_path / "log", "compress", f"run.dir={run}", *short)
    assert (done.code, done.err) == (0, ""), done
    results = Results.load(run)
    chosen = results.candidate(results.chosen)
    pruned = Arch.from_dict(json.loads((run / "pruned" / "arch.json").read_text()))
    assert {name: getattr(pruned, name) for name in chosen.sizes} == chosen.sizes
    assert AutoModelForCausalLM.from_pretrained(run / "hf").num_parameters() == chosen.costs["params"]
    assert abs(chosen.costs["params"] / 200e3 - 1) <= 0.05
    before = (run / "candidates.json").stat().st_mtime_ns
    assert minitron(tmp_path / "log", "compress", f"run.dir={run}", *short).code == 0
    assert (run / "candidates.json").stat().st_mtime_ns == before  # it is not searched again


@pytest.mark.slow
def test_students_in_turn_give_the_same_with_a_run_of_the_teacher_for_each(alone, calibrated, settings, tmp_path):
    """One at a time: every student goes out of memory and comes back from its checkpoint at each rung."""
    passes = tmp_path / "passes"
    results = searched(calibrated, tmp_path / "run", [*settings, "search.together=1"], prepare=functools.partial(count_passes, passes))
    assert same(results, alone[0])
    assert len(passes.read_text().split()) == 3 * 2 + 2 * 2 + 2 * 2


LAYOUTS = {
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2": (2, []),
    "tp2-pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "cp2": (2, ["parallel.cp=2"]),
    "pp2-vpp2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "dp2, the teacher tp2": (2, ["teacher.parallel.tp=2"]),
}


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_finds_the_same(layout, alone, calibrated, settings, tmp_path):
    size, changes = LAYOUTS[layout]
    assert same(searched(calibrated, tmp_path / "run", [*settings, *changes], size), alone[0], tolerance=1e-5)


@pytest.mark.slow
def test_cached_predictions_serve_every_student(alone, calibrated, common, settings, tmp_path):
    """All but one of the vocabulary's tokens: losses are those of the teacher itself but for the cache's rounding."""
    kept = [f"teacher.cache.folder={tmp_path / 'cache'}", "teacher.cache.top_k=511"]
    made = minitron(tmp_path / "log", "cache", f"run.dir={tmp_path / 'other'}", *common, *TRAIN, *kept, f"train.steps={RUNGS[-1]}")
    assert (made.code, made.err) == (0, "")
    passes = tmp_path / "passes"
    results = searched(calibrated, tmp_path / "run", [*settings, *kept], prepare=functools.partial(count_passes, passes))
    assert not passes.exists()
    assert same(results, alone[0], tolerance=1e-3)


def signalled(number, name, which):
    """The process gets a signal when MODULE:CLASS.METHOD is called for the `which`-th time."""
    module, path = name.split(":")
    owner, method = path.split(".")
    owner, calls = getattr(importlib.import_module(module), owner), itertools.count(1)
    original = getattr(owner, method)

    def call(*args, **kwargs):
        if next(calls) == which:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, method, call)


NOTE, STEP, SAVE = "minitron.search.candidates:Results.save", "minitron.engine.trainer:Trainer.update", "minitron.engine.checkpoint:Checkpoints.save"
ENDS = [  # of a search of two seeds, two students at a time
    (signal.SIGKILL, NOTE, 4),  # the second candidate as pruned
    (signal.SIGKILL, STEP, 3),
    (signal.SIGTERM, STEP, 6),
    (signal.SIGKILL, NOTE, 4),
    (signal.SIGKILL, SAVE, 3),
    (signal.SIGKILL, STEP, 9),
    (signal.SIGUSR1, STEP, 5),
    (signal.SIGKILL, NOTE, 6),
]


@pytest.mark.slow
def test_a_search_that_is_ended_anywhere_goes_on_to_the_same(calibrated, settings, tmp_path):
    """With losses between hidden states, whose teacher's states several students take from one run of it."""
    hidden = ["distill.hidden.enabled=true", "distill.hidden.projection=true", "distill.hidden.layers=[-2]", "distill.hidden.teacher_layers=[-2]"]
    settings = [*settings, *hidden, "search.seeds=2", "search.settled=0"]
    unbroken = searched(calibrated, tmp_path / "unbroken", settings)
    assert [len(rung.losses[unbroken.chosen]) for rung in unbroken.rungs] == [1, 2, 2, 2]
    assert all(len({*rung.losses[unbroken.chosen]}) == 2 for rung in unbroken.rungs[1:])  # another order of the data
    run = shutil.copytree(calibrated, tmp_path / "run")
    command = ["search", f"run.dir={run}", *settings, "search.together=2"]
    for how in ENDS:
        with running(tmp_path / "log", *command, prepare=functools.partial(signalled, *how)) as ranks:
            if how[0] == signal.SIGKILL:
                with pytest.raises(Died):
                    ranks.results(timeout=300)
            else:
                assert ranks.results(timeout=300) == [75], how
        assert Results.load(run).chosen is None, how
        assert len([*run.glob("search/*/step_*")]) <= 2 * 3, how
    assert minitron(tmp_path / "log", *command).code == 0
    assert same(Results.load(run), unbroken)
    assert not (run / "search").exists()


def test_what_was_searched_for_binds_and_is_not_pruned_to_once_it_is_out_of_date(calibrated, settings, tmp_path):
    run = shutil.copytree(calibrated, tmp_path / "run")
    short = [*settings, "search.rungs=[1]", "search.finalists=1", "search.tokens=64", "search.params=180e3"]
    assert minitron(tmp_path / "log", "search", f"run.dir={run}", *short).code == 0
    results = Results.load(run)
    assert (results.settings["params"], results.rungs[-1].steps) == (180e3, 0)  # one finalist needs no training
    assert abs(results.candidate(results.chosen).costs["params"] / 180e3 - 1) <= 0.05
    another = minitron(tmp_path / "log", "search", f"run.dir={run}", *short, "search.params=200e3")
    assert another.code == 2 and "search was made with search.params=180000" in another.err
    record = json.loads((run / "stages.json").read_text())
    record["search"]["done"] = False  # as when its scores were measured anew
    (run / "stages.json").write_text(json.dumps(record))
    stale = minitron(
        tmp_path / "log", "prune", f"run.dir={run}", *[one for one in settings if one.startswith(("model.", "device", "dtype"))], *CALIBRATE
    )
    assert stale.code == 2 and "search again, or give sizes under target" in stale.err and stale.err.count("\n") == 1


def diverging():
    """The training of whatever candidate comes first is no good from its second step on."""
    from minitron.engine.trainer import Trainer

    update, first = Trainer.update, []

    def updating(self, *args):
        line = update(self, *args)
        first[:] = first or [self.model.arch]
        if self.model.arch == first[0] and self.step:
            self.guard.in_a_row, self.guard.reason = 99, "its loss was not finite"
        return line

    Trainer.update = updating


def test_a_candidate_whose_training_comes_to_nothing_is_out(alone, calibrated, settings, tmp_path):
    results, usual = searched(calibrated, tmp_path / "run", settings, prepare=diverging), alone[0]
    before, first, *later = results.rungs
    best = before.stayed[0]
    assert "its loss was not finite" in first.lost[best] and best not in first.losses
    assert first.losses == {name: losses for name, losses in usual.rungs[1].losses.items() if name != best}
    assert first.stayed == sorted(first.losses, key=first.losses.get)
    assert results.chosen in first.stayed and not any(rung.lost for rung in later)


@pytest.mark.slow
def test_a_damaged_checkpoint_has_its_candidate_begin_anew(alone, calibrated, settings, tmp_path):
    run = shutil.copytree(calibrated, tmp_path / "run")
    with running(tmp_path / "log", "search", f"run.dir={run}", *settings, prepare=functools.partial(signalled, signal.SIGTERM, STEP, 8)) as ranks:
        assert ranks.results(timeout=300) == [75]
    files = [file for file in sorted(run.glob("search/*/step_*/*")) if file.stat().st_size > 1000]
    for file in files[:2]:
        content = bytearray(file.read_bytes())
        content[500] ^= 1
        file.write_bytes(content)
    again = minitron(tmp_path / "log", "search", f"run.dir={run}", *settings)
    assert again.code == 0 and "this candidate begins anew" in again.out
    assert same(Results.load(run), alone[0])

"""Latencies from measured parts: what is measured, kept and predicted. How long anything takes is no test's business."""

import contextlib
import functools
from types import SimpleNamespace

import pytest

from minitron import engine
from minitron.arch.families import from_hf
from minitron.config.build import build
from minitron.config.schema import Config
from minitron.engine import timing
from minitron.errors import RequestError
from minitron.search import latency
from minitron.search.latency import Table, check, known, measured, read_tables
from minitron.stages import search as stage
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import TINY, config_of
from tests.reporting.searches import search as made_up

MODEL = from_hf(config_of().to_dict(), "x")
OTHERS = [MODEL.replace(num_layers=3), MODEL.replace(num_layers=2, ffn_hidden_size=24), MODEL.replace(hidden_size=36), MODEL.replace(num_layers=1)]


def config(folder=None, parallel=None, **search):
    tree = {"search": {"latency_ms": 5.0, "batch_size": 2, "seq_length": 16, **search}, "dtype": "fp32", "device": "cpu", "parallel": parallel or {}}
    return build(Config, {**tree, **({"run": {"dir": str(folder)}} if folder else {})})


def test_a_prediction_is_the_sum_of_the_parts():
    table = Table({}, {"H48-F36-A6-G3": 2.0, "H48-F24-A6-G3": 1.5}, {"48": [0.25, 3.0]})
    assert [table.predict(arch) for arch in (MODEL, *OTHERS[:2])] == [4 * 2 + 3.25, 3 * 2 + 3.25, 2 * 1.5 + 3.25]
    assert [table.lacks(arch) for arch in (MODEL, *OTHERS)] == [False, False, False, True, False]


def test_each_size_is_measured_once(alone, tmp_path, monkeypatch):
    asked = []

    def time_parts(arch, load, world, dtype, spec):
        asked.append((arch.hidden_size, arch.ffn_hidden_size, arch.vocab_size))
        return engine.Parts(float(arch.ffn_hidden_size), 100.0, float(arch.vocab_size))

    monkeypatch.setattr(latency.engine, "time_parts", time_parts, raising=False)
    cfg, shown = config(tmp_path), []

    @contextlib.contextmanager
    def bar(total):
        shown.append(total)
        yield lambda: shown.append("measured")

    found = measured(MODEL, cfg, alone, "torch", tmp_path, bar)([MODEL, *OTHERS])
    assert shown == [3, "measured", "measured", "measured"]
    vocabulary = TINY["vocab_size"]
    assert asked == [(48, 36, vocabulary), (48, 24, 1), (36, 36, vocabulary)]
    assert found == [100 + vocabulary + layers * ffn for layers, ffn in [(4, 36), (3, 36), (2, 24), (4, 36), (1, 36)]]
    assert measured(MODEL, cfg, alone, "torch", tmp_path)([MODEL, *OTHERS]) == found
    assert known(MODEL, cfg)(OTHERS) == found[1:]
    assert len(asked) == 3
    assert measured(MODEL, config(tmp_path, seq_length=8), alone, "torch", tmp_path)([MODEL]) == found[:1]
    assert len(asked) == 4
    assert len(read_tables(tmp_path)) == 2
    assert measured(MODEL, config(tmp_path, latency_ms=None), alone, "torch", tmp_path) is None


def test_two_kinds_of_blocks_are_not_taken_for_one(alone, tmp_path):
    routed = MODEL.replace(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=20)
    mixed = routed.replace(moe_layers=(True, False, True, True))
    with pytest.raises(RequestError, match=r"^search.latency_ms=5.0: blocks with experts and dense ones in one model can't be told apart"):
        known(mixed, config(tmp_path))
    known(routed, config(tmp_path))
    known(mixed, config(tmp_path, latency_ms=None))
    shared, whole = (latency.setting_of(routed, config(tmp_path, parallel={"ep": ep})) for ep in (2, 1))
    assert shared != whole


@pytest.mark.parametrize("missing", ["everything", "a size", "the length"])
def test_what_was_not_measured_is_not_guessed(alone, tmp_path, monkeypatch, missing):
    if missing != "everything":
        monkeypatch.setattr(latency.engine, "time_parts", lambda *unused: engine.Parts(1.0, 1.0, 1.0), raising=False)
        measured(MODEL, config(tmp_path), alone, "torch", tmp_path)([MODEL])
    asked = OTHERS if missing == "a size" else [MODEL]
    with pytest.raises(RequestError, match=r"search.latency_ms=5.0: times of these sizes must be measured first, which minitron plan does not do"):
        known(MODEL, config(tmp_path, **({"seq_length": 8} if missing == "the length" else {})))(asked)
    assert known(MODEL, config(tmp_path, latency_ms=None)) is None


def on_each(world, folder, parallel):
    """What a rank finds, and what the whole model takes."""
    timing.SECONDS = 0.0  # in this rank's own process: how well it is measured is of no interest
    cfg = config(folder, parallel)
    found = measured(MODEL, cfg, world, "torch", folder)([MODEL, *OTHERS[:2]])
    table = read_tables(folder)[0]
    checked = check(MODEL, found[0], cfg, world, "torch")
    return found, table.blocks, table.outside, checked.predicted, checked.real


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(pp=2, vpp=2)], ids=str)
def test_every_rank_finds_the_same(layout, tmp_path):
    parallel = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp}
    ranks = on_ranks(functools.partial(on_each, folder=tmp_path, parallel=parallel), layout)
    assert all(rank == ranks[0] for rank in ranks)
    found, blocks, outside, predicted, real = ranks[0]
    assert {*blocks} == {"H48-F36-A6-G3", "H48-F24-A6-G3"}
    assert all(time > 0 for time in [*blocks.values(), *outside["48"], *found, predicted, real])
    assert found[0] - found[1] == pytest.approx(blocks["H48-F36-A6-G3"])


@pytest.mark.parametrize(("real", "said"), [(60.0, "60 ms as a whole, above search.latency_ms=57.5"), (57.0, "57 ms as a whole\n")])
def test_a_chosen_model_that_takes_longer_than_its_parts_is_said(monkeypatch, capsys, real, said):
    results = made_up()
    cfg = config(latency_ms=57.5)
    opened = SimpleNamespace(cfg=cfg, source=SimpleNamespace(arch=results.original), world=SimpleNamespace(is_main=True), spec=lambda: "torch")
    monkeypatch.setattr(stage, "check", lambda shape, predicted, *_: latency.Checked(predicted, real))
    stage.check_latency(opened, results)
    assert f"latency of {results.chosen}: 56.1 ms by its parts, {said}" in " ".join(capsys.readouterr().out.split("\n  "))

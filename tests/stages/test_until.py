"""`run.until`: compress ends after a stage, and the same command without it goes on."""

import types

import pytest

from minitron.checks import check
from minitron.config.build import build
from minitron.config.schema import Config
from minitron.errors import RequestError
from minitron.stages import compress


@pytest.mark.parametrize(
    ("until", "budget", "expected"),
    [
        ("data", None, ["data"]),
        ("calibrate", None, ["data", "calibrate"]),
        ("search", 1e6, ["data", "calibrate", "search"]),
        ("evaluate", None, ["data", "calibrate", "prune", "distill", "evaluate"]),
        (None, 1e6, [*(stage for stage in compress.STAGES if stage != "speed"), "report"]),
    ],
)
def test_stages_up_to_the_one_that_is_named(monkeypatch, capsys, until, budget, expected):
    done = []
    monkeypatch.setattr(compress, "STAGES", {name: lambda opened, name=name: done.append(name) for name in compress.STAGES})
    monkeypatch.setattr(compress, "finish", lambda opened, number: done.append("report"))
    monkeypatch.setattr(compress.engine, "on_main", lambda world, action: action(), raising=False)
    cfg = build(Config, {"run": {"dir": "r", "until": until}, "search": {"params": budget}})
    compress.work(types.SimpleNamespace(cfg=cfg, world=types.SimpleNamespace(is_main=True), is_done=lambda verb: False, data=None))
    assert done == expected
    assert (f"run.until={until}: this is done" in capsys.readouterr().out) == (until is not None)


def test_a_search_that_there_is_not_can_not_be_the_end():
    with pytest.raises(RequestError, match=r"run\.until=search: no budget is set"):
        check(build(Config, {"run": {"until": "search"}}), "compress")
